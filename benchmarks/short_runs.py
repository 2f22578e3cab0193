"""What makes short runs good: python -m benchmarks.short_runs

TopK on rows of the demo's model (benchmarks.frontier.rows), one pass in batches of 4,096: held-out FVU without clipping
gradients and with it, with other schedules, decoders of a free norm, other optimisers, and rates around the default one
for other widths and lengths. Everything else is equal: first weights (but where they are the question), batches.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.rows import NOT_MEASURED, batches, prepare_rows
from benchmarks.peer_libraries.environments import ENVIRONMENTS
from pipeline.sdl.dictionary.activations import TopK
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.measure.metrics import measure_code
from pipeline.sdl.train.config import TrainingConfig, default_dead_after_rows, default_learning_rate
from pipeline.sdl.train.trainer import ADAM_BETAS, DictionaryTrainer
from workers.machine import machine

BATCH_ROWS = 4096
LIKE_SAELENS = {"decoder_norm": "free", "initialisation": Initialisation(encoder_scale=0.1, decoder_norm=0.1)}


class Signum(torch.optim.Optimizer):
    """The sign of the gradient's running mean (Bernstein et al. 2018), which sparsify takes by default."""

    def __init__(self, parameters: Any, lr: float = 0.0):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            p.sub_(mean.sign(), alpha=self.param_groups[0]["lr"])


class Muon(torch.optim.Muon):
    """Orthogonalised momentum (torch.optim.Muon) for matrices, Adam for biases."""

    def __init__(self, parameters: Any):
        each = list(parameters)
        self.biases = torch.optim.Adam([p for p in each if p.ndim < 2], lr=0.0, betas=ADAM_BETAS)
        super().__init__([p for p in each if p.ndim == 2], lr=0.0, weight_decay=0.0, momentum=0.95)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.biases.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.biases.step()
        self.biases.zero_grad()
        super().step()


def adam(betas: tuple[float, float]) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=0.0, betas=betas, eps=1e-10, fused=True)


@dataclass(frozen=True)
class Case:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the TrainingConfig, with other values."""
    optimiser: Callable[[Any], torch.optim.Optimizer] | None = None
    latents: int = 1024
    passes: float = 1.0
    rates: tuple[float, ...] = (6e-3, 1.2e-2)


CASES = (
    Case("as it is", rates=(2e-3, 6e-3, 1.2e-2, 2.4e-2)),
    Case("without clipping", {"clip": None}, rates=(2e-3, 6e-3, 1.2e-2, 2.4e-2)),
    Case("clipped at 0.1", {"clip": 0.1}),
    Case("dead after 5 % of the rows", {"dead_after_rows": 460 * BATCH_ROWS // 20}),
    Case("without warm-up", {"warmup_share": 0.0}),
    Case("without clipping and warm-up", {"clip": None, "warmup_share": 0.0}),
    Case("decay over half of the steps", {"decay_share": 0.5}),
    Case("decay over all steps", {"decay_share": 0.95}),
    Case("free norms, from 0.1", LIKE_SAELENS),
    Case("free norms, from 0.1, without clipping", {"clip": None, **LIKE_SAELENS}),
    Case("beta_2 0.99", optimiser=adam((0.9, 0.99))),
    Case("beta_2 0.99, without clipping", {"clip": None}, adam((0.9, 0.99))),
    Case("Signum", optimiser=Signum, rates=(3e-4, 1e-3, 3e-3)),
    Case("Muon", optimiser=Muon, rates=(6e-3, 2e-2, 6e-2)),
    Case("4,096 latents", latents=4096, rates=(3e-3, 6e-3, 1.2e-2)),
    Case("six passes", passes=6, rates=(2.5e-3, 5e-3, 1e-2)),
    Case("a quarter of a pass", passes=0.25, rates=(1.2e-2, 2.4e-2, 4.8e-2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the demo's model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    files = prepare_rows(ENVIRONMENTS / "frontier" / f"rows-{arguments.rows}", arguments.rows)
    rows, held_out = np.load(files.train, mmap_mode="r"), torch.from_numpy(np.load(files.held_out))
    held_out = held_out[: len(held_out) // NOT_MEASURED]  # the rest is for benchmarks.frontier to measure on
    results = []
    print("| run | rate | the default one | held-out FVU | dead latents, % | s |\n|---|---|---|---|---|---|")
    for case in CASES:
        for rate in case.rates:
            steps = round(case.passes * (len(rows) // BATCH_ROWS))
            found = train(case, rate, rows, held_out, steps)
            default = default_learning_rate(case.latents, steps)
            results.append({"run": case.name, "rate": rate, "default": default, **found})
            print(
                f"| {case.name} | {rate:g} | {default:.2g} | {found['fvu']:.4f} | {100 * found['dead']:.1f} | "
                f"{found['seconds']:.0f} |",
                flush=True,
            )
    print(json.dumps({"machine": machine(), "results": results}))


def train(case: Case, rate: float, rows: Any, held_out: Tensor, steps: int) -> dict[str, float]:
    d = rows.shape[1]
    dead_after_rows = default_dead_after_rows(steps * BATCH_ROWS)
    training: dict[str, Any] = {"dead_after_rows": dead_after_rows, **case.changes}
    config = TrainingConfig(steps=steps, batch_rows=BATCH_ROWS, learning_rate=rate, **training)
    shape = DictionaryConfig(("rows",), ("rows",), (d,), (d,), case.latents, TopK(16))
    already = Normalisation(torch.zeros(d), torch.ones(d))
    trainer = DictionaryTrainer(Dictionary(shape), config, already, already)
    if case.optimiser is not None:
        trainer.optimizer = case.optimiser(trainer.dictionary.parameters())  # type: ignore[assignment]
    started = time.perf_counter()
    for x in batches(rows, BATCH_ROWS, steps):
        trainer.step(x, x)
    seconds = time.perf_counter() - started
    measured, _ = measure_code(trainer.result(), [(held_out, held_out)], keep_codes=[])
    return {"fvu": measured.fvu, "dead": measured.dead_share, "seconds": seconds}


if __name__ == "__main__":
    main()
