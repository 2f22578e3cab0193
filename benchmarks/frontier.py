"""FVU against L0 on real activations, beside SAELens and dictionary_learning: python -m benchmarks.frontier

Rows of the demo's model on Python text (benchmarks.frontier_rows), 1,024 latents, batches of 4,096. Every method sees
the same batches in the same order for the same number of steps, and is measured on the same held-out rows with the same
float64 formula, as its users would use it when finished (thresholds included). Peers are trained twice, with their own
learning rate and with ours; what else they are given is in benchmarks.peer_training, and printed with each result.

A cell (method, setting) is written to a file when it is done: started again, the run goes on. Results depend on the
steps and rows, which name the folder; other changes ask for another `--folder`. At the end: a table, where ours stands
at each peer's L0 (between our points, in a line over log L0), a JSON line, and a plot, `frontier.svg`.
"""

import argparse
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environments import DICTIONARIES, ENVIRONMENTS, PeerProcess, environment_python, peer_process
from benchmarks.frontier_cells import (
    BATCH_ROWS,
    DICTIONARY_LEARNING,
    KINDS,
    LATENTS,
    OUR_RATE,
    OURS,
    PREFIXES,
    SAELENS,
    Cell,
    all_cells,
    train_ours,
)
from benchmarks.frontier_plot import draw
from benchmarks.frontier_rows import RowFiles, prepare_rows
from workers.machine import machine

LIBRARIES = {SAELENS: "saelens", DICTIONARY_LEARNING: "dictionary_learning"}
READ_ROWS = 8192
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, help="2,000, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="200,000 rows, 200 steps: a check")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--libraries", nargs="+", default=(OURS, *LIBRARIES), choices=(OURS, *LIBRARIES))
    parser.add_argument("--rate", type=float, default=OUR_RATE, help="of ours, and of peers beside their own")
    parser.add_argument("--own-rates", action="store_true", help="train peers with their own learning rates only")
    parser.add_argument("--folder", type=Path, default=ENVIRONMENTS / "frontier", help="rows, cells and the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, steps = (200_000, arguments.steps or 200) if arguments.small else (arguments.rows, arguments.steps or 2000)
    files = prepare_rows(arguments.folder / f"rows-{rows}", rows)
    folder = arguments.folder / f"rows-{rows}-steps-{steps}-seed-{arguments.seed}"
    cells = [c for c in all_cells(arguments.rate) if c.kind in arguments.kinds and c.library in arguments.libraries]
    if arguments.own_rates:
        cells = [c for c in cells if c.library == OURS or c.rate is None]
    results = run(cells, files, folder, steps, arguments.seed, arguments.threads)
    verdicts = compare(results)
    print(table(results, verdicts))
    (folder / "frontier.svg").write_text(draw(results))
    print(f"\n{summary(verdicts)}\nplot: {folder / 'frontier.svg'}")
    about = {"rows": files.about, "steps": steps, "seed": arguments.seed, "latents": LATENTS, "batch_rows": BATCH_ROWS}
    print(json.dumps({"machine": machine(), "packages": DICTIONARIES, **about, "results": results}))


def run(cells: list[Cell], files: RowFiles, folder: Path, steps: int, seed: int, threads: int) -> list[Result]:
    """The results of the cells, in their order; those that are on file are read."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = torch.from_numpy(np.load(files.held_out))
    measured_from = len(held_out) // 5
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
                            "reconstruction": str(folder / f"{LIBRARIES[cell.library]}.npy"),
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
    reconstruction = folder / f"{LIBRARIES[cell.library]}.npy"
    y = torch.from_numpy(np.load(reconstruction))
    reconstruction.unlink()
    return figures(cell, measured, y, answer["firings"], answer["settings"], answer["seconds"])


def figures(cell: Cell, x: Tensor, y: Tensor, firings: list[int], settings: dict[str, Any], seconds: float) -> Result:
    """FVU = sum ||x - y||^2 / sum ||x - mean x||^2 in float64, L0, and the share of latents that never fired."""
    error = (x.double() - y.double()).square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    return {
        "name": cell.name,
        "library": cell.library,
        "kind": cell.kind,
        "settings": settings,
        "own_rate": cell.library == OURS or cell.rate is None,
        "fvu": (error / variance).item(),
        "l0": sum(firings) / len(x),
        "dead_share": sum(f == 0 for f in firings) / len(firings),
        "seconds": seconds,
    }


# ---- what is printed


def compare(results: list[Result]) -> dict[str, tuple[float | None, float | None]]:
    """For each peer's point its FVU less ours at its L0: of the same kind, and of our best kind. None: ours does not
    reach this L0. Above zero, ours is better."""
    found = {}
    for result in results:
        if result["library"] == OURS:
            continue
        of_kinds = {kind: at for kind in KINDS if (at := fvu_at(result["l0"], curve(results, kind))) is not None}
        same = of_kinds.get(result["kind"])
        found[result["name"]] = (
            None if same is None else result["fvu"] - same,
            result["fvu"] - min(of_kinds.values()) if of_kinds else None,
        )
    return found


def curve(results: list[Result], kind: str) -> list[tuple[float, float]]:
    """(L0, FVU) of ours of a kind, by L0."""
    return sorted((r["l0"], r["fvu"]) for r in results if r["library"] == OURS and r["kind"] == kind)


def fvu_at(l0: float, points: list[tuple[float, float]]) -> float | None:
    """Between the points, in a line over log L0; None beyond them (by more than 2 %: a k is met that well)."""
    points = [point for point in points if point[0] > 0]
    if not points or not points[0][0] * 0.98 <= l0 <= points[-1][0] * 1.02:
        return None
    logs, fvus = np.log([p[0] for p in points]), [p[1] for p in points]
    return float(np.interp(math.log(l0), logs, fvus))


def table(results: list[Result], verdicts: dict[str, tuple[float | None, float | None]]) -> str:
    lines = [
        "| kind | library | setting | L0 | FVU | dead | s | less ours of the kind | less our best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        settings = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in r["settings"].items())
        shown = ["" if v is None else f"{v:+.4f}" for v in verdicts.get(r["name"], (None, None))]
        lines.append(
            f"| {r['kind']} | {r['library']} | {settings} | {r['l0']:.1f} | {r['fvu']:.4f} | {r['dead_share']:.1%} | "
            f"{r['seconds']:.0f} | {shown[0]} | {shown[1]} |"
        )
    return "\n".join(lines)


def summary(verdicts: dict[str, tuple[float | None, float | None]]) -> str:
    lines = []
    for place, what in enumerate(("of the same kind", "of our best kind")):
        known = {name: v[place] for name, v in verdicts.items() if v[place] is not None}
        worse = [f"{name} ({v:+.4f})" for name, v in known.items() if v is not None and v < 0]
        lines.append(
            f"Ours {what} is at or below the peer's FVU at {len(known) - len(worse)} of {len(known)} points "
            f"({len(verdicts) - len(known)} beyond our L0)" + (f"; not at: {'; '.join(worse)}" if worse else "") + "."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
