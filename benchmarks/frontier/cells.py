"""What benchmarks.frontier trains: the cells, and how ours are trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier.rows import batches
from pipeline.sdl.dictionary.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig, default_dead_after_rows
from pipeline.sdl.train.objective import Objective
from pipeline.sdl.train.trainer import DictionaryTrainer

OURS, SAELENS, DICTIONARY_LEARNING = "ours", "SAELens", "dictionary_learning"
KINDS = ("topk", "batch_topk", "jumprelu", "gated", "matryoshka", "relu")
TARGETS = (8, 16, 32, 64)
"""Latents a row that are asked for, where a kind can be asked."""
PENALTIES = (0.7, 1.0, 1.6, 2.5)
GATED_PENALTIES = (1.0, 1.6, 2.5, 4.0)
"""Weights of L1 where E||x||^2 = d and errors are summed over d: ours have an L0 of 10 to 90 with them."""
BETWEEN: dict[str, tuple[float, ...]] = {
    "batch_topk": (7, 66),
    "matryoshka": (7,),
    "jumprelu": (2.5, 4.0, 40.0, 45.0, 48.0, 68.0),
    "gated": (0.8, 1.25, 2.0, 3.2, 5.0, 6.3),
    "relu": (0.5, 0.85, 1.25, 2.0, 3.2),
}
"""Further targets and penalties of ours: its FVU is read at peers' L0 on a line, which lies above the curve between
points that are far apart."""
LOWERED = {"k": 8, "l0": 7.75}
"""And BatchTopK with its threshold at an L0 below k, as peers' thresholds give."""
LATENTS, BATCH_ROWS = 1024, 4096
PREFIXES = (64, 128, 256, 512)
RATES = (6e-3, 1.2e-2, 2.4e-2)
"""Learning rates that every cell of every library is trained with: a frontier is the best of them. What libraries take
by themselves is for runs a hundred times as long (3e-4, 8e-4 for as many latents)."""
HIGHEST = 4.8e-2
"""One more, for every library, where the best is the highest of those: k = 64, gated with penalties up
to 1.6, and relu with such up to 1."""


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


def all_cells(rates: Sequence[float] = RATES, own_rates: bool = False) -> list[Cell]:
    """Those of one kind stand together, ours first; `own_rates`: peers with their own learning rates, too."""
    return [
        Cell(library, kind, peer_kind, settings, rate)
        for kind in KINDS
        for library, settings_of in ((OURS, _ours), (SAELENS, _saelens), (DICTIONARY_LEARNING, _dictionary_learning))
        for peer_kind, sweep in [settings_of(kind)]
        for settings in sweep or [{"k": k} for k in TARGETS]
        for rate in (
            *rates,
            *((HIGHEST,) if tuple(rates) == RATES and _wants_highest(kind, library, settings) else ()),
            *((None,) if own_rates and library != OURS else ()),
        )
    ]


def _wants_highest(kind: str, library: str, settings: dict[str, Any]) -> bool:
    if kind in ("gated", "relu"):
        (penalty,) = settings.values()
        largest = {"gated": 1.7, "relu": 1.1}[kind]
        return bool(penalty * (128**0.5 if library == DICTIONARY_LEARNING else 1) < largest)
    return kind == "topk" and settings == {"k": max(TARGETS)}


Sweep = tuple[str, list[dict[str, Any]]]
"""The library's name of a kind, and the settings that decide its sparsity; none: those of k."""


def _ours(kind: str) -> Sweep:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "batch_topk": [*({"k": k} for k in (*TARGETS, *BETWEEN["batch_topk"])), LOWERED],
        "matryoshka": [{"k": k} for k in (*TARGETS, *BETWEEN["matryoshka"])],
        "jumprelu": [{"l0": 1.0, "l0_target": float(k)} for k in (*TARGETS, *BETWEEN["jumprelu"])],
        "gated": [{"l1": weight} for weight in (*GATED_PENALTIES, *BETWEEN["gated"])],
        "relu": [{"l1": weight} for weight in (*PENALTIES, *BETWEEN["relu"])],
    }
    return kind, sweeps.get(kind, [])


