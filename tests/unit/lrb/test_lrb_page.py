"""The page of the bench: intervals and verdicts against hand values, and a table that can be read."""

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.bench.lrb import cells_of
from jobs.bench.lrb_page import differences, interval, page
from jobs.bench.lrb_page import verdict as verdict_of
from pipeline.errors import InputError
from pipeline.lrb.methods import ARMS, TRUTH, Cell, small


def record(method: str, arm: str, seed: int, m_gt: float, m_ip: float) -> dict[str, Any]:
    scores = {"m_gt": m_gt, "m_ip": m_ip, "mcc": m_ip / 2}
    return {
        "method": method,
        "arm": arm,
        "seed": seed,
        "decoder": scores,
        "encoder": {**scores, "m_ip": 0.5},
        "fvu": 0.125,
        "l0": 10.0,
        "loss": 0.0625 * (2 if arm == "plain" else 1) + 0.001 * seed * (arm == TRUTH),
        "dead": 0.25,
        "polysemantic": 0.05,
        "unserved": 0.01,
        "minutes": 1.5,
        "machine": {"cpu": "a processor", "cores": 2, "threads": 1},
    }


# ---- intervals


@pytest.mark.parametrize(
    ("values", "middle", "half"),
    [
        # Student's t at 97.5 %: 12.706 with one degree of freedom, 4.303 with two, 2.776 with four
        ([1.0, 3.0], 2.0, 12.7062 * 2**0.5 / 2**0.5),
        ([1.0, 2.0, 3.0], 2.0, 4.30265 * 1 / 3**0.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 2.77645 * 2.5**0.5 / 5**0.5),
        ([0.5, 0.5, 0.5], 0.5, 0.0),
    ],
)
def test_the_interval_is_students(values: list[float], middle: float, half: float) -> None:
    assert interval(values) == pytest.approx((middle, half), rel=1e-5)


def test_one_value_has_no_interval() -> None:
    assert interval([0.25]) == (0.25, None)


@pytest.mark.parametrize(
    ("m_gt", "m_ip", "verdict"),
    [
        ([0.1, 0.12, 0.11], [0.0, 0.1, -0.1], "yes (M_GT)"),
        ([-0.1, -0.12, -0.11], [0.2, 0.21, 0.2], "no, worse (M_GT)"),  # the share of features decides
        ([0.0, 0.0, 0.0], [0.01, 0.011, 0.012], "yes (M_IP)"),
        ([0.1, -0.1, 0.0], [-0.01, -0.011, -0.012], "no, worse (M_IP)"),
        ([0.1, -0.1, 0.0], [0.1, -0.1, 0.0], "not told apart"),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "not told apart"),
        ([0.002, 0.002, 0.002], [0.1, -0.1, 0.0], "not told apart"),  # one feature of 500, three times: no spread
        # One of 450, as float32 means have it.
        ([4.41 / 4.5 - 4.4 / 4.5, 0.98 - 4.4 / 4.5 + 6e-8, 0.00222224], [0.1, -0.1, 0.0], "not told apart"),
        ([0.1, 0.11], [0.1, 0.11], "not told apart"),  # two seeds
        ([0.5], [0.5], "not told apart"),
    ],
)
def test_the_verdict(m_gt: list[float], m_ip: list[float], verdict: str) -> None:
    assert verdict_of(m_gt, m_ip) == verdict


def test_differences_are_of_the_same_seed() -> None:
    records = [record("topk", "plain", seed, 0.1 * seed, 0.5) for seed in (0, 1, 2)]
    records += [record("topk", "anchored", seed, 0.1 * seed + 0.05, 0.5) for seed in (2, 1, 5)]
    records += [record("relu", "anchored", 0, 0.9, 0.9)]
    assert differences(records, "topk", "anchored", "plain", "decoder", "m_gt") == pytest.approx([0.05, 0.05])
    assert differences(records, "relu", "anchored", "plain", "decoder", "m_gt") == []


# ---- the page


def of_some() -> dict[str, str]:
    records = [
        record(
            method, arm, seed, (0.9 if arm == "anchored" else 0.6) + 0.01 * seed * (2 if arm == "random" else 1), 0.9
        )
        for method in ("topk", "relu")
        for arm in ARMS
        for seed in (0, 1, 2)
    ]
    return page(Cell(small(), "topk", "plain", 0, (("k", 12), ("noise", 0.05))), records)


def test_the_table_says_what_was_measured() -> None:
    text = of_some()["lrb.md"]
    lines = text.splitlines()
    assert (
        "| topk | anchored | 3 | 91.0 ± 2.5 | 0.900 ± 0.000 | 0.450 ± 0.000 | 91.0 ± 2.5 | 0.500 ± 0.000 | "
        "0.450 ± 0.000 | 0.0625 | 0.1250 | 10.0 | 25.0 | 5.0 | 1.0 | 1.50 |" in text
    )
    assert "| topk | anchored | plain | +30.0 ± 0.0 | +0.000 ± 0.000 | not told apart |" in lines  # without any spread
    assert "| topk | anchored | random | +29.0 ± 2.5 | +0.000 ± 0.000 | yes (M_GT) |" in lines
    assert "| relu | random | plain | +1.0 ± 2.5 | +0.000 ± 0.000 | not told apart |" in lines
    assert "Set otherwise than the size has it: k = 12, noise = 0.05." in lines
    assert "Machine: a processor, 2 cores, CPU threads of a cell: 1. 27.0 minutes of cells in all." in lines
    assert "k 12" in text
    assert "noise 0.05" in text
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


