"""Which entries of a code are kept: the one thing that must look at every preactivation.

The product is made slab by slab, while a slab is in the cache, in bfloat16 (or float32); what is kept is computed again
in float32 by `Places.encode`. So which entries are kept is the choice of rounded preactivations, where the least kept
and the largest dropped are nearly equal, and everything else is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.sdl.sparse import Places

SLAB_ROWS = 256
"""Rows whose preactivations exist at once."""
SPARSE_SHARE = 0.03
"""Share of entries above which dense products are as fast."""
NEARLY = 0.01
"""Lowers a floor that bfloat16 is compared with by six times the usual error of a product."""
GROUP = 8
"""Columns of which the largest is looked at first."""


def dense_top_k(preactivations: Tensor, k: int) -> Tensor:
    """Keep the k largest entries of each row where they are positive; zero elsewhere. Gradients flow to the kept."""
    values, index = preactivations.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(preactivations).scatter(-1, index, values.relu())


def dense_batch_top_k(preactivations: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Keep the k * rows entries of [rows, latents] whose value times weight [latents] is largest, where positive."""
    scores = preactivations if weights is None else preactivations * weights
    index = scores.flatten().topk(k * len(preactivations), sorted=False).indices
    values = preactivations.flatten()[index].relu()
    return torch.zeros_like(preactivations).flatten().scatter(0, index, values).view_as(preactivations)


@torch.no_grad()
def select_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> Places:
    """The places of the k largest preactivations of each row; x [rows, d], W_enc [latents, d]."""
    latent = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for rows, preactivations in _slabs(x, W_enc, b_enc, dtype):
        latent[rows] = top_k_of_rows(preactivations, k).sort(1).values
    return Places(torch.arange(0, k * len(x) + 1, k, device=x.device), latent.view(-1), len(W_enc))


@torch.no_grad()
def select_batch_top_k(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, weights: Tensor | None = None
) -> Places:
    """The places of the k * rows largest preactivations (times `weights` [latents], if given) of the whole batch.

    First the 2k largest of each row; the k * rows largest of those are the batch's unless one of them is the least of
    its row's: such rows hide more, and are looked at again with twice as many.
    """
    if weights is not None:
        W_enc, b_enc = W_enc * weights[:, None], b_enc * weights
    latents, kept = len(W_enc), k * len(x)
    width = min(2 * k, latents)
    scores = torch.empty(len(x), width, dtype=dtype, device=x.device)
    latent = torch.empty(len(x), width, dtype=torch.int64, device=x.device)
    for rows, preactivations in _slabs(x, W_enc, b_enc, dtype):
        latent[rows] = top_k_of_rows(preactivations, width)
        scores[rows] = preactivations.gather(1, latent[rows])
    while True:
        least = scores.flatten().float().topk(kept).values[-1]
        crowded = (scores.amin(1) >= least).nonzero().squeeze(1) if width < latents else latent.new_empty(0)
        if len(crowded) == 0:
            break
        wider = min(2 * width, latents)
        scores = torch.nn.functional.pad(scores, (0, wider - width), value=-torch.inf)
        latent = torch.nn.functional.pad(latent, (0, wider - width))
        for rows, preactivations in _slabs(x[crowded], W_enc, b_enc, dtype):
            latent[crowded[rows]] = top_k_of_rows(preactivations, wider)
            scores[crowded[rows]] = preactivations.gather(1, latent[crowded[rows]])
        width = wider
    chosen = scores.flatten().topk(kept, sorted=False).indices
    row, latent = chosen // width, latent.flatten()[chosen]
    order = (row * latents + latent).argsort()
    starts = latent.new_zeros(len(x) + 1)
    torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=starts[1:])
    return Places(starts, latent[order], latents)


@torch.no_grad()
def select_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor | float, dtype: torch.dtype) -> Places | None:
    """The places of the preactivations above `floor` ([latents], or one for all), and of some that are nearly so.

    None as soon as they are more than SPARSE_SHARE of all looked at. In bfloat16 the factors of a product are off by
    some thousandths, and so is a product with x, of ||x|| ||w|| / sqrt(d): the floor is lowered by NEARLY of that. Near
    the floor the product, the bias, their sum and the floor are rounded too, each by at most 2^-9 of |floor| + |bias|.
    So hardly any above the floor is missed.
    """
    latents, found, count = len(W_enc), [], 0
    floors = torch.as_tensor(floor, device=x.device)
    if dtype != torch.float32:
        size = torch.linalg.vector_norm(x, dim=1).median() / x.shape[1] ** 0.5
        floors = floors - NEARLY * size * torch.linalg.vector_norm(W_enc, dim=1) - (floors.abs() + b_enc.abs()) / 2**7
    lowered = floors.to(dtype)
    for rows, preactivations in _slabs(x, W_enc, b_enc, dtype):
        places = (preactivations > lowered).nonzero()
        count += len(places)
        if count > SPARSE_SHARE * rows.stop * latents:
            return None
        found.append(torch.stack([places[:, 0] + rows.start, places[:, 1]]))
    row, latent = torch.cat(found, dim=1)
    starts = latent.new_zeros(len(x) + 1)
    torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=starts[1:])
    return Places(starts, latent.contiguous(), latents)


def _slabs(x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Preactivations of x, some rows at a time. The next slab overwrites the one before."""
    weights, bias, inputs = W_enc.to(dtype).T, b_enc.to(dtype), x.to(dtype)
    out = torch.empty(min(SLAB_ROWS, len(x)), len(W_enc), dtype=dtype, device=x.device)
    for start in range(0, len(x), SLAB_ROWS):
        rows = slice(start, min(start + SLAB_ROWS, len(x)))
        yield rows, torch.mm(inputs[rows], weights, out=out[: rows.stop - start]).add_(bias)


def top_k_of_rows(values: Tensor, k: int) -> Tensor:
    """The columns of the k largest entries of each row of [rows, n], in any order -> int64 [rows, k].

    Through groups of columns: a group whose largest entry is not among the k largest of the groups' holds none of the k
    largest, so only k groups are looked at closely; the groups' largest are sought in the same way. The result is that
    of `topk`, ties aside.
    """
    rows, n = values.shape
    if n % GROUP or n < 2 * GROUP * k:
        return values.topk(k, sorted=False).indices
    grouped = values.view(rows, GROUP, n // GROUP)  # group j has the columns j, j + n / GROUP, ...
    group = top_k_of_rows(grouped.amax(1), k)
    members = grouped.gather(2, group[:, None].expand(rows, GROUP, k)).view(rows, GROUP * k)
    place = members.topk(k, sorted=False).indices
    return place // k * (n // GROUP) + group.gather(1, place % k)
