"""`granary bench lrb` on a size of seconds: it runs, goes on where it was, and refuses what there is not."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import ray as ray_itself

from jobs.bench.lrb import cells_of
from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.lrb.cells import train_cell
from pipeline.lrb.methods import Cell
from workers.bench.cells import file_of, read_cell, run_cells
from workers.cluster.connect import connected

TINY = {
    "features": 40,
    "width": 30,
    "samples": 2000,
    "sparsity": 0.9,
    "interference": 0.4,
    "latents": 64,
    "steps": 30,
    "batch_rows": 128,
    "k": 4,
    "anchors": 8,
}
CHANGES = [f"{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with connected("local", cpus=2):
        yield


def bench(folder: Path, *options: str) -> int:
    sets = [part for change in CHANGES for part in ("--set", change)]
    return main(["bench", "lrb", "--out", str(folder), *sets, *options])


def cells(*methods: str, seeds: int = 1) -> list[Cell]:
    return cells_of("small", list(methods), None, seeds, CHANGES)


def test_it_runs_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--method", "topk", "--method", "transcoder", "--seeds", "2")
    assert bench(tmp_path, *asked) == 0
    out = capsys.readouterr().out
    assert "12 cells, 0 of them done" in out
    assert "12 of 12: " in out
    assert (tmp_path / "lrb.md").read_text() in out
    files = sorted((tmp_path / "cells").iterdir())
    assert [f.suffix for f in files] == [".json"] * 12
    assert json.loads((tmp_path / "lrb.json").read_text()) == [
        read_cell(tmp_path, cell) for cell in cells("topk", "transcoder", seeds=2)
    ]
    ElementTree.parse(tmp_path / "lrb.svg")
    assert "| transcoder | random | 2 |" in (tmp_path / "lrb.md").read_text()

    kept = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}
    lost = files[3]
    lost.unlink()
    assert bench(tmp_path, *asked) == 0
    out = capsys.readouterr().out
    assert "12 cells, 11 of them done" in out
    assert "1 of 1: " in out
    for path, (content, when) in kept.items():
        if path != lost:
            assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, when)
    again, before = json.loads(lost.read_text()), json.loads(kept[lost][0])
    for name in ("minutes", "cpu_minutes"):
        assert again.pop(name) > 0
        del before[name]
    assert again == before


def test_other_settings_are_other_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--method", "topk", "--arm", "plain", "--seeds", "1")
    assert bench(tmp_path, *asked) == 0
    assert bench(tmp_path, *asked, "--set", "k=3") == 0
    assert bench(tmp_path, *asked, "--set", "noise=0.1") == 0
    assert len(list((tmp_path / "cells").iterdir())) == 3
    capsys.readouterr()
    assert bench(tmp_path, *asked, "--set", "k=3") == 0
    assert "1 cells, 1 of them done" in capsys.readouterr().out


def test_a_record_is_what_the_cell_gives_here(tmp_path: Path) -> None:
    """And says what it was run on, and everything that determines it."""
    (cell,) = (c for c in cells("batch_topk") if c.arm == "random")
    ((_, record),) = run_cells([cell], tmp_path, 1)
    assert read_cell(tmp_path, cell) == json.loads(json.dumps(record))
    expected = train_cell(cell)
    for name in ("method", "arm", "seed", "changes"):
        assert record[name] == expected[name]
    for name in ("m_gt", "m_ip", "mcc"):
        assert record["decoder"][name] == pytest.approx(expected["decoder"][name], abs=0.05)  # threads differ
    assert record["machine"]["threads"] == 1
    assert record["identity"]["size"]["bench"]["features"] == 40
    assert record["identity"]["method"]["activation"] == {"kind": "batch_topk", "k": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "sae"), "no method sae; there are relu"),
        (("--arm", "anchor"), "no arm anchor; there are plain"),
        (("--size", "huge"), "no size 'huge'; there are small"),
        (("--set", "stepps=3"), "no such thing to change: stepps; the nearest is steps"),
        (("--set", "k=many"), "k is a whole number, not 'many'"),
        (("--set", "k"), "--set takes name=value, as k=10, not 'k'"),
    ],
)
def test_what_there_is_not_is_refused_in_a_sentence(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path / "out", *options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"granary: {message}")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_cell_that_fails_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which weights explode: one sentence in the end, and the cells beside it are kept."""
    good, bad = cells("topk")[0], cells_of("small", ["relu"], ["plain"], 1, [*CHANGES, "learning_rate=1e30"])[0]
    done = []
    with pytest.raises(InputError, match=r"relu, plain, seed 0: step .*: the loss is not finite"):
        done.extend(cell for cell, _ in run_cells([bad, good], tmp_path, 1))
    assert read_cell(tmp_path, good) is not None
    assert not file_of(tmp_path, bad).exists()
    assert bench(tmp_path, "--method", "relu", "--arm", "plain", "--seeds", "1", "--set", "learning_rate=1e30") == 1
    error = capsys.readouterr().err
    assert error.startswith("granary: relu, plain, seed 0: step ")
    assert error.count("\n") == 1
    assert ray_itself.is_initialized()
