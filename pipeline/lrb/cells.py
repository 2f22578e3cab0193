"""One cell of the Linear Representation Bench: a method, an arm and a seed, trained and scored.

Arms: `plain`; `anchored` to the first true features, encoder and decoder; `random`, as many random directions instead.
All arms are scored on the features that the anchored one was not given.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import isnan
from typing import Any

import torch
from torch import Tensor

from pipeline.lrb.data import Bench, make_coefficients, make_features, make_rows, recovery
from pipeline.lrb.methods import LAYOUTS, TRUTH, Cell, Method, Size, config_of, resolve, training_of
from pipeline.sdl.dictionary.activations import BatchTopK
from pipeline.sdl.dictionary.calibration import calibrate
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.measure.diagnostics import absorption, at_truth, polysemanticity
from pipeline.sdl.measure.metrics import measure_code
from pipeline.sdl.train.anchor_controls import controlled
from pipeline.sdl.train.objective import Anchors
from pipeline.sdl.train.trainer import DictionaryTrainer

SCORED_ROWS = 20_000
"""Samples on which thresholds are set and absorption is measured."""


@dataclass(frozen=True)
class Data:
    """Inputs and outputs of all samples, with their features: float32."""

    coefficients: Tensor
    sources: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


@lru_cache(maxsize=1)
def data_of(bench: Bench, sources: int) -> Data:
    coefficients = make_coefficients(bench)
    features = tuple(make_features(bench, i) for i in range(sources))
    return Data(coefficients, tuple(make_rows(bench, coefficients, W, i) for i, W in enumerate(features)), features)


def train_cell(cell: Cell, products: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train and score a cell. Returns its record, as JSON values.

    `products`: that entry of another cell's record, whose types are used where the method leaves them to the machine,
    so that all cells of a table are computed alike."""
    started, busy = time.perf_counter(), time.process_time()
    size, method = resolve(cell)
    if products is not None:
        method = replace(method, products=method.products.as_in(products))
    reads, writes = LAYOUTS[method.layout]
    data = data_of(size.bench, 1 + max(reads + writes))
    trainer = make_trainer(size, method, cell, data)
    x = side_by_side(data.sources, reads)
    y = x if reads == writes else side_by_side(data.sources, writes)
    for rows in batches(size, cell.seed):
        inputs = x[rows]
        found = trainer.step(inputs, inputs if y is x else y[rows])
    result = trainer.result()
    read, written = (side_by_side(data.features, sites) for sites in (reads, writes))
    if isinstance(method.activation, BatchTopK):
        calibrate(result, lambda: [x[:SCORED_ROWS]], trainer.competing())
    return {
        "method": cell.method,
        "arm": cell.arm,
        "seed": cell.seed,
        "changes": dict(cell.changes),
        "products": asdict(trainer.products),
        "encoder": asdict(recovery(result.W_enc, read, size.anchors)),
        "decoder": asdict(recovery(result.W_dec, written, size.anchors)),
        **_pattern(result, x, data, reads),
        **({} if size.bench.hierarchy is None else _absorption(size, result, x, data, writes)),
        **({"fvu_at_truth": _fvu_at_truth(trainer, (read, written), x, y)} if cell.arm == TRUTH else {}),
        "loss": found.loss,
        "fvu": found.fvu,
        "l0": found.l0,
        "dead": found.dead_share,
        "minutes": (time.perf_counter() - started) / 60,
        "cpu_minutes": (time.process_time() - busy) / 60,
    }


def _pattern(result: Dictionary, x: Tensor, data: Data, reads: Sequence[int]) -> dict[str, float]:
    """How many latents serve several features, of those that serve any, and how many features no latent serves."""
    active = data.coefficients[:SCORED_ROWS]
    strength = (active.sum() / (active > 0).sum()).item()
    served = polysemanticity(result, side_by_side(data.features, reads), x.mean(0), strength)
    features_of = served.sum(0)
    return {
        "polysemantic": ((features_of > 1).sum() / (features_of > 0).sum().clamp(min=1)).item(),
        "unserved": (served.sum(1) == 0).float().mean().item(),
    }


def _fvu_at_truth(trainer: DictionaryTrainer, features: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    """What Theorem 3.2's configuration leaves unexplained, before any training."""
    x, y, config = x[:SCORED_ROWS], y[:SCORED_ROWS], trainer.dictionary.config
    truth = at_truth(config, features, trainer.x_norm, trainer.y_norm)
    if isinstance(config.activation, BatchTopK):
        calibrate(truth, lambda: [x])
    return measure_code(truth, [(x, y)])[0].fvu


def _absorption(size: Size, result: Dictionary, x: Tensor, data: Data, writes: Sequence[int]) -> dict[str, Any]:
    """Absorption of the parents that an anchored arm is given, and of the others."""
    assert size.bench.hierarchy is not None
    features, rows = side_by_side(data.features, writes), slice(0, SCORED_ROWS)
    found = {}
    for name, given in (("absorption", False), ("absorption_of_anchored", True)):
        families = [f for f in size.bench.hierarchy.families() if (f[0] < size.anchors) == given]
        if families:
            of = absorption(result, x[rows], data.coefficients[rows], features, families)
            found[name] = {k: None if isnan(v) else v for k, v in {**asdict(of), "rate": of.rate}.items()}  # as JSON
    return found


def make_trainer(size: Size, method: Method, cell: Cell, data: Data) -> DictionaryTrainer:
    reads, writes = LAYOUTS[method.layout]
    norms = [_normalisation(rows) for rows in data.sources]
    training = training_of(size, method, cell.seed)
    if cell.arm == TRUTH:  # begins at its anchors, and is not held there
        training = replace(training, objective=replace(training.objective, anchoring=0.0))
    return DictionaryTrainer(
        Dictionary(config_of(size, method)),
        training,
        Normalisation.side_by_side([norms[i] for i in reads]),
        Normalisation.side_by_side([norms[i] for i in writes]),
        _anchors(size, method, cell, data.features),
    )


def _anchors(size: Size, method: Method, cell: Cell, features: Sequence[Tensor]) -> Anchors | None:
    if cell.arm == "plain":
        return None
    given = {str(i): W if cell.arm == TRUTH else W[: size.anchors] for i, W in enumerate(features)}
    given = controlled(given, "random" if cell.arm == "random" else "none", cell.seed)
    of_sources = [given[str(i)] for i in range(len(features))]
    reads, writes = LAYOUTS[method.layout]
    return Anchors(
        None if method.sides == "decoder" else side_by_side(of_sources, reads),
        None if method.sides == "encoder" else side_by_side(of_sources, writes),
    )


def _normalisation(rows: Tensor) -> Normalisation:
    mean = rows.mean(0)
    return Normalisation.of(mean, (rows - mean).square().sum(1).mean().item())


def side_by_side(parts: Sequence[Tensor], which: Sequence[int]) -> Tensor:
    return parts[which[0]] if len(which) == 1 else torch.cat([parts[i] for i in which], dim=1)


def batches(size: Size, seed: int) -> Iterator[Tensor]:
    """The samples of each step, in epochs of a seeded order each."""
    generator = torch.Generator().manual_seed(7919 + seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(size.steps):
        while len(order) < size.batch_rows:
            order = torch.cat([order, torch.randperm(size.bench.samples, generator=generator)])
        yield order[: size.batch_rows]
        order = order[size.batch_rows :]
