"""Figures as SVG text: lines over steps, histograms, heat maps. Values in, markup out; nothing is read here.

Colours are classes and opacities that report.css resolves, so that one drawing serves light and dark pages. Data may be
empty, a single point, None or not finite: what cannot be drawn is left out, never an error. `xmlns` is left out too, as
HTML does not need it and the page then holds no address at all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from jobs.report.html import MINUS, THIN, count, decimals, percent, text

STYLES = 6
"""Colours, and dashes, that report.css has."""
WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 44
Tick = tuple[float, str]


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order of x. A y that is None or not finite breaks the line."""

    name: str
    points: Sequence[tuple[float, float | None]]

    def segments(self) -> list[list[tuple[float, float]]]:
        parts: list[list[tuple[float, float]]] = [[]]
        for x, y in self.points:
            if y is None or not math.isfinite(y):
                parts.append([])
            else:
                parts[-1].append((x, y))
        return [part for part in parts if part]


@dataclass(frozen=True)
class Axis:
    """A range of values laid onto a range of pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.stop - self.start), 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in [low, high], 1, 2 or 5 times a power of ten apart; at most about `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in [low, high]; the powers alone when there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [v for v in fine if low <= v <= high]
    return inside if len(inside) <= 7 else [10.0**p for p in powers if low <= 10.0**p <= high]


def percent_tick(share: float) -> str:
    """'0.1 %', with no more digits than the value has."""
    return f"{100 * share:g}{THIN}%"


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    least_top: float = 0.0,
    y_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Lines over a common x axis that begins at 0. `log` asks for a logarithmic y axis, taken if all values allow it.

    A linear y axis begins at 0 and reaches at least `least_top`.
    """
    height = 280
    drawn = [one.segments() for one in series]
    points = [point for parts in drawn for part in parts for point in part]
    if not points:
        return _empty("No points yet", y_label)
    x_high = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    log = log and low > 0
    x = Axis(0, x_high, LEFT, WIDTH - RIGHT)
    y = (
        Axis(low / 1.08, high * 1.08, height - BOTTOM, TOP, log=True)
        if log
        else Axis(min(0.0, low), max(high, least_top, 1e-9) * 1.04, height - BOTTOM, TOP)
    )
    marks = log_ticks(y.low, y.high) if log else []
    y_ticks = [(v, y_text(v)) for v in (marks if len(marks) > 1 else ticks(y.low, y.high, 5))]
    parts = [_axes(x, y, [(v, count(round(v))) for v in ticks(0, x_high)], y_ticks, x_label, y_label)]
    for i, segments in enumerate(drawn):
        for segment in segments:
            if len(segment) == 1:
                (px, py) = segment[0]
                parts.append(f'<circle class="{_style(i)}" cx="{x(px)}" cy="{y(py)}" r="3"/>')
            else:
                path = " ".join(f"{x(px):g},{y(py):g}" for px, py in segment)
                parts.append(f'<polyline class="{_style(i)}" points="{path}"/>')
    return _svg(WIDTH, height, f"{y_label} over {x_label}: {', '.join(s.name for s in series)}", parts)


def legend(names: Sequence[str]) -> str:
    """The line styles of a plot with their names."""
    items = "".join(
        '<li><svg class="key" viewBox="0 0 28 8" aria-hidden="true">'
        f'<polyline class="{_style(i)}" points="0,4 28,4"/></svg>{text(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


BINS_PER_DECADE = 8


def density_bins(densities: Sequence[float], lowest: float) -> tuple[list[int], list[float]]:
    """Counts of latents in equal bins of log10 density from the decade of `lowest` up to 1, and the bins' edges
    [bins + 1]. Latents that never fire (0) are in no bin."""
    decades = max(1, math.ceil(-math.log10(lowest) - 1e-9)) if 0 < lowest < 1 else 1
    bins = decades * BINS_PER_DECADE
    counts = [0] * bins
    for density in densities:
        if density > 0 and math.isfinite(density):
            place = math.floor((math.log10(density) + decades) * BINS_PER_DECADE)
            counts[min(max(place, 0), bins - 1)] += 1
    return counts, [10 ** (i / BINS_PER_DECADE - decades) for i in range(bins + 1)]


def histogram(counts: Sequence[int], edges: Sequence[float], *, top: float, series: int, label: str) -> str:
    """Bars of latents over density on a log axis. `top` is the count the y axis reaches, so that panels compare."""
    height = 220
    if not any(counts):
        return _empty("No latent fired", label)
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, log=True)
    y = Axis(0, top * 1.04, height - BOTTOM, TOP)
    decades = [10.0**p for p in range(round(math.log10(edges[0])), 1)]
    x_ticks = [(v, percent_tick(v)) for v in decades]
    parts = [
        _axes(x, y, x_ticks, [(v, count(round(v))) for v in ticks(0, top, 4) if v == round(v)], "density", "latents")
    ]
    for n, low, high in zip(counts, edges, edges[1:], strict=False):
        if n:
            left, bar = x(low), max(x(high) - x(low) - 1, 1)
            parts.append(
                f'<rect class="bar {_style(series)}" x="{left}" y="{y(n)}" width="{bar:.1f}" '
                f'height="{y(0) - y(n):.1f}"><title>{percent(low)} to {percent(high)}: {count(n)}</title></rect>'
            )
    return _svg(WIDTH, height, label, parts)


