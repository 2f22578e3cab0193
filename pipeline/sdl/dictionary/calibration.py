"""The threshold that takes the batch's place when a BatchTopK dictionary is used: exact, on held-out rows.

It is the (k N + 1)-th largest of all preactivations (times the weights they compete with) of N rows, so that k N are
above it: found digit by digit. A positive float32, read as an integer, sorts as the float does; one pass over the rows
counts the upper half of those bits, and a second one, within the half that holds the threshold, the lower.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import BatchTopK
from pipeline.sdl.dictionary.dictionary import Block, Dictionary
from pipeline.sdl.dictionary.normalisation import not_finite_columns

LOWER_BITS = 16


@torch.no_grad()
def calibrate(
    dictionary: Dictionary,
    rows: Callable[[], Iterable[Tensor]],
    competing: Sequence[Tensor | None] | None = None,
    l0: float | None = None,
) -> None:
    """Set the thresholds of a finished BatchTopK dictionary: on these rows, k latents of each block are active on
    average, or `l0` of them. An L0 a little below k costs less than training with a smaller k (benchmarks/README).

    `rows`, which is called twice, gives the same batches [n, d_in] float32 of raw activations each time. `competing`:
    for each block the weights [latents] with which preactivations competed in training
    (`DictionaryTrainer.competing`), if any. Raises InputError for other activations, where there is no row, where rows
    are not finite, where there are others the second time, and for an `l0` that is not above 0 and at most the latents.
    """
    activation, blocks = dictionary.config.activation, dictionary.each_block()
    if not isinstance(activation, BatchTopK):
        raise InputError(f"{activation.kind} has no threshold to calibrate; batch_topk has")
    asked = activation.k if l0 is None else l0
    if not 0 < asked <= dictionary.config.latents:
        raise InputError(f"an L0 is above 0 and at most latents = {dictionary.config.latents}, unlike {asked}")
    searches = [
        _Search(block, torch.ones_like(block.b_enc) if weights is None else weights.to(block.b_enc))
        for block, weights in zip(blocks, competing or [None] * len(blocks), strict=True)
    ]
    count = 0
    for x in rows():
        if wrong := not_finite_columns(x):
            raise InputError(f"calibration: activations are nan or infinite in {wrong}; verify the store")
        count += len(x)
        for search in searches:
            search.count_upper(x)
    if count == 0:
        raise InputError("no rows to calibrate the threshold on")
    for search in searches:
        search.settle_upper(round(asked * count) + 1)  # the threshold's own place, counted from the largest
    again = 0
    for x in rows():
        again += len(x)
        for search in searches:
            search.count_lower(x)
    if again != count:
        raise InputError(
            f"calibration: `rows` gave {count} rows when it was called first and then {again}; it is to give the same "
            "ones each time it is called (a function that opens them, not one that returns an iterator)"
        )
    for search in searches:
        search.block.own("threshold").copy_(_unweighted(search.found(), search.weights))


class _Search:
    """The search for one block's threshold: the upper digit first, then, within it, the lower one."""

    def __init__(self, block: Block, weights: Tensor):
        self.block, self.weights = block, weights
        self.upper = torch.zeros(1 << 15, dtype=torch.int64)
        self.lower = torch.zeros(1 << LOWER_BITS, dtype=torch.int64)
        self.digit: int | None = None
        """None: fewer entries are positive than are asked for, and all of them pass."""
        self.wanted = 0

    def count_upper(self, x: Tensor) -> None:
        self.upper += torch.bincount(self._bits(x) >> LOWER_BITS, minlength=len(self.upper))

    def settle_upper(self, wanted: int) -> None:
        above = self.upper.flip(0).cumsum(0).flip(0)
        if above[0] >= wanted:
            self.digit = int((above >= wanted).nonzero()[-1])
            self.wanted = wanted - (int(above[self.digit + 1]) if self.digit + 1 < len(above) else 0)

    def count_lower(self, x: Tensor) -> None:
        if self.digit is not None:
            bits = self._bits(x)
            here = bits[bits >> LOWER_BITS == self.digit] & 0xFFFF
            self.lower += torch.bincount(here, minlength=len(self.lower))

    def found(self) -> float:
        if self.digit is None:
            return 0.0
        within = self.lower.flip(0).cumsum(0).flip(0)
        bits = (self.digit << LOWER_BITS) + int((within >= self.wanted).nonzero()[-1])
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()

    def _bits(self, x: Tensor) -> Tensor:
        """The bits of the positive preactivations, as int32."""
        scores = self.block.preactivations(x[:, self.block.shape.reads].to(self.block.W_enc)) * self.weights
        return scores[scores > 0].view(torch.int32)


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
