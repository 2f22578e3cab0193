"""The table of a bench's cells: means over seeds with 95 % intervals, as Markdown, JSON and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, stdev

from pipeline.sdl.lrb_cells import ARMS, Cell, resolve
from storage.records import Record

ARM_COLOURS = {"plain": "#888", "anchored": "#2a7", "random": "#c73"}
FIGURES = (("decoder", "m_gt"), ("decoder", "m_ip"), ("decoder", "mcc"), ("encoder", "m_gt"), ("encoder", "m_ip"))
NAMES = {"m_gt": "M_GT", "m_ip": "M_IP", "mcc": "MCC"}


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


def differences(records: Sequence[Record], method: str, arm: str, side: str, figure: str) -> list[float]:
    """Arm minus plain, seed by seed."""
    of_arm = {r["seed"]: r[side][figure] for r in records if r["method"] == method and r["arm"] == arm}
    plain = {r["seed"]: r[side][figure] for r in records if r["method"] == method and r["arm"] == "plain"}
    return [of_arm[seed] - plain[seed] for seed in sorted(of_arm.keys() & plain.keys())]


def _markdown(example: Cell, records: Sequence[Record], methods: Sequence[str]) -> str:
    size, _ = resolve(example)
    bench = asdict(size.bench)
    lines = [
        "Recovery of the features that no arm was anchored to. M_GT: share of features whose largest |cosine| with a "
        "row is above 0.95, in %; M_IP: mean of those cosines; MCC: mean cosine after Hungarian matching. Means over "
        "seeds ± half a 95 % interval; a seed draws data, first weights and the order of samples.",
        "",
        "Data: " + ", ".join(f"{name} {value}" for name, value in bench.items()),
        "",
        "Training: "
        + ", ".join(f"{name} {value}" for name, value in asdict(size).items() if name != "bench")
        + "".join(f"; {name} = {value}" for name, value in example.changes),
        "",
        "| method | arm | seeds | "
        + " | ".join(f"{side} {NAMES[figure]}" for side, figure in FIGURES)
        + " | FVU | L0 | dead % | minutes |",
        "|---" * (3 + len(FIGURES) + 4) + "|",
    ]
    for method in methods:
        for arm in ARMS:
            found = [r for r in records if r["method"] == method and r["arm"] == arm]
            if found:
                cells = [_shown([r[side][figure] for r in found], figure) for side, figure in FIGURES]
                about = [f"{mean(r['fvu'] for r in found):.4f}", f"{mean(r['l0'] for r in found):.1f}"]
                about += [f"{100 * mean(r['dead'] for r in found):.1f}", f"{mean(r['minutes'] for r in found):.1f}"]
                lines.append(f"| {' | '.join([method, arm, str(len(found)), *cells, *about])} |")
    lines += [
        "",
        "Minus plain, seed by seed:",
        "",
        "| method | arm | decoder M_GT | decoder M_IP | better than plain |",
    ]
    lines.append("|---|---|---|---|---|")
    for method in methods:
        for arm in ("anchored", "random"):
            gains = {f: differences(records, method, arm, "decoder", f) for f in ("m_gt", "m_ip")}
            if gains["m_gt"]:
                shown = [_shown(gains[figure], figure, sign="+") for figure in ("m_gt", "m_ip")]
                lines.append(f"| {method} | {arm} | {' | '.join(shown)} | {_verdict(gains['m_gt'], gains['m_ip'])} |")
    return "\n".join(lines) + "\n"


def _verdict(m_gt: Sequence[float], m_ip: Sequence[float]) -> str:
    """yes or no where an interval leaves out zero, by M_GT, and where that says nothing by M_IP."""
    for values in (m_gt, m_ip):
        middle, half = interval(values)
        if half is not None and abs(middle) > half:
            return "yes" if middle > 0 else "no, worse"
    return "not told apart"


def _shown(values: Sequence[float], figure: str, sign: str = "") -> str:
    middle, half = interval(values)
    scale, digits = (100, 1) if figure == "m_gt" else (1, 3)
    return f"{scale * middle:{sign}.{digits}f}" + (f" ± {scale * half:.{digits}f}" if half is not None else "")


def _bars(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Decoder and encoder M_IP of each method and arm, with a whisker for the interval."""
    width, left, top, height, bar = 90 * len(methods) + 60, 40, 30, 160, 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * (height + 70)}" font-family="sans-serif" '
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
            for j, arm in enumerate(ARMS):
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
    for j, arm in enumerate(ARMS):
        x = width - 220 + 70 * j
        parts.append(f'<rect x="{x}" y="8" width="10" height="10" fill="{ARM_COLOURS[arm]}"/>')
        parts.append(f'<text x="{x + 14}" y="17">{arm}</text>')
    return "".join([*parts, "</svg>\n"])
