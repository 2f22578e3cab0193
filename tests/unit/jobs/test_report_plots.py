"""The report's figures and numbers: right, and drawn from little or bad data without a word like nan in them."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from jobs.report.html import NONE, count, number, percent, text
from jobs.report.plots import Series, density_bins, heat_map, histogram, line_plot, log_ticks, ticks


class Balanced(HTMLParser):
    """Checks that what is opened is closed."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_line_plots_of_little_or_bad_data() -> None:
    def plot(*series: Series, log: bool = True) -> str:
        drawn = line_plot(series, x_label="step", y_label="FVU", log=log)
        Balanced(drawn)
        assert "nan" not in drawn
        assert "inf" not in drawn
        return drawn

    for log in (True, False):
        assert "No points yet" in plot(log=log)
        assert "No points yet" in plot(Series("a", []), Series("b", [(0, None), (1, math.nan)]), log=log)
        assert "<circle" in plot(Series("a", [(0, 0.5)]), log=log)
        assert "<polyline" in plot(Series("a", [(0, 0.0), (1, 0.0)]), log=log)
        broken = plot(Series('a"><b>', [(0, 1.0), (1, 2.0), (2, None), (3, math.inf), (4, 2.0), (5, 1.0)]), log=log)
        assert broken.count("<polyline") == 2


def test_histograms_of_little_or_bad_data() -> None:
    assert "No latent fired" in histogram([0, 0], [0.1, 0.5, 1.0], top=1, series=0, label="x")
    counts, edges = density_bins([0.0, 0.001, 0.00101, 0.5, 1.0, math.nan], 0.001)
    assert sum(counts) == 4
    assert counts[0] == 2
    assert counts[-1] == 1
    assert len(edges) == len(counts) + 1
    assert edges[0] == pytest.approx(0.001)
    assert edges[-1] == 1
    drawn = histogram(counts, edges, top=2, series=0, label="x")
    Balanced(drawn)
    assert drawn.count('class="bar') == sum(n > 0 for n in counts)
    for lowest in (0.0, 1.0, 1e-7):
        assert density_bins([lowest], lowest)[1][-1] == 1


@pytest.mark.parametrize("entries", [1, 2, 30])
def test_heat_maps(entries: int) -> None:
    values = np.linspace(-1, 1, entries**2).reshape(entries, entries)
    values[0, 0] = math.nan
    groups = ["a"] * (entries // 2) + ["<b>"] * (entries - entries // 2)
    drawn = heat_map(groups, [f"<i>{i}" * 5 for i in range(entries)], values.tolist(), label='"><b>')
    Balanced(drawn)
    assert drawn.count("<title>") == entries**2
    assert drawn.count('class="none"') == 1
    assert "nan" not in drawn
    assert "No entries" in heat_map([], [], [], label="x")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.21904, "0.219"),
        (32.0, "32.0"),
        (123.4, "123"),
        (-1.5, "\u22121.50"),
        (999.6, "1\u202f000"),
        (1234567.0, "1\u202f234\u202f567"),
        (0.000123, "0.000123"),
        (3.2e-5, "3.20\u202f\u00d7\u202f10⁻⁵"),
        (None, NONE),
        (math.nan, NONE),
        (math.inf, NONE),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_counts_and_shares() -> None:
    assert count(800_000) == "800\u202f000"
    assert percent(0.0437) == "4.37\u202f%"
    assert percent(None) == NONE
    assert text("a\tb\r\x9f<") == "a⇥b␍\ufffd&lt;"


def test_ticks() -> None:
    assert ticks(0, 975) == [0, 200, 400, 600, 800]
    assert ticks(0, 0.01, 5) == [0, 0.005, 0.01]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.15, 2.1) == [0.2, 0.5, 1, 2]
    assert log_ticks(1e-4, 10) == [1e-4, 1e-3, 1e-2, 0.1, 1, 10]
