"""The figure of benchmarks.frontier: a panel for each kind, and one of all of ours, in one SVG file."""

from typing import Any

import numpy as np

from benchmarks.frontier.cells import DICTIONARY_LEARNING, KINDS, OURS, SAELENS
from benchmarks.frontier.comparison import best_at, frontier
from jobs.report.plots import WIDTH, Series, line_plot

PANEL_HEIGHT, TITLE, COLUMNS = 280, 46, 2
COLOURS = ("#b5660b", "#1f5f99", "#2c7a4b", "#8a3d86", "#5c564c", "#b03a3a")
DASHES = ("none", "7 4", "2 3", "9 3 2 3", "4 2", "1 2")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24211c}.label{fill:#6b655b}.title{font-weight:600;font-size:14px}"
    ".grid{stroke:#e2ddd3}.axis{stroke:#6b655b}polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
    + "".join(f".s{i}{{stroke:{c}}}circle.s{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    + "".join(f".d{i}{{stroke-dasharray:{d}}}" for i, d in enumerate(DASHES))
)
LARGEST_L0 = 130
LIBRARIES = (OURS, SAELENS, DICTIONARY_LEARNING)


def draw(results: list[dict[str, Any]]) -> str:
    """The SVG file's text."""
    panels = [(kind, _of_kind(results, kind)) for kind in KINDS]
    panels.append(("ours, all kinds", [_series(kind, results, kind, OURS) for kind in KINDS]))
    parts = []
    for number, (title, series) in enumerate(panels):
        x, y = number % COLUMNS * (WIDTH + 30) + 10, number // COLUMNS * (PANEL_HEIGHT + TITLE + 30) + 10
        plot = line_plot(series, x_label="L0", y_label="FVU (log)", log=True)
        parts.append(f'<text class="title" x="{x}" y="{y + 14}">{title}</text>{_legend(series, x, y + 34)}')
        parts.append(plot.replace("<svg ", f'<svg x="{x}" y="{y + TITLE}" width="{WIDTH}" height="{PANEL_HEIGHT}" ', 1))
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + 30) + 10, rows * (PANEL_HEIGHT + TITLE + 30) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _of_kind(results: list[dict[str, Any]], kind: str) -> list[Series]:
    return [_series(library, results, kind, library) for library in LIBRARIES]


def _series(name: str, results: list[dict[str, Any]], kind: str, library: str) -> Series:
    """The best of a library's rates at each L0, without what is not sparse at all, which would leave no room."""
    reached = [r["l0"] for r in frontier(results, library, kind) if 0 < r["l0"] <= LARGEST_L0]
    if not reached:
        return Series(name, [])
    grid = sorted({*reached, *map(float, np.geomspace(min(reached), max(reached), 60))})
    return Series(name, [(l0, fvu) for l0 in grid if (fvu := best_at(l0, results, library, kind)) is not None])


def _legend(series: list[Series], x: float, y: float) -> str:
    parts = []
    for i, one in enumerate(series):
        if one.points:
            parts.append(f'<polyline class="s{i} d{i}" points="{x},{y - 4} {x + 18},{y - 4}"/>')
            parts.append(f'<text x="{x + 22}" y="{y}" style="font-size:9px">{one.name}</text>')
            x += 30 + 5 * len(one.name)
    return "".join(parts)
