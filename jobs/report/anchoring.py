"""The report's section on anchoring: does the anchored latent tell its subpopulation apart, and better than others do?

The comparison is a value (`compare`), the words and the table are made from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.report.html import (
    NO_DICTIONARY,
    NONE,
    count,
    decimals,
    listed,
    missing,
    percent,
    plural,
    section,
    table,
    text,
)
from jobs.report.run_view import RunView, control_line, control_of
from storage.format.records import Record

MANY_ROWS = 1000
"""Below this many held-out rows, which come from few documents, a difference says little."""
NAMED = 6
"""Subpopulations a sentence names at most."""


@dataclass(frozen=True)
class Score:
    """How well one latent tells a subpopulation from the other rows."""

    latent: int
    auroc: float
    density: float


@dataclass(frozen=True)
class Comparison:
    """One subpopulation, scored by three latents; None where there is none or nothing to score on."""

    label: str
    value: str
    rows: int
    cosine: float | None
    anchored: Score | None
    best: Score | None
    """The best latent of the same dictionary; it may be the anchored one."""
    control: Score | None
    """The best latent of the control."""

    @property
    def winners(self) -> frozenset[str]:
        """The ones with the highest AUROC among 'anchored', 'best' and 'control'; several when they are equal."""
        scores = {n: s.auroc for n in ("anchored", "best", "control") if (s := getattr(self, n)) is not None}
        return frozenset(n for n, auroc in scores.items() if auroc == max(scores.values()))

    @property
    def difference(self) -> float | None:
        """AUROC of the anchored latent minus that of the control's best."""
        return self.anchored.auroc - self.control.auroc if self.anchored and self.control else None


def compare(evaluation: Record, control: Record | None) -> list[Comparison]:
    """Put an anchored run's evaluation beside its control's, subpopulation by subpopulation of the run's own set."""
    others = {_key(g): g for g in control["subpopulations"]} if control else {}
    return [
        Comparison(
            label=group["label"],
            value=group["value"],
            rows=group["rows"],
            cosine=group.get("anchor_cosine"),
            anchored=_score(evaluation, group, "anchored"),
            best=_score(evaluation, group, "best"),
            control=_score(control, others.get(_key(group), {}), "best") if control else None,
        )
        for group in evaluation["subpopulations"]
        if "anchored_latent" in group
    ]


def _key(group: Record) -> tuple[str, str, str]:
    return group["anchors"], group["label"], group["value"]


def _score(evaluation: Record, group: Record, which: str) -> Score | None:
    latent, auroc = group.get(f"{which}_latent"), group.get(f"{which}_auroc")
    return None if latent is None or auroc is None else Score(latent, auroc, evaluation["density"][latent])


def anchoring_section(runs: Sequence[RunView]) -> str:
    intro = (
        "An anchored dictionary has one latent for each subpopulation, its direction pulled toward that "
        "subpopulation&rsquo;s anchor. <em>AUROC</em> says how well a latent&rsquo;s activation tells rows of the "
        "subpopulation from other rows: 1 is perfect, 0.5 is a coin, less than 0.5 means that it is rather silent "
        "there. The highest AUROC of a line is <b>bold</b>, whichever it is. Under each stands the latent and how "
        "often it fires; a latent that fires on few rows cannot get far from 0.5, as all its silent rows are ties."
    )
    if not runs:
        return section("anchoring", "Anchoring", intro, NO_DICTIONARY)
    anchored = [run for run in runs if run.anchors is not None]
    if not anchored:
        return section(
            "anchoring",
            "Anchoring",
            intro,
            missing(
                "No dictionary is anchored. Give one of train.dictionaries in the spec the name of the anchor set "
                "(anchors: NAME), and keep one without as its control.",
                "granary train SPEC",
            ),
        )
    return section("anchoring", "Anchoring", intro, *(_anchored_run(run, runs) for run in anchored))


