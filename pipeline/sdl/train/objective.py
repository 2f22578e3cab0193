"""What a dictionary is trained to lower: the reconstruction's FVU plus weighted terms, and which terms go together.

Weights are those that the papers print. Their errors are summed over d dimensions with E||y||^2 = d; ours is divided by
d, and so are the terms that were measured against theirs (l1, tanh, p_norm, preactivation). The others are relative to
an error of 1: l0 (Gemma Scope normalises to E||y||^2 = 1), auxk, anchoring.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checks import not_negative, positive, positive_shares, shares, whole
from pipeline.sdl.dictionary.activations import Gated, JumpReLU
from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.dictionary import Block, Dictionary
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.losses import (
    auxiliary_loss,
    cosine_anchoring,
    gate_loss,
    l1_loss,
    p_norm_loss,
    preactivation_loss,
    reconstruction_loss,
    squared_anchoring,
    tanh_loss,
    unit_rows,
)

SPARSITY = ("l1", "l0", "tanh", "p_norm")


@dataclass(frozen=True)
class Objective:
    """The weights of the terms; 0 leaves one out."""

    l1: float = 0.0
    """Sum of the code weighted by the decoders' norms; 5 is Anthropic's (April 2024)."""
    l0: float = 0.0
    """Count of active latents, through JumpReLU's thresholds; with `l0_target` of its squared relative distance."""
    l0_target: float | None = None
    """The L0 that is asked for: l0 then weighs (L0 / target - 1)^2."""
    tanh: float = 0.0
    """Smooth count of active latents (Anthropic, January 2025)."""
    tanh_scale: float = 4.0
    p_norm: float = 0.0
    """Sum of the code to the power p, which falls from 1, at the size of the l1 term (Karvonen et al. 2024)."""
    p_end: float = 0.2
    """The power at the end of training."""
    p_start: float = 0.5
    """Share of the steps after which it begins to fall."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which the weights of l1, l0, tanh and p_norm rise from zero."""
    auxk: float = 1 / 32
    """Reconstruction of the residual by dead latents (Gao et al. 2024)."""
    auxk_k: int | None = None
    """Dead latents that take part at once; half the output's width, if not given."""
    preactivation: float = 0.0
    """Pull of dead latents toward activity; 3e-6 is Anthropic's (January 2025)."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): the latents before each of these numbers reconstruct too;
    the loss is the mean of all prefixes' losses, the whole dictionary among them."""
    anchoring: float = 0.1
    """lambda_a (arXiv 2512.05534); without effect where there are no anchors."""
    anchoring_distance: str = "squared"
    """squared (the paper's) or cosine."""
    anchoring_end: float | None = None
    """Share of the steps after which the weight of anchoring has fallen to zero, in a line; constant, if not given."""

    def reasons(self, config: DictionaryConfig) -> list[str]:
        """Why a term makes no sense, by itself or for such a dictionary."""
        kind, given = config.activation.kind, [name for name in SPARSITY if getattr(self, name)]
        found = [
            *not_negative(**{name: getattr(self, name) for name in (*SPARSITY, "auxk", "preactivation", "anchoring")}),
            *positive(l0_target=self.l0_target, tanh_scale=self.tanh_scale),
            *shares(p_start=self.p_start, sparsity_warmup=self.sparsity_warmup),
            *positive_shares(p_end=self.p_end, anchoring_end=self.anchoring_end),
            *whole(auxk_k=self.auxk_k),
        ]
        if config.activation.is_sparse and given:
            found.append(f"{kind} fixes how many latents are active with k; {', '.join(given)} would only shrink them")
        if not config.activation.is_sparse and not given:
            found.append(f"nothing makes a {kind} dictionary sparse: give one of {', '.join(SPARSITY)} a weight")
        if self.l0 and not isinstance(config.activation, JumpReLU):
            found.append(f"l0 is learned through the thresholds of jumprelu; {kind} has none (tanh is smooth)")
        if self.l0_target is not None and not self.l0:
            found.append("l0_target is the target of l0, which has no weight")
        if self.l0_target is not None and self.l0_target > config.latents:
            found.append(f"an l0_target of {self.l0_target:g} is more than the {config.latents} latents there are")
        if self.preactivation and config.activation.is_sparse:
            found.append(f"preactivation pulls toward a threshold; {kind} has none (auxk revives its dead latents)")
        if self.prefixes:
            if config.cross_layer:
                found.append("prefixes are those of one block of latents; a cross-layer transcoder has several")
            if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[0] < 1:
                found.append(f"prefixes must ascend from 1, unlike {', '.join(map(str, self.prefixes))}")
            if self.prefixes[-1] > config.latents:
                found.append(f"the prefix {self.prefixes[-1]} is larger than latents = {config.latents}")
        if self.anchoring_distance not in ("squared", "cosine"):
            found.append(f"anchoring_distance is squared or cosine, not {self.anchoring_distance!r}")
        return found


