"""Resampling dead latents: python -m benchmarks.resampling

Runs that end with many dead latents, with and without resampling (Bricken et al. 2023), on the Linear Representation
Bench and on activations of the demo's model (benchmarks.frontier.rows): the paper's figure 7 in small. Everything else
is equal: first weights, batches, steps. AuxK is off in both, as it also revives latents; a third run has it instead.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.rows import prepare_rows
from pipeline.lrb.data import Bench, make_coefficients, make_features, make_rows
from pipeline.sdl.dictionary.activations import TopK
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.measure.metrics import measure_code
from pipeline.sdl.train.config import Resampling, TrainingConfig
from pipeline.sdl.train.objective import Objective
from pipeline.sdl.train.trainer import DictionaryTrainer
from workers.machine import machine

FOLDER = Path(__file__).parents[1] / ".bench-venv" / "frontier"
RUNS: dict[str, dict[str, Any]] = {
    "neither": {"objective": Objective(auxk=0)},
    "resampling": {"objective": Objective(auxk=0), "resampling": Resampling(at=(0.15, 0.3, 0.45, 0.6), rows=65_536)},
    "AuxK": {},
}


@dataclass(frozen=True)
class Data:
    """Rows float32 [rows, d] to train and to measure on, and how a dictionary is trained on them."""

    train: Tensor
    held_out: Tensor
    latents: int
    k: int
    training: TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the demo's model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    print("| data | seed | run | FVU at the end | held-out FVU | dead latents, % | resampled |")
    print("|---|---|---|---|---|---|---|")
    for name, data in (("LRB", bench_data()), ("demo's model, resid_post.2", demo_data(arguments.rows))):
        for seed in range(arguments.seeds):
            for run, changes in RUNS.items():
                found = train(data, replace(data.training, seed=seed, **changes))
                results.append({"data": name, "seed": seed, "run": run, **found})
                print(
                    f"| {name} | {seed} | {run} | {found['fvu']:.4f} | {found['held_out_fvu']:.4f} | "
                    f"{100 * found['dead']:.1f} | {found['resampled']} |",
                    flush=True,
                )
    print(json.dumps({"machine": machine(), "results": results}))


def bench_data() -> Data:
    """Hardly more latents than features, and a high rate: features are left out while latents are dead."""
    bench = Bench(250, 192, 50_000, 0.96, 0.2)
    rows = make_rows(bench, make_coefficients(bench), make_features(bench))
    rows = (rows - rows.mean(0)) * (rows.shape[1] / rows.var(0).sum()) ** 0.5
    config = TrainingConfig(steps=1000, batch_rows=1024, learning_rate=1e-2, dead_after_rows=20_000)
    return Data(rows[:45_000], rows[45_000:], 256, 10, config)


def demo_data(rows: int) -> Data:
    files = prepare_rows(FOLDER / f"rows-{rows}", rows)
    train, held_out = (torch.from_numpy(np.load(path)) for path in (files.train, files.held_out))
    config = TrainingConfig(
        steps=800,
        batch_rows=4096,
        learning_rate=1e-2,
        dead_after_rows=50_000,
        initialisation=Initialisation(encoder="independent"),  # which loses half of the latents, as large runs do
    )
    return Data(train, held_out[:32_768], 8192, 16, config)


def train(data: Data, config: TrainingConfig) -> dict[str, Any]:
    d = data.train.shape[1]
    shape = DictionaryConfig(("rows",), ("rows",), (d,), (d,), data.latents, TopK(data.k))
    already = Normalisation(torch.zeros(d), torch.ones(d))
    trainer = DictionaryTrainer(Dictionary(shape), config, already, already)
    last, resampled = [], 0
    for step, rows in enumerate(batches(len(data.train), config)):
        found = trainer.step(data.train[rows], data.train[rows])
        resampled += found.resampled
        if step >= config.steps * 0.95:
            last.append(found.fvu)
    measured, _ = measure_code(trainer.result(), [(data.held_out, data.held_out)], keep_codes=[])
    return {
        "fvu": sum(last) / len(last),
        "held_out_fvu": measured.fvu,
        "dead": measured.dead_share,
        "resampled": resampled,
    }


def batches(rows: int, config: TrainingConfig) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        yield torch.randint(rows, (config.batch_rows,), generator=generator)


if __name__ == "__main__":
    main()
