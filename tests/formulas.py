"""The dictionary family in float64, from the papers' formulas, in plain tensor arithmetic: what tests compare with.

Nothing of the product takes part but the values that describe a dictionary. Straight-through gradients are written as
value + slope * (theta - theta), the second theta a constant.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.sdl.dictionary.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.objective import Anchors, Objective

LATENTS, K, ROWS = 14, 3, 20
ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(K),
    "batch_topk": BatchTopK(K),
    "relu": ReLU(),
    "jumprelu": JumpReLU(threshold=0.3, bandwidth=0.8),
    "gated": Gated(),
}
_LAYERS = ("mlp_in.0", "mlp_in.1"), ("mlp_out.0", "mlp_out.1")
VARIANTS = {
    "sae": DictionaryConfig(("resid_post.1",), ("resid_post.1",), (6,), (6,), LATENTS, TopK(K)),
    "transcoder": DictionaryConfig(("mlp_in.1",), ("mlp_out.1",), (6,), (5,), LATENTS, TopK(K)),
    "skip": DictionaryConfig(("mlp_in.1",), ("mlp_out.1",), (6,), (5,), LATENTS, TopK(K), skip=True),
    "crosscoder": DictionaryConfig(
        ("a/resid_post.1", "b/resid_post.1"), ("a/resid_post.1", "b/resid_post.1"), (4, 4), (4, 4), LATENTS, TopK(K)
    ),
    "shared": DictionaryConfig(
        ("a/x.1", "b/x.1"), ("a/x.1", "b/x.1"), (4, 4), (4, 4), LATENTS, TopK(K), False, False, 5
    ),
    "cross_layer": DictionaryConfig(*_LAYERS, (4, 3), (3, 5), LATENTS, TopK(K), cross_layer=True),
}


def config_of(variant: str, activation: str) -> DictionaryConfig:
    return replace(VARIANTS[variant], activation=ACTIVATIONS[activation])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_dictionary(config: DictionaryConfig, *, free: bool = True, seed: int = 0) -> Dictionary:
    """Every weight is random, in float64; preactivations are about 1. Not `free`: decoder rows have norm 1."""
    dictionary = Dictionary(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.normal_(generator=generator).mul_(0.4)
            if name.endswith("threshold"):
                parameter.abs_()
        for block in dictionary.each_block():
            block.free_norms = free
            if not free:
                block.W_dec.div_(block.W_dec.norm(dim=1, keepdim=True))
        dictionary.tie_shared()
    return dictionary.double()


def leaves(dictionary: Dictionary) -> dict[str, Tensor]:
    """Copies of the weights, in float64, that take gradients."""
    return {n: p.detach().double().clone().requires_grad_() for n, p in dictionary.named_parameters()}


@dataclass
class Formulas:
    """One dictionary on normalised rows x [rows, d_in], y [rows, d_out], all float64."""

    config: DictionaryConfig
    weights: dict[str, Tensor]
    x: Tensor
    y: Tensor

    @property
    def blocks(self) -> range:
        return range(len(self.config.input) if self.config.cross_layer else 1)

    def weight(self, i: int, name: str) -> Tensor:
        return self.weights[f"blocks.{i}.{name}"]

    def read(self, i: int) -> Tensor:
        start = sum(self.config.input_widths[:i])
        return self.x[:, start : start + self.config.input_widths[i]] if self.config.cross_layer else self.x

    def first_written(self, i: int) -> int:
        return sum(self.config.output_widths[:i]) if self.config.cross_layer else 0

    def norms(self, i: int) -> Tensor:
        """sum over the sites that are written of ||W_dec,i^site||."""
        widths = self.config.output_widths[i:] if self.config.cross_layer else self.config.output_widths
        total, start = torch.zeros(self.config.latents, dtype=torch.float64), 0
        for width in widths:
            total = total + (self.weight(i, "W_dec")[:, start : start + width] ** 2).sum(1) ** 0.5
            start += width
        return total

    def preactivations(self, i: int) -> Tensor:
        return self.read(i) @ self.weight(i, "W_enc").T + self.weight(i, "b_enc")

    def code(self, i: int) -> Tensor:
        pre, activation = self.preactivations(i), self.config.activation
        if isinstance(activation, TopK):
            kept = torch.zeros_like(pre, dtype=torch.bool)
            for row, values in enumerate(pre.tolist()):
                kept[row, sorted(range(len(values)), key=lambda j: -values[j])[: activation.k]] = True
            return pre * (kept & (pre > 0))
        if isinstance(activation, BatchTopK):
            scores = (pre * self.norms(i)).detach().flatten().tolist()
            best = sorted(range(len(scores)), key=lambda j: -scores[j])[: activation.k * len(pre)]
            kept = torch.zeros(len(scores), dtype=torch.bool)
            kept[best] = True
            return pre * (kept.view_as(pre) & (pre > 0))
        if isinstance(activation, JumpReLU):
            theta = self.weight(i, "threshold")
            slope = -(theta / activation.bandwidth) * self.near(i)
            return pre * (pre > theta) + slope.detach() * (theta - theta.detach())
        if isinstance(activation, Gated):
            magnitude = torch.exp(self.weight(i, "r_mag")) * (self.read(i) @ self.weight(i, "W_enc").T)
            magnitude = magnitude + self.weight(i, "b_mag")
            return magnitude * ((pre > 0) & (magnitude > 0))
        return pre * (pre > 0)

    def near(self, i: int) -> Tensor:
        distance = abs(self.preactivations(i) - self.weight(i, "threshold"))
        return (distance < self.config.activation.bandwidth / 2).double()

    def gates(self, i: int) -> Tensor:
        pre = self.preactivations(i)
        return pre * (pre > 0) if isinstance(self.config.activation, Gated) else self.code(i)

    def base(self) -> Tensor:
        skip = self.x @ self.weights["W_skip"].T if self.config.skip else 0
        return skip + self.weights["b_dec"] + torch.zeros_like(self.y)

    def reconstruction(self, latents: int | None = None) -> Tensor:
        y = self.base()
        for i in self.blocks:
            y = self._plus(y, self.code(i)[:, :latents] @ self.weight(i, "W_dec")[:latents], i)
        return y

    def _plus(self, y: Tensor, part: Tensor, i: int) -> Tensor:
        before = torch.zeros(len(y), self.first_written(i), dtype=torch.float64)
        return y + torch.cat([before, part], dim=1)

    # ---- the terms of the loss, weighted as the objective says

    def fvu(self, latents: int | None = None) -> Tensor:
        return ((self.y - self.reconstruction(latents)) ** 2).sum(1).mean() / sum(self.config.output_widths)

    def terms(self, objective: Objective, dead: Tensor, anchors: Anchors | None, progress: float) -> dict[str, Tensor]:
        prefixes = sorted({*objective.prefixes, self.config.latents})
        found = {"error": torch.stack([self.fvu(p) for p in prefixes]).mean()}
        d = sum(self.config.output_widths)
        ramp = min(1.0, progress / objective.sparsity_warmup)
        for i in self.blocks:
            size = self.gates(i) * self.norms(i)
            found[f"l1.{i}"] = ramp * objective.l1 / d * size.sum(1).mean()
            found[f"tanh.{i}"] = ramp * objective.tanh / d * torch.tanh(objective.tanh_scale * size).sum(1).mean()
            found[f"p_norm.{i}"] = ramp * objective.p_norm / d * self._p_norm(size, objective, progress)
            if objective.l0:
                found[f"l0.{i}"] = ramp * objective.l0 * self._l0(i, objective.l0_target)
            index = dead[i * self.config.latents : (i + 1) * self.config.latents].nonzero().flatten().tolist()
            if index:
                found[f"auxk.{i}"] = objective.auxk * self._auxk(i, index, objective.auxk_k)
                found[f"pre.{i}"] = objective.preactivation / d * self._preactivation(i, index)
            if anchors is not None:
                share = 1.0 if objective.anchoring_end is None else max(0.0, 1 - progress / objective.anchoring_end)
                weight = objective.anchoring * share
                found[f"anchoring.{i}"] = weight * self._anchoring(i, anchors, objective.anchoring_distance)
        if isinstance(self.config.activation, Gated):
            y = self.base().detach()
            for i in self.blocks:
                y = self._plus(y, self.gates(i) @ self.weight(i, "W_dec").detach(), i)
            found["gate"] = ((self.y - y) ** 2).sum(1).mean() / d
        return found

    def _p_norm(self, size: Tensor, objective: Objective, progress: float) -> Tensor:
        start, end = objective.p_start, objective.p_end
        p = 1.0 if progress <= start else 1 - (1 - end) * (progress - start) / (1 - start)
        powers = (size[size > 0] ** p).sum() / len(size)
        return powers * (size.sum(1).mean().item() / powers.item())

    def _l0(self, i: int, target: float | None) -> Tensor:
        theta = self.weight(i, "threshold")
        active = (self.preactivations(i) > theta).double()
        slope = -self.near(i) / self.config.activation.bandwidth
        count = (active + slope * (theta - theta.detach())).sum(1).mean()
        return count if target is None else (count / target - 1) ** 2

    def _auxk(self, i: int, index: list[int], k: int | None) -> Tensor:
        residual = (self.y - self.reconstruction()).detach()[:, self.first_written(i) :]
        pre, W_dec = self.preactivations(i)[:, index], self.weight(i, "W_dec")[index]
        errors = []
        for row in range(len(pre)):
            best = pre[row].argsort(descending=True)[: k or residual.shape[1] // 2].tolist()
            written = sum(pre[row, j] * (pre[row, j] > 0) * W_dec[j] for j in best)
            errors.append(((residual[row] - written) ** 2).sum())
        variance = ((residual - residual.mean(0)) ** 2).sum(1).mean()
        return torch.stack(errors).mean() / variance

    def _preactivation(self, i: int, index: list[int]) -> Tensor:
        theta = (
            self.weight(i, "threshold").detach()
            if isinstance(self.config.activation, JumpReLU)
            else torch.zeros(LATENTS)
        )
        lacking = (theta - self.preactivations(i))[:, index]
        return (lacking * (lacking > 0) * self.norms(i).detach()[index]).sum(1).mean()

    def _anchoring(self, i: int, anchors: Anchors, distance: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        start = sum(self.config.input_widths[:i]) if self.config.cross_layer else 0
        for W, side, first in (
            (self.weight(i, "W_enc"), anchors.encoder, start),
            (self.weight(i, "W_dec"), anchors.decoder, self.first_written(i)),
        ):
            if side is None:
                continue
            for number, whole in enumerate(side.double()):
                anchor = whole[first : first + W.shape[1]]
                anchor, row = anchor / (anchor**2).sum() ** 0.5, W[number]
                if distance == "squared":
                    total = total + ((row - anchor) ** 2).sum()
                else:
                    total = total + 1 - (row * anchor).sum() / (row**2).sum() ** 0.5
        return total

    def loss(self, objective: Objective, dead: Tensor, anchors: Anchors | None = None, progress: float = 1.0) -> Tensor:
        return sum(self.terms(objective, dead, anchors, progress).values(), torch.zeros((), dtype=torch.float64))