@dataclass(frozen=True)
class Anchors:
    """Directions that the first latents of each block are pulled toward; of any length, in each block's columns.

    Latents that share a decoder over several outputs (`shared_latents`) are pulled to the mean of those directions."""

    encoder: Tensor | None
    """float32 [k, d_in]; None: the encoder is free."""
    decoder: Tensor | None
    """float32 [k, d_out]; None: the decoder is free."""

    @property
    def count(self) -> int:
        return next((len(a) for a in (self.encoder, self.decoder) if a is not None), 0)


@dataclass(frozen=True)
class Evaluated:
    """The loss of a batch and what the trainer reports and needs of it."""

    loss: Tensor
    fvu: Tensor
    """The FVU of the whole dictionary; a scalar."""
    residual: Tensor
    """y - y_hat [rows, d_out], detached."""
    codes: list[Code]


def evaluate(
    objective: Objective,
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    codes: list[Code],
    dead: Tensor | None,
    anchors: Anchors | None,
    progress: float,
) -> Evaluated:
    """The loss on normalised x [rows, d_in], y [rows, d_out].

    `dead` bool [total latents], or None if none is; `progress`: share of the training that is done.
    """
    d = float(dictionary.config.d_out)
    residuals = [y - y_hat for y_hat in dictionary.reconstructions(codes, x, objective.prefixes)]
    errors = [reconstruction_loss(residual, d) for residual in residuals]
    loss = errors[0] if len(errors) == 1 else torch.stack(errors).mean()
    ramp = min(1.0, progress / objective.sparsity_warmup) if objective.sparsity_warmup else 1.0
    for block, code in zip(dictionary.each_block(), codes, strict=True):
        for term in _sparsity_terms(objective, block, code, p_of(objective, progress), d):
            loss = loss + ramp * term
    if isinstance(dictionary.config.activation, Gated):
        loss = loss + gate_loss(y, dictionary, codes, x, d)
    if dead is not None:
        for term in _terms_of_the_dead(objective, dictionary, x, residuals[-1], dead, d):
            loss = loss + term
    if anchors is not None and (weight := anchoring_weight(objective, progress)):
        loss = loss + weight * anchoring_loss(objective, dictionary, anchors)
    return Evaluated(loss, errors[-1].detach(), residuals[-1].detach(), codes)


def _sparsity_terms(objective: Objective, block: Block, code: Code, p: float, d: float) -> Iterator[Tensor]:
    if objective.l1 or objective.tanh or objective.p_norm:
        norms = block.decoder_norms()
        if objective.l1:
            yield objective.l1 / d * l1_loss(code, norms)
        if objective.tanh:
            yield objective.tanh / d * tanh_loss(code, norms, objective.tanh_scale)
        if objective.p_norm:
            yield objective.p_norm / d * p_norm_loss(code, norms, p)
    if objective.l0 and isinstance(block.activation, JumpReLU):
        fires = block.activation.active(code, block)
        active = fires.sum(dtype=torch.promote_types(fires.dtype, torch.float32)) / code.rows  # bfloat16 has 8 bits
        target = objective.l0_target
        yield objective.l0 * (active if target is None else (active / target - 1).square())


def _terms_of_the_dead(
    objective: Objective, dictionary: Dictionary, x: Tensor, residual: Tensor, dead: Tensor, d: float
) -> Iterator[Tensor]:
    for block, part in zip(dictionary.each_block(), dead.split(dictionary.config.latents), strict=True):
        if not bool(part.any()):
            continue
        read, written = x[:, block.shape.reads], residual[:, block.shape.writes]
        if objective.auxk:
            k = objective.auxk_k or max(1, written.shape[1] // 2)
            yield objective.auxk * auxiliary_loss(written, read, block, part, k)
        if objective.preactivation:
            yield objective.preactivation / d * preactivation_loss(read, block, part)


def anchoring_loss(objective: Objective, dictionary: Dictionary, anchors: Anchors) -> Tensor:
    """The anchoring term over all blocks, encoder and decoder sides."""
    distance = squared_anchoring if objective.anchoring_distance == "squared" else cosine_anchoring
    loss = dictionary.b_dec.new_zeros(())
    for block in dictionary.each_block():
        if anchors.encoder is not None:
            loss = loss + distance(block.W_enc, unit_rows(anchors.encoder[:, block.shape.reads]))
        if anchors.decoder is not None:
            loss = loss + distance(block.W_dec, unit_rows(anchors.decoder[:, block.shape.writes]))
    return loss


def anchoring_weight(objective: Objective, progress: float) -> float:
    """lambda_a at a share of the training."""
    if objective.anchoring_end is None:
        return objective.anchoring
    return objective.anchoring * max(0.0, 1 - progress / objective.anchoring_end)


def p_of(objective: Objective, progress: float) -> float:
    """The power of p_norm at a share of the training: 1, and from `p_start` on in a line to `p_end`."""
    share = (progress - objective.p_start) / (1 - objective.p_start) if objective.p_start < 1 else 0.0
    return 1.0 - (1.0 - objective.p_end) * min(1.0, max(0.0, share))
