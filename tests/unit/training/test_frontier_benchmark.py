"""The arithmetic of benchmarks.frontier: its FVU is the evaluator's, and peers are compared at their own L0."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from benchmarks.dictionary_steps.synthetic_rows import sparse_rows
from benchmarks.frontier.__main__ import figures
from benchmarks.frontier.cells import OURS, SAELENS, Cell, all_cells, train_ours
from benchmarks.frontier.comparison import beside, compare, frontier, fvu_at
from benchmarks.frontier.plot import draw
from pipeline.sdl.measure.metrics import measure_code


def result(library: str, l0: float, fvu: float, rate: float = 1e-3) -> dict[str, object]:
    name = f"{library} {l0}" if rate == 1e-3 else f"{library} {l0} {rate:g}"
    return {"name": name, "library": library, "kind": "topk", "settings": {"lr": rate}, "l0": l0, "fvu": fvu}


def test_figures_are_those_of_measure_code() -> None:
    rows = sparse_rows(8192, 16, 0)
    cell = Cell(OURS, "batch_topk", "batch_topk", {"k": 4}, 1e-3)
    dictionary = train_ours(cell, rows.numpy(), rows[:1000], 3, 0).dictionary
    x = sparse_rows(500, 16, 1)
    code = dictionary.encode(x)
    found = figures(cell, x, dictionary.decode(code), (code != 0).sum(0).tolist(), {}, 0.0)
    expected, _ = measure_code(dictionary, [(x, x)])
    assert found["fvu"] == pytest.approx(expected.fvu, rel=1e-6)
    assert found["l0"] == pytest.approx(expected.l0)
    assert found["dead_share"] == pytest.approx(expected.dead_share)


def test_ours_at_a_peers_l0() -> None:
    points = [(8.0, 0.4), (32.0, 0.2)]
    assert fvu_at(16.0, points) == pytest.approx(0.3)
    assert fvu_at(4.0, points) is None
    assert fvu_at(8.0 * 0.99, points) == pytest.approx(0.4)
    results = [result(OURS, 8, 0.4), result(OURS, 32, 0.2), result(SAELENS, 16, 0.35), result(SAELENS, 64, 0.1)]
    assert compare(results) == {"SAELens 16": (pytest.approx(0.05), pytest.approx(0.05)), "SAELens 64": (None, None)}


def test_peers_beside_ours() -> None:
    ours = [result(OURS, 8, 0.4), result(OURS, 32, 0.2)]
    lines = beside([*ours, result(SAELENS, 16, 0.35), result(SAELENS, 24, 0.21), result(SAELENS, 64, 0.1)]).splitlines()
    assert lines[0] == "| kind | L0: SAELens, ours |"
    assert "| topk | 16.0: 0.3500, 0.3000; **24.0: 0.2100, 0.2415**; 64.0: 0.1000, - |" in lines


def test_a_frontier_is_the_best_of_all_rates() -> None:
    ours = [result(OURS, 8, 0.4), result(OURS, 32, 0.2), result(OURS, 8, 0.35, 1e-2), result(OURS, 32, 0.25, 1e-2)]
    peers = [result(SAELENS, 8, 0.38), result(SAELENS, 16, 0.41, 1e-2), result(SAELENS, 32, 0.21)]
    assert [r["fvu"] for r in frontier(peers, SAELENS, "topk")] == [
        0.38,
        0.21,
    ]  # fewer latents, lower FVU: 16 is not on it
    assert {name: same for name, (same, _) in compare(ours + peers).items()} == {
        "SAELens 8": pytest.approx(0.03),
        "SAELens 32": pytest.approx(0.01),
    }


def test_the_plot_is_xml_that_stands_alone() -> None:
    drawn = draw([result(OURS, 8, 0.4), result(OURS, 32, 0.2), result(SAELENS, 16, 0.35)])
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_every_cell_has_a_name_of_its_own() -> None:
    names = [cell.name for cell in all_cells(own_rates=True)]
    assert len(names) == len(set(names))


def test_rows_are_normalised() -> None:
    x = sparse_rows(20_000, 64, 3)
    assert x.square().sum(1).mean().item() == pytest.approx(64, rel=0.05)
    assert torch.equal(x[:100], sparse_rows(20_000, 64, 3)[:100])
    assert np.isfinite(x.numpy()).all()