def _saelens(kind: str) -> Sweep:
    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [
            *({"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": c} for c in (0.3, 1.0, 3.0)),
            *({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k} for k in TARGETS),
        ],
        "gated": [{"l1_coefficient": c} for c in GATED_PENALTIES],
        "relu": [{"l1_coefficient": c} for c in PENALTIES],
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated", "relu": "Standard"}
    return names.get(kind, "MatryoshkaBatchTopK"), sweeps.get(kind, [])


def _dictionary_learning(kind: str) -> Sweep:
    # Its rows have norm 1, ours sqrt(d) = 11.3: the same penalty is a number 11.3 times smaller.
    def penalties(weights: Sequence[float]) -> list[dict[str, Any]]:
        return [{"l1_penalty": round(weight / 128**0.5, 3)} for weight in weights]

    sweeps: dict[str, list[dict[str, Any]]] = {
        "jumprelu": [{"target_l0": float(k)} for k in TARGETS],
        "gated": penalties(GATED_PENALTIES),
        "relu": penalties(PENALTIES),
    }
    names = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpRelu", "gated": "GatedSAE", "relu": "Standard"}
    return names.get(kind, "MatryoshkaBatchTopK"), sweeps.get(kind, [])


# ---- ours

FREE = ("batch_topk", "matryoshka", "relu")
"""Kinds whose decoders have any norm, from 0.1 on, and encoders begin like them: better by 1 to 3 % for these."""


@dataclass(frozen=True)
class Trained:
    dictionary: Dictionary
    settings: dict[str, Any]
    seconds: float


def train_ours(cell: Cell, rows: Any, calibration: Tensor, steps: int, seed: int) -> Trained:
    """On the batches peers are given; BatchTopK's threshold is from `calibration` [rows, d]; not measured."""
    d = rows.shape[1]
    activation, objective = _activation_and_objective(cell)
    free = cell.kind in FREE
    config = DictionaryConfig(("x",), ("x",), (d,), (d,), LATENTS, activation)
    training = TrainingConfig(
        steps=steps,
        batch_rows=BATCH_ROWS,
        learning_rate=cell.rate or RATES[0],
        objective=objective,
        dead_after_rows=default_dead_after_rows(steps * BATCH_ROWS),
        seed=seed,
        decoder_norm="free" if free else "unit",
        initialisation=Initialisation(encoder_scale=0.1, decoder_norm=0.1) if free else Initialisation(),
    )
    plain = Normalisation(torch.zeros(d), torch.ones(d))
    started = time.perf_counter()
    trainer = DictionaryTrainer(Dictionary(config), training, plain, plain)
    for x in batches(rows, BATCH_ROWS, steps):
        trainer.step(x, x)
    dictionary = trainer.result()
    if isinstance(activation, BatchTopK):
        calibrate(dictionary, lambda: calibration.split(BATCH_ROWS), trainer.competing(), cell.settings.get("l0"))
    used = {"lr": training.learning_rate, **cell.settings}
    return Trained(dictionary.requires_grad_(False), used, time.perf_counter() - started)


def _activation_and_objective(cell: Cell) -> tuple[Activation, Objective]:
    settings = dict(cell.settings)
    if cell.kind == "topk":
        return TopK(**settings), Objective()
    if cell.kind == "batch_topk":
        return BatchTopK(settings["k"]), Objective()
    if cell.kind == "matryoshka":
        return BatchTopK(**settings), Objective(prefixes=PREFIXES)
    kinds: dict[str, Activation] = {"jumprelu": JumpReLU(1.0, 1.0), "gated": Gated(), "relu": ReLU()}
    return kinds[cell.kind], Objective(**settings)
