"""What benchmarks.frontier trains: the cells, and how ours are trained."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.sdl.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from pipeline.sdl.calibration import calibrate
from pipeline.sdl.config import DictionaryConfig
from pipeline.sdl.dictionary import Dictionary, Initialisation, Normalisation
from pipeline.sdl.objective import Objective
from pipeline.sdl.training import DictionaryTrainer
from pipeline.sdl.training_config import TrainingConfig

OURS, SAELENS, DICTIONARY_LEARNING = "ours", "SAELens", "dictionary_learning"
KINDS = ("topk", "batch_topk", "jumprelu", "gated", "matryoshka", "relu")
TARGETS = (8, 16, 32, 64)
"""Latents a row that are asked for, where a kind can be asked."""
PENALTIES = (1.0, 2.0, 4.0, 8.0, 16.0)
GATED_PENALTIES = (3.0, 4.5, 6.0, 8.0, 12.0)
"""Weights of L1 where E||x||^2 = d and errors are summed over d. Ours gave an L0 of 115, 60, 31 with 1, 2, 4 (ReLU) and
of 137, 13 with 2, 8 (gated) after 500 steps of 1,024 rows."""
LATENTS, BATCH_ROWS = 1024, 4096
PREFIXES = (64, 128, 256, 512)
OUR_RATE = 4e-3
"""The rate that ours are trained with, if no other is asked for; peers are trained with their own and with this one.
The rule of thumb (8e-4 for so many latents) is for runs a hundred times as long: after 1,200 steps of 1,024 rows TopK,
k = 16, had an FVU of 0.243 with it, 0.211 with 2e-3, 0.198 with 4e-3, 0.191 with 8e-3."""


@dataclass(frozen=True)
class Cell:
    """One dictionary to train."""

    library: str
    kind: str
    """One of KINDS."""
    peer_kind: str
    """The library's own name of it."""
    settings: dict[str, Any]
    """What decides its sparsity, in the library's own words."""
    rate: float | None = None
    """Learning rate; the library's own, if not given."""

    @property
    def name(self) -> str:
        parts = [self.library, self.peer_kind, *(f"{k}={v}" for k, v in self.settings.items())]
        return " ".join([*parts, *([] if self.rate is None else [f"lr={self.rate:g}"])])


def all_cells(rate: float = OUR_RATE) -> list[Cell]:
    """Those of one kind stand together, ours first; `rate` is ours."""
    return [
        cell
        for kind in KINDS
        for cell in (*_ours(kind, rate), *_saelens(kind, rate), *_dictionary_learning(kind, rate))
    ]


def _ours(kind: str, rate: float) -> Iterator[Cell]:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [{"l0": 1.0, "l0_target": float(k)} for k in TARGETS],
        "gated": [{"l1": weight} for weight in GATED_PENALTIES],
        "relu": [{"l1": weight} for weight in PENALTIES],
    }
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        yield Cell(OURS, kind, kind, settings, rate)


def _saelens(kind: str, our_rate: float) -> Iterator[Cell]:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [
            *({"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": c} for c in (0.1, 0.3, 1.0, 3.0)),
            *({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k} for k in TARGETS),
        ],
        "gated": [{"l1_coefficient": c} for c in GATED_PENALTIES],
        "relu": [{"l1_coefficient": c} for c in PENALTIES],
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated", "relu": "Standard"}
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        for rate in (None, our_rate):
            yield Cell(SAELENS, kind, names.get(kind, "MatryoshkaBatchTopK"), settings, rate)


def _dictionary_learning(kind: str, our_rate: float) -> Iterator[Cell]:
    # Its rows have norm 1, ours sqrt(d) = 11.3: the same penalty is a number 11.3 times smaller.
    def penalties(weights: Sequence[float]) -> list[dict[str, Any]]:
        return [{"l1_penalty": round(weight / 128**0.5, 3)} for weight in weights]

    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [{"target_l0": float(k)} for k in TARGETS],
        "gated": penalties(GATED_PENALTIES),
        "relu": penalties(PENALTIES),
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpRelu", "gated": "GatedSAE", "relu": "Standard"}
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        for rate in (None, our_rate):
            yield Cell(DICTIONARY_LEARNING, kind, names.get(kind, "MatryoshkaBatchTopK"), settings, rate)


# ---- ours


@dataclass(frozen=True)
class Trained:
    dictionary: Dictionary
    settings: dict[str, Any]
    seconds: float


def train_ours(cell: Cell, rows: Any, calibration: Tensor, steps: int, seed: int) -> Trained:
    """On the batches peers are given; BatchTopK's threshold is from `calibration` [rows, d]; not measured."""
    d = rows.shape[1]
    activation, objective = _activation_and_objective(cell)
    config = DictionaryConfig(("x",), ("x",), (d,), (d,), LATENTS, activation)
    training = TrainingConfig(
        steps=steps,
        batch_rows=BATCH_ROWS,
        learning_rate=cell.rate or OUR_RATE,
        objective=objective,
        seed=seed,
        # As is usual with L1: the penalty sees the decoders' norms, which begin small and are free.
        decoder_norm="free" if cell.kind == "relu" else "unit",
        initialisation=Initialisation(decoder_norm=0.1 if cell.kind == "relu" else 1.0),
    )
    plain = Normalisation(torch.zeros(d), torch.ones(d))
    started = time.perf_counter()
    trainer = DictionaryTrainer(Dictionary(config), training, plain, plain)
    whole = len(rows) // BATCH_ROWS
    for step in range(steps):
        first = step % whole * BATCH_ROWS
        x = torch.from_numpy(np.array(rows[first : first + BATCH_ROWS]))
        trainer.step(x, x)
    dictionary = trainer.result()
    if isinstance(activation, BatchTopK):
        calibrate(dictionary, lambda: calibration.split(BATCH_ROWS), trainer.competing())
    used = {"lr": training.learning_rate, **cell.settings}
    return Trained(dictionary.requires_grad_(False), used, time.perf_counter() - started)


def _activation_and_objective(cell: Cell) -> tuple[Activation, Objective]:
    settings = dict(cell.settings)
    if cell.kind == "topk":
        return TopK(**settings), Objective()
    if cell.kind == "batch_topk":
        return BatchTopK(**settings), Objective()
    if cell.kind == "matryoshka":
        return BatchTopK(**settings), Objective(prefixes=PREFIXES)
    kinds: dict[str, Activation] = {"jumprelu": JumpReLU(1.0, 1.0), "gated": Gated(), "relu": ReLU()}
    return kinds[cell.kind], Objective(**settings)
