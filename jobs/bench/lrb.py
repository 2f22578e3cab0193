"""`granary bench lrb`: the Linear Representation Bench as a table of methods, plain, anchored and with random anchors.

Every cell is a Ray task with a file of its own in the folder, so the command goes on where it was. At the end, and
after every cell, the folder holds lrb.md, lrb.json and lrb.svg of all cells that are done.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.lrb_page import page
from pipeline.errors import InputError
from pipeline.lrb.methods import ARMS, SIZES, Cell, methods, resolve
from storage.backends.place import home_expanded
from storage.format.records import Record

IN_TABLE = ("relu", "jumprelu", "topk", "batch_topk", "matryoshka", "transcoder", "crosscoder")
"""The methods of the paper's table, which are run if none are named."""


def cells_of(
    size: str,
    names: list[str] | None,
    arms: list[str] | None,
    seeds: int,
    changes: list[str],
) -> list[Cell]:
    """The cells that are asked for, seed by seed, so that every method has one before any has two.

    Raises InputError for names that there are not.
    """
    if size not in SIZES:
        raise InputError(f"no size {size!r}; there are {', '.join(SIZES)}")
    of_size = SIZES[size]()
    known = methods(of_size)
    if unknown := sorted({*(names or ())} - known.keys()):
        raise InputError(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
    changed = tuple(_change(text) for text in changes)
    cells = [
        Cell(of_size, method, arm, seed, changed)
        for seed in range(seeds)
        for method in names or IN_TABLE
        for arm in arms or ARMS
    ]
    for cell in cells:
        resolve(cell)
    return [cell for i, cell in enumerate(cells) if cell not in cells[:i]]


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes name=value, as k=10, not {text!r}")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


def run_lrb(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run the cells that are missing and write the table."""
    cells = cells_of(arguments.size, arguments.method, arguments.arm, arguments.seeds, arguments.set)
    folder = home_expanded(arguments.out or f"granary-lrb-{arguments.size}").absolute()

    from workers.bench.cells import read_cell, run_cells
    from workers.cluster.connect import connected

    missing = [cell for cell in cells if read_cell(folder, cell) is None]
    say(f"{len(cells)} cells, {len(cells) - len(missing)} of them done, in {folder}")
    if missing:
        with connected(arguments.address, cpus=arguments.threads):
            for number, (cell, record) in enumerate(run_cells(cells, folder, arguments.threads), start=1):
                say(f"{number} of {len(missing)}: {_line(cell, record)}")
                write_table(folder, cells)
    write_table(folder, cells)
    say((folder / "lrb.md").read_text())
    return 0


def write_table(folder: Path, cells: list[Cell]) -> None:
    from workers.bench.cells import read_cell

    records = [record for cell in cells if (record := read_cell(folder, cell)) is not None]
    for name, content in page(cells[0], records).items():
        (folder / name).write_text(content)


def _line(cell: Cell, record: Record) -> str:
    of = {side: f"{100 * record[side]['m_gt']:.1f} % / {record[side]['m_ip']:.3f}" for side in ("decoder", "encoder")}
    return (
        f"{cell.method}, {cell.arm}, seed {cell.seed}: decoder {of['decoder']}, encoder {of['encoder']}, "
        f"FVU {record['fvu']:.3f} at L0 {record['l0']:.1f}, {record['minutes']:.1f} minutes"
    )