CELL = 24
LABEL_LETTERS = 22


def heat_map(groups: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]], *, label: str) -> str:
    """A square matrix of values in [-1, 1]; entry i is called `names[i]`, and a gap is left where `groups` changes.

    Zero has the page's own colour; the sign gives the hue and the size its strength. What is not finite is hatched.
    """
    if not names:
        return _empty("No entries", label)
    several = len(set(groups)) > 1
    gaps = [0, *accumulate(int(a != b) for a, b in pairwise(groups))]
    at = [i * CELL + 8 * gap for i, gap in enumerate(gaps)]
    short = [name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1] + "…" for name in names]
    prefix = [f"{g} " if several and (i == 0 or g != groups[i - 1]) else "" for i, g in enumerate(groups)]
    margin = 14 + 6.8 * max(len(p + s) for p, s in zip(prefix, short, strict=True))
    top = 14 + 6.8 * max(map(len, short))
    full = [f"{g} = {n}" for g, n in zip(groups, names, strict=True)]
    parts = []
    for i, name in enumerate(short):
        middle = at[i] + CELL / 2
        shown = (f'<tspan class="muted">{text(prefix[i])}</tspan>' if prefix[i] else "") + text(name)
        parts.append(f'<text x="{margin - 8:.0f}" y="{top + middle + 4:.0f}" text-anchor="end">{shown}</text>')
        place = f"{margin + middle + 4:.0f} {top - 8:.0f}"
        parts.append(f'<text transform="translate({place}) rotate(-90)">{text(name)}</text>')
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            title = f"<title>{text(full[i])}, {text(full[j])}: {decimals(value)}</title>"
            parts.append(f"{_cell(value, margin + at[j], top + at[i])}{title}</rect>")
    size = at[-1] + CELL
    return _svg(margin + size + 2, top + size + 2, label, parts, "heat")


def heat_legend() -> str:
    """The colours of a heat map from -1 to 1."""
    shades = [i / 10 for i in range(-10, 11)]
    parts = [f"{_cell(v, 4 + i * 12, 2, 12)}</rect>" for i, v in enumerate(shades)]
    parts += [
        f'<text x="{4 + (10 + 10 * v) * 12 + 6:.0f}" y="28" text-anchor="middle">{name}</text>'
        for v, name in ((-0.92, f"{MINUS}1"), (-0.5, f"{MINUS}0.5"), (0, "0"), (0.5, "0.5"), (0.96, "1"))
    ]
    return _svg(8 + 12 * len(shades), 34, "colours from -1 (left) over 0 (middle) to 1 (right)", parts, "scale")


def _cell(value: float, x: float, y: float, size: int = CELL) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" width="{size - 1}" height="{size - 1}"'
    if not math.isfinite(value):
        return f'<rect class="none" {place}>'
    strength = min(abs(value), 1.0)
    return f'<rect class="{"pos" if value >= 0 else "neg"}" {place} fill-opacity="{strength:.2f}">'


def _axes(x: Axis, y: Axis, x_ticks: Sequence[Tick], y_ticks: Sequence[Tick], x_label: str, y_label: str) -> str:
    parts = []
    for value, name in y_ticks:
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.stop}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{x.start - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{name}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.stop}" y1="{y.start}" y2="{y.start}"/>')
    for value, name in x_ticks:
        anchor = "end" if x(value) > x.stop - 16 else "middle"
        at = min(x(value) + 4, x.stop + 4) if anchor == "end" else x(value)
        parts.append(f'<line class="axis" x1="{x(value)}" x2="{x(value)}" y1="{y.start}" y2="{y.start + 4}"/>')
        parts.append(f'<text x="{at}" y="{y.start + 18}" text-anchor="{anchor}">{name}</text>')
    parts.append(f'<text class="label" x="{x.stop}" y="{y.start + 37}" text-anchor="end">{text(x_label)}</text>')
    parts.append(f'<text class="label" x="2" y="14">{text(y_label)}</text>')
    return "".join(parts)


def _style(series: int) -> str:
    """The classes of a series: its colour, and a dash, so that 36 lines differ and colour alone never decides."""
    return f"s{series % STYLES} d{(series + series // STYLES) % STYLES}"


def _empty(sentence: str, label: str) -> str:
    return _svg(WIDTH, 80, label, [f'<text x="{WIDTH / 2}" y="44" text-anchor="middle">{sentence}</text>'])


def _svg(width: float, height: float, label: str, parts: Sequence[str], kind: str = "plot") -> str:
    size = f' style="--w:{width:.0f}px"' if kind != "plot" else ""
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}"{size}>'
        f"{''.join(parts)}</svg>"
    )