def _anchored_run(run: RunView, runs: Sequence[RunView]) -> str:
    head = f"<h3>{text(run.name)} <small>anchored to {text(run.anchors)}</small></h3>"
    evaluation = run.evaluation
    if evaluation is None:
        return head + missing(*run.next_step)
    if not any("anchored_latent" in group for group in evaluation["subpopulations"]):
        return head + missing(
            f"The evaluation of {run.name} did not score what it is anchored to. If these are subpopulations of labels "
            f"or conditions, put the anchors section named {run.anchors} into the spec; of vectors, top rows and "
            "controls nobody knows which rows belong to them.",
            "granary evaluate SPEC",
        )
    control = control_of(run, runs)
    beside, note = _usable(run, evaluation, control, [r.name for r in runs])
    found = compare(evaluation, beside)
    control_name = control.name if control and beside else "control"
    rows = [_line(c) for c in found]
    columns = ["Subpopulation", "Anchored latent", f"Best of {text(run.name)}", f"Best of {text(control_name)}"]
    columns += ["Cosine with anchor", "Held-out rows"]
    listing = table(columns, rows, label=f"AUROC of {run.name}", more="scores")
    return f"{head}<p>{summary(found, len(evaluation['density']), control_name)}</p>{note}{listing}"


def _usable(
    run: RunView, evaluation: Record, control: RunView | None, names: Sequence[str]
) -> tuple[Record | None, str]:
    """The control's evaluation if it can be compared, and what to do if not (markup)."""
    if control is None:
        return None, missing(
            f"There is no control: no run differs from {run.name} only in its anchors. This line under "
            "train.dictionaries would make one:",
            "granary run SPEC",
            control_line(run, names),
        )
    if control.evaluation is None:
        return None, missing(f"The control is not ready. {control.next_step[0]}", control.next_step[1])
    same = [("row_start",), ("auroc_rows",), ("identity", "anchors")]
    if any(_at(evaluation, keys) != _at(control.evaluation, keys) for keys in same):
        return None, missing(
            f"The control {control.name} was evaluated on other rows or subpopulations, so its values are not beside "
            "these. Evaluate both with one spec.",
            "granary evaluate SPEC",
        )
    return control.evaluation, ""


def _at(record: Record, keys: Sequence[str]) -> object:
    value: object = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def summary(found: Sequence[Comparison], latents: int, control: str) -> str:
    """What the table says, in words (markup), with what speaks against reading too much into it."""
    scored = [c for c in found if c.anchored is not None]
    unscored = [c.value for c in found if c.anchored is None]
    own = sum("anchored" in c.winners or c.anchored == c.best for c in scored)
    sentences = []
    compared = [(c.rows, d) for c in scored if (d := c.difference) is not None]
    if compared:
        many = [d for rows, d in compared if rows >= MANY_ROWS]
        among_many = (
            f", and for {sum(d > 0 for d in many)} of the {len(many)} with at least {count(MANY_ROWS)} held-out rows"
        )
        sentences.append(
            f"<b>The anchored latent beats the best latent of {text(control)} for {sum(d > 0 for _, d in compared)} of "
            f"{plural(len(compared), 'subpopulation')}</b>{among_many if 0 < len(many) < len(compared) else ''}."
        )
    sentences.append(f"It is the best latent of its own dictionary for {own} of {len(scored)}.")
    sentences.append(
        f"&ldquo;Best&rdquo; is chosen among all {count(latents)} latents on the very rows it is scored on, which "
        "favours it; the anchored latent was fixed before training. Where held-out rows are few they come from few "
        "documents, and a difference there says little."
    )
    if unscored:
        some = listed(unscored) if len(unscored) <= NAMED else f"{count(len(unscored))} subpopulations"
        sentences.append(f"Without held-out rows, and so without a score: {text(some)}.")
    return " ".join(sentences)


def _line(c: Comparison) -> list[str]:
    def shown(which: str) -> str:
        score: Score | None = getattr(c, which)
        if score is None:
            return NONE
        if which == "best" and c.anchored is not None and score.latent == c.anchored.latent:
            return '<span class="muted">the anchored one</span>'
        value = decimals(score.auroc)
        value = f"<b>{value}</b>" if which in c.winners else value
        return f'{value}<br><span class="muted">{score.latent}, on {percent(score.density)}</span>'

    name = f'<span class="muted">{text(c.label)}</span> {text(c.value)}'
    return [name, shown("anchored"), shown("best"), shown("control"), decimals(c.cosine), count(c.rows)]
