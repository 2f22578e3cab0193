"""The terms of the training loss. Each takes tensors and returns a scalar; `pipeline.sdl.train.objective` weighs them.

Activations are normalised to E||y||^2 = d (d summed over output sites), so the mean squared error divided by d is the
share of variance unexplained, FVU. `gates` are what sparsity is asked of, `norms` the decoders' norms: each is a sum
over latents and a mean over rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.dictionary import Block, Dictionary, add_columns


def reconstruction_loss(residual: Tensor, total_variance: float) -> Tensor:
    """Mean over rows of ||y - y_hat||^2, divided by E||y - E y||^2; `residual` is y - y_hat [rows, d]."""
    return residual.square().sum() / (len(residual) * total_variance)


def l1_loss(code: Code, norms: Tensor) -> Tensor:
    """sum_i z_i ||W_dec,i|| (Anthropic, April 2024; summed over sites for crosscoders)."""
    return (code.gates * code.of_entries(norms)).sum() / code.rows


def tanh_loss(code: Code, norms: Tensor, scale: float) -> Tensor:
    """sum_i tanh(scale z_i ||W_dec,i||), a smooth L0 (Anthropic, January 2025)."""
    return (scale * code.gates * code.of_entries(norms)).tanh().sum() / code.rows


def p_norm_loss(code: Code, norms: Tensor, p: float) -> Tensor:
    """sum_i (z_i ||W_dec,i||)^p over active latents (Karvonen et al. 2024, arXiv 2408.00113).

    Multiplied, without gradient, so that its value is that of `l1_loss`: one weight then fits all powers.
    """
    scaled = code.gates * code.of_entries(norms)
    powers = torch.where(scaled > 0, scaled, 1.0).pow(p).where(scaled > 0, 0).sum()
    size = scaled.detach().sum() / powers.detach().clamp(min=1e-30)
    return size * powers / code.rows


def preactivation_loss(x: Tensor, block: Block, dead: Tensor) -> Tensor:
    """sum over dead latents of max(0, threshold_i - preactivation_i) ||W_dec,i|| (Anthropic, January 2025).

    Pulls dead latents' encoders and biases toward activity; thresholds and decoders get no gradient.
    """
    index = dead.nonzero().squeeze(-1)
    preactivations = functional.linear(x, block.W_enc[index], block.b_enc[index])
    threshold = block.own("threshold").detach()[index] if "threshold" in block.activation.trained else 0.0
    return ((threshold - preactivations).relu() * block.decoder_norms().detach()[index]).sum() / len(x)


def auxiliary_loss(residual: Tensor, x: Tensor, block: Block, dead: Tensor, k: int) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, A.2): the k strongest dead latents reconstruct the residual.

    `residual` [rows, d] is y - y_hat of the columns that the block writes, detached here; b_dec has no part in it.
    Divided by the residual's variance. Gives gradient to the dead latents' encoder and decoder rows alone.
    """
    residual = residual.detach()
    index = dead.nonzero().squeeze(-1)
    preactivations = functional.linear(x, block.W_enc[index], block.b_enc[index])
    values, chosen = preactivations.topk(min(k, len(index)), dim=-1, sorted=False)
    z = values.new_zeros(len(residual), len(index)).scatter(-1, chosen, values.relu())
    error = (residual - z @ block.W_dec[index]).square().sum(-1).mean()
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    # A residual without variance (one row, or a constant) has no scale to divide by: then the term is left out.
    has_scale = variance > 1e-12 * residual.square().sum(-1).mean()
    return torch.where(has_scale, error / torch.where(has_scale, variance, 1.0), 0.0)


def gate_loss(y: Tensor, dictionary: Dictionary, codes: Sequence[Code], x: Tensor, total_variance: float) -> Tensor:
    """A gated dictionary's auxiliary reconstruction from its gates alone, the decoder as it is (2404.16014, eq. 8).

    ||y - (relu(gate) sg(W_dec) + sg(b_dec))||^2: gives gradient to the gates' encoders and biases alone.
    """
    residual = y - dictionary.base(x, len(x)).detach()
    for block, code in zip(dictionary.each_block(), codes, strict=True):
        residual = add_columns(residual, -code.decode_gates(block.W_dec.detach()), block.shape.writes)
    return reconstruction_loss(residual, total_variance)


def squared_anchoring(W: Tensor, anchors: Tensor) -> Tensor:
    """||W[:k] - A||_F^2 for anchors [k, d] (arXiv 2512.05534, the anchoring term), rows as latents."""
    return (W[: len(anchors)] - anchors).square().sum()


def cosine_anchoring(W: Tensor, anchors: Tensor) -> Tensor:
    """sum_i 1 - cos(W_i, A_i): the same pull whatever the norms of the weights are."""
    return (1 - functional.cosine_similarity(W[: len(anchors)], anchors, dim=1)).sum()


def unit_rows(vectors: Tensor) -> Tensor:
    """Scale each row to norm 1; a zero row stays zero."""
    # By a power of two first, which changes no digit: squares of short or long rows are neither zero nor infinite then.
    exponent = torch.frexp(vectors.abs().amax(-1, keepdim=True)).exponent
    return functional.normalize(torch.ldexp(vectors, -exponent), dim=-1)
