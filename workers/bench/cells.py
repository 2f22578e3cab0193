"""Cells of a bench as Ray tasks, each with a file of its own: a table of days goes on where it was.

A cell's file is named after everything that determines it, and is put in place whole; a run that is killed loses the
cells it was at, and nothing else.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipeline.errors import InputError
from pipeline.lrb.cells import train_cell
from pipeline.lrb.methods import Cell, resolve
from pipeline.sdl.dictionary.activations import activation_record
from storage.format.records import Record, digest
from workers.cluster.stopping import POLL_S, check_stop, stop_requests
from workers.machine import machine

CELLS = "cells"


def identity_of(cell: Cell) -> Record:
    """Everything that determines a cell's figures, as JSON."""
    size, method = resolve(cell)
    described = asdict(method) | {"activation": activation_record(method.activation)}
    identity: Record = json.loads(
        json.dumps({"size": asdict(size), "method": described, "arm": cell.arm, "seed": cell.seed})
    )
    return identity


def file_of(folder: Path, cell: Cell) -> Path:
    name = "-".join([cell.method, cell.arm, str(cell.seed), digest(identity_of(cell))[:12]])
    return folder / CELLS / f"{name}.json"


def read_cell(folder: Path, cell: Cell) -> Record | None:
    """The record of a cell that was run, or None."""
    path = file_of(folder, cell)
    return json.loads(path.read_text()) if path.exists() else None


def recorded_products(folder: Path, cells: Sequence[Cell]) -> Record | None:
    """What the cells of a table that were run are computed in; None if none was."""
    records = (read_cell(folder, cell) for cell in cells)
    return next((record["products"] for record in records if record is not None and "products" in record), None)


def run_cells(cells: Sequence[Cell], folder: Path, threads: int) -> Iterator[tuple[Cell, Record]]:
    """Run the cells that have no record yet, as many at once as the cluster has room for; yield each as it is done.

    Ray must be up. Where cells raise, the others are run all the same; then what the first of them raised is. Raises
    Stopped at a signal.
    """
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    cpus = min(threads, ray.cluster_resources().get("CPU", 1))  # of more than there are, Ray would wait for ever
    remote = ray.remote(num_cpus=cpus, max_retries=3)(_run)
    products = recorded_products(folder, cells)
    waiting = {remote.remote(cell, threads, products): cell for cell in cells if read_cell(folder, cell) is None}
    raised: Exception | None = None
    while waiting:
        done = _first_of(waiting)
        cell = waiting.pop(done)
        try:
            found = ray.get(done)
        except RayError as error:
            raised = raised or _of_cell(error, cell)
            continue
        record = {"identity": identity_of(cell), **found}
        path = file_of(folder, cell)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)
        yield cell, record
    if raised is not None:
        raise raised


def _first_of(waiting: Iterable[Any]) -> Any:
    """Wait for the first of the cells that are being run. Raises Stopped at a signal."""
    with stop_requests() as stop:
        while True:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            if done:
                return done[0]
            check_stop(stop, "running cells of the bench", list(waiting))


def _of_cell(error: Exception, cell: Cell) -> Exception:
    """What was raised, and by which cell if it is a refusal."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError):
        return InputError(f"{cell.method}, {cell.arm}, seed {cell.seed}: {cause}")
    return error


def _run(cell: Cell, threads: int, products: Record | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    about = machine()
    return {**train_cell(cell, products), "machine": {"cpu": about["cpu"], "cores": about["cores"], "threads": threads}}
