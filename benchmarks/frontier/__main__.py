"""FVU against L0 on real activations, beside SAELens and dictionary_learning: python -m benchmarks.frontier

Rows of the demo's model on Python text (benchmarks.frontier.rows), 1,024 latents, one pass in batches of 4,096. Every
method sees the same batches in the same order for the same number of steps, and is measured on the same held-out rows
with the same float64 formula, as its users would use it when finished (thresholds included). Each library's frontier is
the best of the same learning rates; what else peers are given is in benchmarks.peer_libraries.peer_training, and with
each result.

A cell (method, setting, rate) is written to a file when it is done: started again, the run goes on; two processes with
`--threads 1` and other `--libraries` can share the work. Results depend on the steps and rows, which name the folder;
other changes ask for another `--folder`. At the end: the frontiers as a table, a JSON line, and a plot, `frontier.svg`.
"""

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.cells import (
    BATCH_ROWS,
    DICTIONARY_LEARNING,
    KINDS,
    LATENTS,
    OURS,
    PREFIXES,
    RATES,
    SAELENS,
    Cell,
    all_cells,
    train_ours,
)
from benchmarks.frontier.comparison import Result, beside, summary, table
from benchmarks.frontier.plot import draw
from benchmarks.frontier.rows import NOT_MEASURED, RowFiles, prepare_rows
from benchmarks.peer_libraries.environments import (
    DICTIONARIES,
    ENVIRONMENTS,
    PeerProcess,
    environment_python,
    peer_process,
)
from workers.machine import machine

LIBRARIES = {SAELENS: "saelens", DICTIONARY_LEARNING: "dictionary_learning"}
READ_ROWS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, help="one pass over the rows, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="200,000 rows: a check")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--libraries", nargs="+", default=(OURS, *LIBRARIES), choices=(OURS, *LIBRARIES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="RATE", help="learning rates of all")
    parser.add_argument("--own-rates", action="store_true", help="train peers with their own learning rates, too")
    parser.add_argument("--folder", type=Path, default=ENVIRONMENTS / "frontier", help="rows, cells and the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = 200_000 if arguments.small else arguments.rows
    files = prepare_rows(arguments.folder / f"rows-{rows}", rows)
    steps = arguments.steps or files.about["train"] // BATCH_ROWS
    folder = arguments.folder / f"rows-{rows}-steps-{steps}-seed-{arguments.seed}"
    wanted = all_cells(arguments.rates, arguments.own_rates)
    cells = [c for c in wanted if c.kind in arguments.kinds and c.library in arguments.libraries]
    results = run(cells, files, folder, steps, arguments.seed, arguments.threads)
    print(f"{table(results)}\n\n{beside(results)}\n\n{summary(results)}")
    (folder / "frontier.svg").write_text(draw(results))
    print(f"plot: {folder / 'frontier.svg'}")
    about = {"rows": files.about, "steps": steps, "seed": arguments.seed, "latents": LATENTS, "batch_rows": BATCH_ROWS}
    print(json.dumps({"machine": machine(), "packages": DICTIONARIES, **about, "results": results}))


def run(cells: list[Cell], files: RowFiles, folder: Path, steps: int, seed: int, threads: int) -> list[Result]:
    """The results of the cells, in their order; those that are on file are read."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = torch.from_numpy(np.load(files.held_out))
    measured_from = len(held_out) // NOT_MEASURED
    calibration, measured = held_out[:measured_from], held_out[measured_from:]
    rows, results = np.load(files.train, mmap_mode="r"), []
    with ExitStack() as stack:
        peers: dict[str, PeerProcess] = {}
        for number, cell in enumerate(cells):
            file = folder / f"{cell.name.replace(' ', '_')}.json"
            if not file.exists():
                if cell.library == OURS:
                    result = measure_ours(cell, rows, calibration, measured, steps, seed)
                else:
                    if cell.library not in peers:
                        settings = {
                            "library": LIBRARIES[cell.library], "threads": threads, "seed": seed, "steps": steps,
                            "train": str(files.train), "held_out": str(files.held_out), "measured_from": measured_from,
                            "reconstruction": str(reconstruction_file(folder, cell)),
                            "batch_rows": BATCH_ROWS, "latents": LATENTS, "d": rows.shape[1], "prefixes": PREFIXES,
                        }  # fmt: skip
                        python = environment_python("dictionaries", DICTIONARIES)
                        peers[cell.library] = stack.enter_context(
                            peer_process(python, "peer_training.py", settings, threads)
                        )
                    result = measure_peer(peers[cell.library], cell, folder, measured)
                unfinished = file.with_suffix(".part")
                unfinished.write_text(json.dumps(result) + "\n")
                unfinished.replace(file)
                print(f"{number + 1} of {len(cells)}: {cell.name}: L0 {result['l0']:.1f}, FVU {result['fvu']:.4f}, "
                      f"{result['seconds']:.0f} s", flush=True)  # fmt: skip
            results.append(json.loads(file.read_text()))
    return results


def measure_ours(cell: Cell, rows: Any, calibration: Tensor, measured: Tensor, steps: int, seed: int) -> Result:
    trained = train_ours(cell, rows, calibration, steps, seed)
    firings, parts = torch.zeros(LATENTS, dtype=torch.int64), []
    for x in measured.split(READ_ROWS):
        code = trained.dictionary.encode(x)
        firings += (code != 0).sum(0)
        parts.append(trained.dictionary.decode(code))
    return figures(cell, measured, torch.cat(parts), firings.tolist(), trained.settings, trained.seconds)


def measure_peer(peer: PeerProcess, cell: Cell, folder: Path, measured: Tensor) -> Result:
    answer = peer.ask({"kind": cell.peer_kind, "settings": cell.settings, "rate": cell.rate})
    reconstruction = reconstruction_file(folder, cell)
    y = torch.from_numpy(np.load(reconstruction))
    reconstruction.unlink()
    return figures(cell, measured, y, answer["firings"], answer["settings"], answer["seconds"])


def reconstruction_file(folder: Path, cell: Cell) -> Path:
    """Where a peer leaves its reconstruction of the held-out rows for this process."""
    return folder / f"{LIBRARIES[cell.library]}-{os.getpid()}.npy"


def figures(cell: Cell, x: Tensor, y: Tensor, firings: list[int], settings: dict[str, Any], seconds: float) -> Result:
    """FVU = sum ||x - y||^2 / sum ||x - mean x||^2 in float64, L0, and the share of latents that never fired."""
    error = (x.double() - y.double()).square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    return {
        "name": cell.name,
        "library": cell.library,
        "kind": cell.kind,
        "settings": settings,
        "fvu": (error / variance).item(),
        "l0": sum(firings) / len(x),
        "dead_share": sum(f == 0 for f in firings) / len(firings),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
