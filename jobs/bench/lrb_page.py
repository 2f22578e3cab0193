"""The table of a bench's cells: means over seeds with 95 % intervals, as Markdown, JSON and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean, stdev
from textwrap import wrap

from pipeline.lrb.methods import ARMS, TRUTH, Cell, described, resolve
from storage.format.records import Record

ARM_COLOURS = {"plain": "#888", "anchored": "#2a7", "random": "#c73", TRUTH: "#36c"}
FIGURES = tuple((side, figure) for side in ("decoder", "encoder") for figure in ("m_gt", "m_ip", "mcc"))
COMPARED = (("anchored", "plain"), ("anchored", "random"), ("random", "plain"))
NAMES = {"m_gt": "M_GT", "m_ip": "M_IP", "mcc": "MCC"}
SPURIOUS = {1: "yes", 0: "not told apart", -1: "no, below"}
"""By the sign of a minimum's loss less that of the one from the truth."""
ABSORPTION = ("absorption", "absorption_of_anchored")
NO_SPREAD = 1e-6
"""What float32 means of equal values differ by."""
OTHERS = (  # title, name in the record, factor, format
    ("loss", "loss", 1, ".4f"),
    ("FVU", "fvu", 1, ".4f"),
    ("L0", "l0", 1, ".1f"),
    ("dead %", "dead", 100, ".1f"),
    ("polysemantic %", "polysemantic", 100, ".1f"),
    ("unserved %", "unserved", 100, ".1f"),
    ("minutes", "minutes", 1, ".2f"),
)


