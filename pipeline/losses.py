"""The terms of the training loss. Each takes tensors and returns a scalar."""

import torch
from torch import Tensor
from torch.nn import functional


def reconstruction_loss(y: Tensor, y_hat: Tensor, total_variance: float) -> Tensor:
    """Mean over rows of ||y - y_hat||^2, divided by E||y - E y||^2: the share of variance unexplained (FVU)."""
    return (y - y_hat).square().sum(-1).mean() / total_variance


def auxiliary_loss(residual: Tensor, preactivations: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, A.2): the k strongest dead latents reconstruct the residual.

    `residual` [rows, d_out] is y - y_hat, detached here; b_dec has no part in it. Divided by the residual's variance.
    Gives gradient to the dead latents' encoder and decoder rows alone.
    """
    residual = residual.detach()
    index = dead.nonzero().squeeze(-1)
    k = min(k, len(index))
    values, chosen = preactivations[:, index].topk(k, dim=-1, sorted=False)
    z = values.new_zeros(len(residual), len(index)).scatter(-1, chosen, values.relu())
    error = (residual - z @ W_dec[index]).square().sum(-1).mean()
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    # A residual without variance (one row, or a constant) has no scale to divide by: then the term is left out.
    has_scale = variance > 1e-12 * residual.square().sum(-1).mean()
    return torch.where(has_scale, error / torch.where(has_scale, variance, 1.0), 0.0)


def anchoring_loss(W_enc: Tensor, W_dec: Tensor, anchors_in: Tensor, anchors_out: Tensor) -> Tensor:
    """||W_enc[:k] - A_p||_F^2 + ||W_dec[:k] - A_r||_F^2 (arXiv 2512.05534, the anchoring term), rows as latents.

    `anchors_in` [k, d_in] and `anchors_out` [k, d_out] are unit vectors in the normalised space.
    """
    k = len(anchors_in)
    return (W_enc[:k] - anchors_in).square().sum() + (W_dec[:k] - anchors_out).square().sum()


def unit_rows(vectors: Tensor) -> Tensor:
    """Scale each row to norm 1; a zero row stays zero."""
    return functional.normalize(vectors, dim=-1)
