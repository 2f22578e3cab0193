"""What benchmarks.frontier trains: the cells, and how ours are trained."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.sdl.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from pipeline.sdl.calibration import calibrate
from pipeline.sdl.config import DictionaryConfig
from pipeline.sdl.dictionary import Dictionary, Normalisation
from pipeline.sdl.objective import Objective
from pipeline.sdl.training import DictionaryTrainer, TrainingConfig, default_learning_rate

OURS, SAELENS, DICTIONARY_LEARNING = "ours", "SAELens", "dictionary_learning"
KINDS = ("topk", "batch_topk", "jumprelu", "gated", "matryoshka", "relu")
TARGETS = (8, 16, 32, 64)
"""Latents a row that are asked for, where a kind can be asked."""
LATENTS, BATCH_ROWS = 1024, 4096
PREFIXES = (64, 128, 256, 512)
SAME_RATE = default_learning_rate(LATENTS)
"""The rate that ours are trained with; peers are trained with their own and with this one."""


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


def all_cells() -> list[Cell]:
    """Those of one kind stand together, ours first."""
    return [cell for kind in KINDS for cell in (*_ours(kind), *_saelens(kind), *_dictionary_learning(kind))]


def _ours(kind: str) -> Iterator[Cell]:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [{"l0": 1.0, "l0_target": float(k)} for k in TARGETS],
        "gated": [{"l1": weight} for weight in (2.0, 4.0, 8.0, 12.0, 20.0)],
        "relu": [{"l1": weight} for weight in (2.0, 4.0, 8.0, 12.0, 20.0)],
    }
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        yield Cell(OURS, kind, kind, settings)


def _saelens(kind: str) -> Iterator[Cell]:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [
            *({"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": c} for c in (0.1, 0.3, 1.0, 3.0)),
            *({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k} for k in TARGETS),
        ],
        "gated": [{"l1_coefficient": c} for c in (2.0, 4.0, 8.0, 12.0, 20.0)],
        "relu": [{"l1_coefficient": c} for c in (2.0, 4.0, 8.0, 12.0, 20.0)],
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated", "relu": "Standard"}
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        for rate in (None, SAME_RATE):
            yield Cell(SAELENS, kind, names.get(kind, "MatryoshkaBatchTopK"), settings, rate)


def _dictionary_learning(kind: str) -> Iterator[Cell]:
    # Its rows have norm 1, ours sqrt(d) = 11.3: the same penalty is a number 11.3 times smaller.
    penalties = [{"l1_penalty": round(weight / 128**0.5, 3)} for weight in (2.0, 4.0, 8.0, 12.0, 20.0)]
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [{"target_l0": float(k)} for k in TARGETS],
        "gated": penalties,
        "relu": penalties,
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpRelu", "gated": "GatedSAE", "relu": "Standard"}
    follows_our_rule = kind in ("topk", "batch_topk", "matryoshka")
    for settings in sweeps.get(kind, [{"k": k} for k in TARGETS]):
        for rate in (None,) if follows_our_rule else (None, SAME_RATE):
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
        learning_rate=cell.rate or SAME_RATE,
        objective=objective,
        seed=seed,
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
    kinds: dict[str, Activation] = {"jumprelu": JumpReLU(), "gated": Gated(), "relu": ReLU()}
    return kinds[cell.kind], Objective(**settings)