def page(example: Cell, records: Sequence[Record]) -> dict[str, str]:
    """The files of the table: lrb.md, lrb.json, lrb.svg."""
    methods = list(dict.fromkeys(r["method"] for r in records))
    return {
        "lrb.md": _markdown(example, records, methods),
        "lrb.json": json.dumps(records, indent=1) + "\n",
        "lrb.svg": _bars(records, methods),
    }


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95 % interval (Student's t); None of fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return mean(values), None
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def differences(
    records: Sequence[Record], method: str, arm: str, base: str, side: str | None, figure: str
) -> list[float]:
    """Arm minus base, seed by seed, of the seeds that both have; of the decoder's or encoder's figure, or another."""
    of_arm, of_base = (
        {r["seed"]: (r if side is None else r[side])[figure] for r in records if (r["method"], r["arm"]) == (method, a)}
        for a in (arm, base)
    )
    return [of_arm[seed] - of_base[seed] for seed in sorted(of_arm.keys() & of_base.keys())]


def _markdown(example: Cell, records: Sequence[Record], methods: Sequence[str]) -> str:
    size, of_example = resolve(example)
    bench = {n: v for n, v in asdict(size.bench).items() if n != "seed" and v is not None}
    training = {n: v for n, v in asdict(size).items() if n != "bench"}
    training["steps"] = round(size.steps / of_example.effort)
    longer = {m: how.effort for m in methods if (how := resolve(replace(example, method=m))[1]).effort != 1}
    taking = "".join(f" {m} takes {effort:g} times the steps." for m, effort in longer.items())
    changed = ", ".join(f"{name} = {value}" for name, value in example.changes)
    lines = [
        "# The Linear Representation Bench",
        "",
        *_wrapped(
            f"Recovery of the {size.bench.features - size.anchors} features of {size.bench.features} that no arm was "
            f"anchored to: plain; anchored to the first {size.anchors} features; anchored to as many random directions."
        ),
        "",
        "- M_GT: share of features whose largest |cosine| with a row is above 0.95, in %.",
        "- M_IP: mean of those cosines. MCC: mean cosine where each feature has a row of its own (Hungarian matching).",
        "- Loss, FVU, L0, dead: of the last batch; dead latents were silent for 2 % of the training.",
        "- Polysemantic: latents with several features, of those with any. Unserved: features that no latent answers.",
        "- Means over seeds ± half a 95 % interval (Student's t); a seed draws data, first weights, order of samples.",
        "",
        *_wrapped("Data: " + ", ".join(f"{name} {value}" for name, value in bench.items()) + "."),
        "",
        *_wrapped("Training: " + ", ".join(f"{name} {value}" for name, value in training.items()) + "." + taking),
        "",
        *(line for m in methods for line in _wrapped(f"- {m}: {described(resolve(replace(example, method=m))[1])}")),
        *(["", *_wrapped(f"Set otherwise than the size has it: {changed}.")] if changed else []),
        *(["", *_wrapped(_machines(records))] if records else []),
        "",
        "![mean largest cosine of each method and arm](lrb.svg)",
        "",
        "| method | arm | seeds | "
        + " | ".join(f"{side} {NAMES[figure]}" for side, figure in FIGURES)
        + f" | {' | '.join(title for title, *_ in OTHERS)} |",
        "|---|---|" + "--:|" * (1 + len(FIGURES) + len(OTHERS)),
    ]
    for method in methods:
        for arm in ARM_COLOURS:
            found = [r for r in records if r["method"] == method and r["arm"] == arm]
            if found:
                cells = [shown([r[side][figure] for r in found], figure) for side, figure in FIGURES]
                others = [f"{times * mean(r[name] for r in found):{form}}" for _, name, times, form in OTHERS]
                lines.append(f"| {' | '.join([method, arm, str(len(found)), *cells, *others])} |")
    lines += ["", *_compared(records, methods)]
    if any(r["arm"] == TRUTH for r in records):
        lines += ["", *_minima(records, methods)]
    if any(group in r for r in records for group in ABSORPTION):
        lines += ["", *_absorption(records, methods)]
    return "\n".join(lines) + "\n"


def _compared(records: Sequence[Record], methods: Sequence[str]) -> list[str]:
    """The table of differences between arms."""
    lines = [
        *_wrapped(
            "One arm minus another, seed by seed, of decoder columns. It is better where the interval of M_GT leaves "
            "out zero, or, where that says nothing, the interval of M_IP; that takes three seeds or more."
        ),
        "",
        "| method | arm | minus | M_GT | M_IP | better |",
        "|---|---|---|--:|--:|---|",
    ]
    for method in methods:
        for arm, base in COMPARED:
            gains = {f: differences(records, method, arm, base, "decoder", f) for f in ("m_gt", "m_ip")}
            if gains["m_gt"]:
                gained = [shown(gains[figure], figure, sign="+") for figure in ("m_gt", "m_ip")]
                cells = [method, arm, base, *gained, verdict(gains["m_gt"], gains["m_ip"])]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _minima(records: Sequence[Record], methods: Sequence[str]) -> list[str]:
    """The table of plain minima beside those that are found from the truth."""
    lines = [
        *_wrapped(
            "Minima: the loss, on the same last batch, of runs from random weights less that of runs that begin with "
            "all true features as their first latents (Theorem 3.2) and are anchored to none. Spurious: above, by the "
            "interval."
        ),
        "",
        "| method | loss | from the truth | difference | spurious |",
        "|---|--:|--:|--:|---|",
    ]
    for method in methods:
        if more := differences(records, method, "plain", TRUTH, None, "loss"):
            losses = [
                f"{mean(r['loss'] for r in records if (r['method'], r['arm']) == (method, arm)):.4f}"
                for arm in ("plain", TRUTH)
            ]
            lines.append(
                f"| {' | '.join([method, *losses, shown(more, 'loss', sign='+'), SPURIOUS[told_apart(more)]])} |"
            )
    return lines


def _absorption(records: Sequence[Record], methods: Sequence[str]) -> list[str]:
    """The table of absorption, of data with parents and children."""
    lines = [
        *_wrapped(
            "Absorption: share of samples on which a parent is active and its own latent is not, in %: where no child "
            "is active, where one is, and the difference, which is what children absorb; leaning: how much nearer "
            "(cosine) the decoders of the children's latents are to the parent than the children themselves are. Of "
            "parents that the anchored arm is anchored to, and of the others."
        ),
        "",
        "| method | arm | others: alone | with a child | absorbed | leaning | anchored ones: alone | with a child | "
        "absorbed | leaning |",
        "|---|---|" + "--:|" * 8,
    ]
    for method in methods:
        for arm in ARM_COLOURS:
            found = [r for r in records if r["method"] == method and r["arm"] == arm]
            if not found:
                continue
            cells = [
                shown(values, form) if (values := defined(found, group, figure)) else ""
                for group in ABSORPTION
                for figure, form in (("alone", "m_gt"), ("with_child", "m_gt"), ("rate", "m_gt"), ("leaning", "m_ip"))
            ]
            lines.append(f"| {' | '.join([method, arm, *cells])} |")
    return lines


def defined(records: Sequence[Record], group: str, figure: str) -> list[float]:
    """A figure of absorption, of the records that have it: there may be no parents of the group, or no such samples."""
    return [value for r in records if (value := r.get(group, {}).get(figure)) is not None]


def _wrapped(text: str) -> list[str]:
    return wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _machines(records: Sequence[Record]) -> str:
    """Where the cells were run, and for how long."""
    machines = [found for r in records if (found := r.get("machine"))]
    on = dict.fromkeys(f"{m['cpu']}, {m['cores']} cores, CPU threads of a cell: {m['threads']}" for m in machines)
    return f"Machine: {'; '.join(on) or 'not known'}. {sum(r['minutes'] for r in records):.1f} minutes of cells in all."


def verdict(m_gt: Sequence[float], m_ip: Sequence[float]) -> str:
    """yes or no where an interval leaves out zero, by M_GT, and where that says nothing by M_IP; and which it was."""
    for figure, values in (("M_GT", m_gt), ("M_IP", m_ip)):
        if (sign := told_apart(values)) != 0:
            return f"{'yes' if sign > 0 else 'no, worse'} ({figure})"
    return "not told apart"


def told_apart(values: Sequence[float]) -> int:
    """1 or -1 where the interval of three values or more leaves out zero, else 0.

    Values without any spread, as shares of few features may be, have no interval: they say nothing."""
    middle, half = interval(values)
    if len(values) < 3 or half is None or half < NO_SPREAD or abs(middle) <= half:
        return 0
    return 1 if middle > 0 else -1


def shown(values: Sequence[float], figure: str, sign: str = "") -> str:
    middle, half = interval(values)
    scale, digits = {"m_gt": (100, 1), "loss": (1, 4)}.get(figure, (1, 3))
    text = f"{round(scale * middle, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no -0.000
    return text if half is None else f"{text} ± {scale * half:.{digits}f}"


def _bars(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Decoder and encoder M_IP of each method and arm, with a whisker for the interval."""
    arms = [arm for arm in ARM_COLOURS if arm in ARMS or any(r["arm"] == arm for r in records)]
    width, left, top, height = max(90 * len(methods) + 60, 300, 90 * len(arms) + 60), 40, 54, 160
    bar = 60 // len(arms)
    tall_page = 2 * (height + 70) + top - 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall_page}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for panel, side in enumerate(("decoder", "encoder")):
        base = top + height + panel * (height + 70)
        parts.append(f'<text x="{left}" y="{base - height - 10}">mean largest cosine, {side} (M_IP)</text>')
        for tick in (0, 0.25, 0.5, 0.75, 1):
            y = base - height * tick
            parts.append(f'<path d="M{left} {y}H{width - 10}" stroke="#ddd"/><text x="8" y="{y + 4}">{tick:g}</text>')
        for i, method in enumerate(methods):
            x = left + 10 + 90 * i
            parts.append(f'<text x="{x}" y="{base + 14}">{method}</text>')
            for j, arm in enumerate(arms):
                values = [r[side]["m_ip"] for r in records if r["method"] == method and r["arm"] == arm]
                if values:
                    middle, half = interval(values)
                    tall, x_bar = height * middle, x + j * (bar + 4)
                    parts.append(
                        f'<rect x="{x_bar}" y="{base - tall:.1f}" width="{bar}" height="{tall:.1f}" '
                        f'fill="{ARM_COLOURS[arm]}"><title>{method}, {arm}: {middle:.3f}</title></rect>'
                    )
                    if half:
                        low, high = base - height * (middle - half), base - height * (middle + half)
                        centre = x_bar + bar / 2
                        parts.append(f'<path d="M{centre} {low:.1f}V{high:.1f}" stroke="#000"/>')
    for j, arm in enumerate(arms):
        x = left + 90 * j
        parts.append(f'<rect x="{x}" y="8" width="10" height="10" fill="{ARM_COLOURS[arm]}"/>')
        parts.append(f'<text x="{x + 14}" y="17">{arm}</text>')
    return "".join([*parts, "</svg>\n"])