def test_recipes_are_printed() -> None:
    lines = of_some()["lrb.md"].splitlines()
    assert "- topk: topk, k 12" in lines
    assert "- relu: relu, l1 2, encoder_scale 0.384" in lines


def test_minima_stand_beside_those_from_the_truth() -> None:
    cells = [(arm, seed) for arm in ("plain", TRUTH) for seed in (0, 1, 2)]
    files = page(Cell(small(), "topk", "plain", 0), [record("topk", arm, seed, 0.5, 0.9) for arm, seed in cells])
    assert "| topk | 0.1250 | 0.0635 | +0.0615 ± 0.0025 | yes |" in files["lrb.md"].splitlines()
    root = ElementTree.fromstring(files["lrb.svg"])
    assert TRUTH in [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Minima" not in of_some()["lrb.md"]


def test_absorption_of_given_parents_and_of_others() -> None:
    families = {"absorption": {"alone": 0.1, "with_child": 0.4, "rate": 0.3, "leaning": 0.25}}
    records = [record("topk", arm, seed, 0.5, 0.9) | families for arm in ("plain", "random") for seed in (0, 1)]
    text = page(Cell(small(), "topk", "plain", 0), records)["lrb.md"]
    line = "| topk | random | 10.0 ± 0.0 | 40.0 ± 0.0 | 30.0 ± 0.0 | 0.250 ± 0.000 |  |  |  |  |"
    assert line in text.splitlines()


def test_absorption_where_all_parents_are_given_or_a_figure_is_not_defined() -> None:
    given = {"alone": None, "with_child": 0.4, "rate": None, "leaning": 0.25}
    records = [record("topk", "plain", seed, 0.5, 0.9) | {"absorption_of_anchored": given} for seed in (0, 1)]
    text = page(Cell(small(), "topk", "plain", 0), records)["lrb.md"]
    assert "| topk | plain |  |  |  |  |  | 40.0 ± 0.0 |  | 0.250 ± 0.000 |" in text.splitlines()


def test_every_table_is_well_formed() -> None:
    tables = [line for line in of_some()["lrb.md"].splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    assert set(widths[: widths.index(7)]) == {17}
    assert set(widths[widths.index(7) :]) == {7}


def test_the_json_has_every_record() -> None:
    (first, *others) = json.loads(of_some()["lrb.json"])
    assert len(others) == 17
    assert first["decoder"]["m_gt"] == 0.6


def test_the_picture_shows_every_arm_within_its_frame() -> None:
    root = ElementTree.fromstring(of_some()["lrb.svg"])
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    names = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"topk", "relu", *ARMS} <= set(names)
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "relu, anchored: 0.900" in titles
    assert len(titles) == 2 * 2 * 3
    for each in root.iter():
        if "x" in each.attrib:
            assert 0 <= float(each.attrib["x"]) <= width
            assert 0 <= float(each.attrib["y"]) <= height


def test_one_cell_is_a_page_too() -> None:
    files = page(Cell(small(), "topk", "plain", 0), [record("topk", "plain", 0, 0.5, 0.9)])
    assert "| topk | plain | 1 | 50.0 | 0.900 |" in files["lrb.md"]
    ElementTree.fromstring(files["lrb.svg"])
    ElementTree.fromstring(page(Cell(small(), "topk", "plain", 0), [])["lrb.svg"])


# ---- the cells that are asked for


def test_all_methods_of_the_paper_seed_by_seed() -> None:
    cells = cells_of("small", None, None, 2, [])
    assert len(cells) == 7 * 3 * 2
    assert [cell.seed for cell in cells] == [0] * 21 + [1] * 21
    assert {cell.method for cell in cells} == {
        "relu",
        "jumprelu",
        "topk",
        "batch_topk",
        "matryoshka",
        "transcoder",
        "crosscoder",
    }


def test_what_is_asked_for_twice_is_run_once() -> None:
    assert len(cells_of("small", ["topk", "topk"], ["plain"], 1, ["k=3"])) == 1


def test_values_are_read_as_json_or_words() -> None:
    (cell,) = cells_of("small", ["topk"], ["plain"], 1, ["k=3", "variant=negative", "prefixes=[4,9]", "tied=true"])
    assert dict(cell.changes) == {"k": 3, "variant": "negative", "prefixes": (4, 9), "tied": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "no size 'huge'; there are small, quarter, half, full"),
        ({"names": ["topk", "sae"]}, "no method sae; there are relu"),
        ({"arms": ["anchor"]}, "no arm anchor; there are plain, anchored, random"),
        ({"changes": ["k"]}, "--set takes name=value, as k=10, not 'k'"),
        ({"changes": ["q=1"]}, "no such thing to change: q"),
        ({"changes": ["k={}"]}, r"k is a whole number, not \{\}"),
    ],
)
def test_what_there_is_not(options: dict[str, Any], message: str) -> None:
    asked = {"size": "small", "names": ["topk"], "arms": None, "seeds": 1, "changes": [], **options}
    with pytest.raises(InputError, match=message):
        cells_of(**asked)
