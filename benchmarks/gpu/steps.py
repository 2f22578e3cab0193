"""A TopK training step beside the encoder's product alone, and what its parts take.

`ours` gets rows as a trainer does: bfloat16 in the host's ordinary memory. `ours, rows on the card` leaves that copy
out.
"""

import statistics
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harvesting import begin_memory, peak_gib
from benchmarks.gpu.plan import StepCase
from benchmarks.gpu.rounds import in_turn, ratio, repeated
from pipeline.precision import TYPES
from pipeline.sdl.dictionary.activations import TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.selection import select_top_k
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig, default_learning_rate
from pipeline.sdl.train.losses import reconstruction_loss
from pipeline.sdl.train.trainer import DictionaryTrainer

BATCHES = 4
"""Batches that are given again and again."""
STEPS = 10**9
"""So far from the end that the learning rate stays as it is."""
PIECES = 5
"""Times that each part is run."""


def measure_step(case: StepCase, device: torch.device, round_s: float) -> dict[str, Any]:
    """Return seconds a step, ratios to the product, the parts of a step, and memory."""
    begin_memory(device)
    trainer = make_trainer(case, device)
    generator = torch.Generator(device).manual_seed(0)
    on_card = [
        torch.randn(case.batch_rows, case.d, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(BATCHES)
    ]
    on_host = [rows.cpu() for rows in on_card]
    ours, product = stepping(trainer, on_host), encoder_product(trainer, on_card[0])
    ours()
    product()
    seconds = in_turn(
        {
            "ours": repeated(ours, device),
            "ours, rows on the card": repeated(stepping(trainer, on_card), device),
            "product": repeated(product, device),
        },
        round_s,
    )
    flops = 2 * case.batch_rows * case.d * case.latents
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    return {
        "seconds": medians,
        "step_of_product": ratio(seconds["ours"], seconds["product"]),
        "step_on_card_of_product": ratio(seconds["ours, rows on the card"], seconds["product"]),
        "rows_per_s": case.batch_rows / medians["ours"],
        "product_tflops": flops / medians["product"] / 1e12,
        "products": vars(trainer.products),
        "pieces": pieces_of(trainer, on_card, device),
        "rounds": len(seconds["ours"]),
        "peak_gib": peak_gib(device),
    }


def make_trainer(case: StepCase, device: torch.device) -> DictionaryTrainer:
    """Return a trainer with the defaults, on rows that are normalised already."""
    shape = DictionaryConfig(("x",), ("x",), (case.d,), (case.d,), case.latents, TopK(case.k))
    training = TrainingConfig(STEPS, case.batch_rows, default_learning_rate(case.latents, STEPS), warmup_share=0.0)
    norm = Normalisation(torch.zeros(case.d), torch.ones(case.d))
    return DictionaryTrainer(Dictionary(shape), training, norm, norm, device=device.type)


def stepping(trainer: DictionaryTrainer, batches: list[Tensor]) -> Callable[[], object]:
    rows = cycle(batches)

    def step() -> object:
        x = next(rows)
        return trainer.step(x, x)

    return step


def encoder_product(trainer: DictionaryTrainer, rows: Tensor) -> Callable[[], object]:
    """Return the product of a batch and the encoder, both in the type that latents are selected with."""
    dtype = TYPES[trainer.products.selection]
    x, W_enc = rows.to(dtype), trainer.dictionary.W_enc.detach().to(dtype)
    out = torch.empty(len(x), len(W_enc), dtype=dtype, device=x.device)
    return lambda: torch.mm(x, W_enc.T, out=out)


def pieces_of(trainer: DictionaryTrainer, batches: list[Tensor], device: torch.device) -> dict[str, float]:
    """Return median seconds of the parts of a step, each waited for: together they take longer than a step."""
    dictionary, dtype = trainer.dictionary, TYPES[trainer.products.selection]
    activation, d = dictionary.config.activation, float(dictionary.config.d_out)
    assert isinstance(activation, TopK)
    k, taken = activation.k, dict[str, list[float]]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        found: list[Any] = []
        taken.setdefault(name, []).append(repeated(lambda: found.append(work()), device)(1))
        return found[0]

    W_enc, b_enc, W_dec = dictionary.W_enc, dictionary.b_enc, dictionary.W_dec
    for _, rows in zip(range(PIECES), cycle(batches), strict=False):
        x = trainer.x_norm(rows)
        places = timed("select", lambda: select_top_k(x, W_enc, b_enc, k, dtype))  # noqa: B023
        with torch.no_grad():
            values = timed("encode", lambda: places.encode(x, W_enc, b_enc))  # noqa: B023
            timed("decode", lambda: places.decode(values, W_dec))  # noqa: B023
        codes = dictionary.codes(x, trainer.products)
        (y,) = dictionary.reconstructions(codes, x)
        timed("backward", reconstruction_loss(x - y, d).backward)
        timed("update", trainer._update)
    return {name: statistics.median(of) for name, of in taken.items()}
