"""Which entries of a code are kept: the one thing that must look at every preactivation.

The product is made slab by slab, while a slab is in the cache, in bfloat16 (or float32); what is kept is computed again
in float32 by `Places.encode`. So which entries are kept is the choice of rounded preactivations, where the least kept
and the largest dropped are nearly equal, and everything else is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.sdl.dictionary.sparse import Places

SLAB_ROWS = 256
"""Rows whose preactivations exist at once."""
SPARSE_SHARE = 0.03
"""Share of entries above which dense products are as fast."""
NEARLY = 0.01
"""Lowers a floor by six times the usual error of a product in bfloat16."""
SAMPLE_ROWS = 64
"""Rows from which the floor of a batch is guessed."""
SAMPLE_MARGIN = 1.3
"""How many times the entries wanted the floor is to let through, by these rows."""
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

    A floor that lets through somewhat more is guessed from some of the rows; of what is above it, the largest are kept.
    Where it lets through too few, it is lowered until it does not.
    """
    latents, kept = len(W_enc), k * len(x)
    encoder, bias = W_enc.to(dtype), b_enc.to(dtype)
    if weights is not None:
        encoder, bias = encoder.mul(weights.to(dtype)[:, None]), bias * weights.to(dtype)
    sample = x[:: max(1, len(x) // SAMPLE_ROWS)].to(dtype)
    scores = torch.addmm(bias, sample, encoder.T).flatten()
    margin = SAMPLE_MARGIN
    while True:
        wanted = min(len(scores), int(margin * k * len(sample)))
        everything = wanted == len(scores)
        floor = -torch.inf if everything else float(scores.topk(wanted, sorted=False).values.min())
        shift = 0.0 if everything else floor
        parts = [
            (rows.start + row, latent, value)
            for rows, above in _slabs(x, encoder, bias - shift, dtype)
            for row, latent, value in [_entries(above, everything)]
        ]
        row, latent, value = (torch.cat(part) for part in zip(*parts, strict=True))
        if len(value) >= kept:
            break
        margin *= 2
    chosen = value.topk(kept, sorted=False).indices
    return _in_order(row[chosen], latent[chosen], len(x), latents)


@torch.no_grad()
def select_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor | float, dtype: torch.dtype) -> Places | None:
    """The places of the preactivations above `floor` ([latents], or one for all), and of some that are nearly so.

    None as soon as they are more than SPARSE_SHARE of all looked at. In bfloat16 the factors of a product are off by
    some thousandths, and so is a product with x, of ||x|| ||w|| / sqrt(d): the floor is lowered by NEARLY of that. Near
    the floor the product and what is added to it are rounded too, each by at most 2^-8 of itself. So hardly any above
    the floor is missed.
    """
    found, count = [], 0
    over = b_enc - floor
    if dtype != torch.float32:
        size = torch.linalg.vector_norm(x, dim=1).median() / x.shape[1] ** 0.5
        over = over + NEARLY * size * torch.linalg.vector_norm(W_enc, dim=1) + over.abs() / 2**7
    for rows, above in _slabs(x, W_enc, over, dtype):
        row, latent, _ = _entries(above)
        count += len(row)
        if count > SPARSE_SHARE * rows.stop * len(W_enc):
            return None
        found.append((rows.start + row, latent))
    row, latent = (torch.cat(part) for part in zip(*found, strict=True))
    return _in_order(row, latent, len(x), len(W_enc))


def _in_order(row: Tensor, latent: Tensor, rows: int, latents: int) -> Places:
    order = (row * latents + latent).argsort()
    starts = latent.new_zeros(rows + 1)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=starts[1:])
    return Places(starts, latent[order], latents)


def _entries(values: Tensor, everything: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the positive entries of [rows, n], or of all of them.

    Through groups of columns, as in `top_k_of_rows`: only where a group's largest entry is positive are all looked at.
    """
    rows, n = values.shape
    if everything or n % GROUP:
        places = torch.ones_like(values, dtype=torch.bool).nonzero() if everything else (values > 0).nonzero()
        row, column = places.unbind(1)
        return row, column, values[row, column]
    grouped = values.view(rows, GROUP, n // GROUP)
    row, group = (grouped.amax(1) > 0).nonzero().unbind(1)
    members = grouped[row, :, group]
    which, member = (members > 0).nonzero().unbind(1)
    return row[which], member * (n // GROUP) + group[which], members[which, member]


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
