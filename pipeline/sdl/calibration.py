"""The threshold that takes the batch's place when a BatchTopK dictionary is used: exact, on held-out rows.

It is the (k N + 1)-th largest of all preactivations (times the weights they compete with) of N rows, so that k N are
above it: found digit by digit. A positive float32, read as an integer, sorts as the float does; one pass over the rows
counts the upper half of those bits, and a second one, within the half that holds the threshold, the lower.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.activations import BatchTopK
from pipeline.sdl.dictionary import Block, Dictionary

LOWER_BITS = 16


@torch.no_grad()
def calibrate(
    dictionary: Dictionary, rows: Callable[[], Iterable[Tensor]], competing: Sequence[Tensor | None] | None = None
) -> None:
    """Set the thresholds of a finished BatchTopK dictionary so that on these rows k latents are active on average.

    `rows` gives the same batches [n, d_in] float32 of raw activations each time it is called. `competing`: for each
    block the weights [latents] with which preactivations competed in training (`DictionaryTrainer.competing`), if any.
    Raises InputError for other activations, and where there is no row.
    """
    blocks = dictionary.each_block()
    for block, weights in zip(blocks, competing or [None] * len(blocks), strict=True):
        if not isinstance(block.activation, BatchTopK):
            raise InputError(f"{block.activation.kind} has no threshold to calibrate; batch_topk has")
        weights = torch.ones_like(block.b_enc) if weights is None else weights.to(block.b_enc)
        block.own("threshold").copy_(_unweighted(_threshold(block, weights, rows, block.activation.k), weights))


def _threshold(block: Block, weights: Tensor, rows: Callable[[], Iterable[Tensor]], k: int) -> float:
    count, upper = 0, torch.zeros(1 << 15, dtype=torch.int64)
    for x in rows():
        count += len(x)
        upper += torch.bincount(_bits(block, weights, x) >> LOWER_BITS, minlength=len(upper))
    if count == 0:
        raise InputError("no rows to calibrate the threshold on")
    wanted = k * count + 1  # the threshold's own place, counted from the largest
    above = upper.flip(0).cumsum(0).flip(0)
    if above[0] < wanted:  # fewer are positive at all: let all of them pass
        return 0.0
    digit = int((above >= wanted).nonzero()[-1])
    wanted -= int(above[digit + 1]) if digit + 1 < len(above) else 0
    lower = torch.zeros(1 << LOWER_BITS, dtype=torch.int64)
    for x in rows():
        bits = _bits(block, weights, x)
        lower += torch.bincount(bits[bits >> LOWER_BITS == digit] & 0xFFFF, minlength=len(lower))
    within = lower.flip(0).cumsum(0).flip(0)
    bits_found = (digit << LOWER_BITS) + int((within >= wanted).nonzero()[-1])
    return torch.tensor(bits_found, dtype=torch.int32).view(torch.float32).item()


def _unweighted(threshold: float, weights: Tensor) -> Tensor:
    """For each latent the largest float32 t with t * weight <= threshold: as many are above t as times weight above it.

    A quotient alone is rounded, and lets what is the threshold itself pass now and then.
    """
    if threshold == 0:
        return torch.zeros_like(weights)
    found = threshold / weights
    for _ in range(4):  # a quotient is off by less
        above = torch.nextafter(found, torch.full_like(found, torch.inf))
        found = torch.where(above * weights <= threshold, above, found)
        below = torch.nextafter(found, torch.zeros_like(found))
        found = torch.where(found * weights > threshold, below, found)
    return torch.where(weights > 0, found, torch.inf)


def _bits(block: Block, weights: Tensor, x: Tensor) -> Tensor:
    """The bits of the positive preactivations, as int32."""
    scores = block.preactivations(x[:, block.shape.reads].to(block.W_enc)) * weights
    return scores[scores > 0].view(torch.int32)
