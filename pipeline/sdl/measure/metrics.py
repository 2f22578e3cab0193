"""Measuring a dictionary: reconstruction, sparsity, and how well latents tell subpopulations apart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.dictionary import Dictionary


@dataclass(frozen=True)
class CodeMetrics:
    """Figures over some rows."""

    rows: int
    fvu: float
    """sum ||y - y_hat||^2 / sum ||y - mean y||^2 over these rows; 0 is perfect, 1 is the mean."""
    site_fvu: dict[str, float]
    """The same of each output site: in the sum of several, one of large activations hides the others."""
    l0: float
    """Mean number of active latents of a row."""
    dead_share: float
    """Share of latents that never fired on these rows."""
    density: list[float]
    """For each latent the share of rows on which it fired."""


@torch.inference_mode()
def measure_code(
    dictionary: Dictionary, batches: Iterable[tuple[Tensor, Tensor]], keep_codes: Sequence[int] | None = None
) -> tuple[CodeMetrics, Tensor]:
    """Encode and decode (x, y) batches, [rows, d] each. Return the metrics and the codes [rows, latents], float32.

    `keep_codes` restricts the returned codes to those latents. Raises InputError where an output site has no variance.
    """
    device, config = dictionary.b_dec.device, dictionary.config
    fired = torch.zeros(config.total_latents, dtype=torch.int64)
    y_sum, squares, error = torch.zeros(3, config.d_out, dtype=torch.float64)
    rows = 0
    codes = []
    for x, y in batches:
        x = x.to(device)
        z = dictionary.encode(x)
        residual = y - dictionary.decode(z, x).cpu()
        z = z.cpu()
        error += residual.double().square().sum(0)
        squares += y.double().square().sum(0)
        y_sum += y.double().sum(0)
        fired += (z > 0).sum(0)
        rows += len(x)
        codes.append(z if keep_codes is None else z[:, list(keep_codes)])
    variance = squares - y_sum.square() / rows
    site_error, site_variance = (
        {site: of.sum().item() for site, of in zip(config.output, sums.split(config.output_widths), strict=True)}
        for sums in (error, variance)
    )
    if constant := [site for site, of in site_variance.items() if not of > 0]:
        raise InputError(f"{rows} rows have no variance at {', '.join(constant)}: measure on more rows")
    density = fired / rows
    metrics = CodeMetrics(
        rows=rows,
        fvu=(error.sum() / variance.sum()).item(),
        site_fvu={site: site_error[site] / site_variance[site] for site in config.output},
        l0=density.sum().item(),
        dead_share=(fired == 0).float().mean().item(),
        density=density.tolist(),
    )
    return metrics, torch.cat(codes)


@torch.inference_mode()
def auroc(codes: Tensor, member: Tensor) -> Tensor:
    """Area under the ROC curve of each latent as a score for each group.

    `codes` [rows, latents], `member` bool [rows, groups] -> float64 [latents, groups]; ties count one half (the
    Mann-Whitney statistic). nan for a group with no member or no other row.
    """
    rows = len(codes)
    members = member.double()
    inside = members.sum(0)
    areas = torch.empty(codes.shape[1], member.shape[1], dtype=torch.float64)
    for latent in range(codes.shape[1]):
        # Codes are mostly zero: only what is not is sorted; the zeros share one rank, between negatives and positives.
        values = codes[:, latent]
        active = values.nonzero().squeeze(1)
        values = values[active]
        zeros, negatives = rows - len(active), int((values < 0).sum())
        ranks = _average_ranks(values) + zeros * (values > 0)
        of_active, of_zeros = members[active], negatives + (zeros + 1) / 2
        rank_sum = ranks @ of_active + of_zeros * (inside - of_active.sum(0))
        areas[latent] = rank_sum - inside * (inside + 1) / 2
    return areas / (inside * (rows - inside))


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64; equal values share their mean rank."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[group]
    return ranks
