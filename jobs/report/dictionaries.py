"""The report's sections on dictionaries as wholes: how well they reconstruct, how they trained, how often they fire."""

from collections.abc import Sequence
from statistics import median

from jobs.report.html import NO_DICTIONARY, count, figure, listed, missing, number, percent, section, table, text
from jobs.report.plots import Series, density_bins, histogram, legend, line_plot, percent_tick
from jobs.report.run_view import RunView
from storage.format.records import Record
from storage.store import Store


def dictionaries_section(store: Store, status: Record, runs: Sequence[RunView]) -> str:
    intro = (
        "A dictionary writes each activation as a sum of a few of its <em>latents</em>. <em>FVU</em> is the share of "
        "the variance it misses (0 is perfect, 1 is no better than the mean), <em>L0</em> the mean number of active "
        "latents of a row, <em>dead</em> the share of latents that never fired. <em>Loss recovered</em> puts the "
        "reconstruction back into the model: 100 % leaves its predictions as good as they were, 0 % is as bad as "
        "replacing the activations by zero, or by their mean. All of it is measured on held-out rows."
    )
    if not runs:
        return section("dictionaries", "Dictionaries", intro, _how_to_train(status))
    notes = "".join(missing(*run.next_step) for run in runs if run.next_step[0])
    groups = (
        '<tr><td colspan="6"></td><th colspan="3" scope="colgroup">Held-out rows</th>'
        '<th colspan="2" scope="colgroup">Loss recovered against</th>'
        '<th colspan="4" scope="colgroup">Cross-entropy, nats a token</th></tr>'
    )
    head = ["Dictionary", "Sites", "Anchors", "Latents", "Activation", "Steps", "FVU", "L0", "Dead", "zero", "mean"]
    head += ["clean", "spliced", "zero", "mean"]
    rows = [_line(run) for run in runs]
    summary = table(head, rows, label="Dictionaries", words=3, groups=groups, more="summary")
    return section("dictionaries", "Dictionaries", intro, summary, _sizes(runs), _by_site(runs), notes, _curves(runs))


def _how_to_train(status: Record) -> str:
    ready = [(h, site) for h in status["harvests"] if h["units_committed"] == h["units"] for site in h["sites"]]
    if not ready:
        return missing("There are no dictionaries yet: they are trained on a finished harvest.", "granary harvest SPEC")
    harvest, site = ready[0]
    spec = f"train:\n  dictionaries:\n    - {{name: sae, input: {site}, latents: {8 * harvest['d_model']}}}"
    return missing("There are no dictionaries yet. With these lines in the spec:", "granary train SPEC", spec)


def _line(run: RunView) -> list[str]:
    found, config = run.evaluation or {}, run.config
    loss = found.get("loss") or {}
    steps = count(run.steps) if run.finished else f"{count(run.steps_done)} of {count(run.steps)}"
    measured = [number(found.get("fvu")), number(found.get("l0")), percent(found.get("dead_share"))]
    measured += [percent(loss.get(f"recovered_against_{what}")) for what in ("zero", "mean")]
    measured += [number(loss.get(what)) for what in ("clean", "spliced", "zero_ablated", "mean_ablated")]
    about = [text(run.name), text(run.sites), text(run.anchors or "none"), count(config["latents"])]
    return [*about, text(run.activation), steps, *measured]


def _sizes(runs: Sequence[RunView]) -> str:
    """On how much the figures rest, once if it is the same for all."""
    sizes = {
        f"{count(e['rows'])} rows"
        + (f" (loss: {count(loss['predictions'])} predictions in {count(loss['contexts'])} contexts)" if loss else "")
        for run in runs
        if (e := run.evaluation) is not None
        for loss in [e["loss"]]
    }
    return f'<p class="muted">Measured on {listed(sorted(sizes))}.</p>' if sizes else ""


def _by_site(runs: Sequence[RunView]) -> str:
    """The FVU of each output, where there are several: in their sum one of large activations hides the others."""
    lines = [
        f"{text(run.name)}: " + ", ".join(f"{text(site)} {number(fvu)}" for site, fvu in of_sites.items())
        for run in runs
        if len(of_sites := (run.evaluation or {}).get("site_fvu", {})) > 1
    ]
    return f'<p class="muted">FVU of each site: {"; ".join(lines)}.</p>' if lines else ""


def _curves(runs: Sequence[RunView]) -> str:
    def lines(key: str) -> list[Series]:
        return [Series(run.name, [(point["step"], point.get(key)) for point in run.curve]) for run in runs]

    names = legend([run.name for run in runs])
    return (
        f'{names}<div class="plots">'
        + figure(
            line_plot(lines("fvu"), x_label="step", y_label="FVU (log)", log=True),
            "<b>FVU of each training batch</b> over steps; lower is better. It should fall and level off.",
        )
        + figure(
            line_plot(lines("dead_share"), x_label="step", y_label="dead latents", least_top=0.01, y_text=percent_tick),
            "<b>Latents without a recent firing</b>, as a share of all. If it grows, latents are lost for good.",
        )
        + "</div>"
    )


def density_section(runs: Sequence[RunView]) -> str:
    intro = (
        "The density of a latent is the share of held-out rows on which it fires. Each bar counts the latents of one "
        "range of densities, on a logarithmic axis. Latents that fire on a large share of rows seldom stand for one "
        "thing; latents that never fire, the dead ones, are in no bar and counted beside the name. <em>Tilt</em> is 0 "
        "where no decoder row could be turned to reconstruct better (1 is the worst), <em>pull</em> by how much "
        "activities are too low for their rows; dense latents that write opposite directions are no two concepts."
    )
    measured = [(i, run, run.evaluation) for i, run in enumerate(runs) if run.evaluation is not None]
    if not measured:
        boxes = "".join(missing(*run.next_step) for run in runs)
        return section("density", "Latent density", intro, boxes or NO_DICTIONARY)
    fired = [d for _, _, evaluation in measured for d in evaluation["density"] if d > 0]
    binned = [density_bins(e["density"], min(fired, default=0.1)) for _, _, e in measured]
    top = max((n for counts, _ in binned for n in counts), default=1)
    panels = [
        figure(
            histogram(counts, edges, top=top, series=i, label=f"Latent density of {run.name}"),
            _density_caption(run, evaluation),
        )
        for (i, run, evaluation), (counts, edges) in zip(measured, binned, strict=True)
    ]
    return section("density", "Latent density", intro, f'<div class="plots">{"".join(panels)}</div>')


def _density_caption(run: RunView, evaluation: Record) -> str:
    alive = [d for d in evaluation["density"] if d > 0]
    dead = len(evaluation["density"]) - len(alive)
    middle = f"<br>median density of the others {percent(median(alive))}" if alive else ""
    if found := evaluation.get("optimality"):
        middle += (
            f"<br>median tilt {number(found['median_tilt'])}, pull {number(found['median_pull'])}; "
            f"{count(found['antipodal_pairs'])} dense antipodal pairs"
        )
    return f"<b>{text(run.name)}</b>: {count(dead)} of {count(len(evaluation['density']))} latents dead{middle}"
