"""What makes a code sparse. One small class an activation; all are pure functions of a block's weights and the rows.

Training: `places` says which entries of the code can matter (None: all are computed), `activate` what they become, the
same for all entries and for those at places. `infer` is what a finished dictionary does. They differ for BatchTopK
alone, whose batches are not there any more: a threshold takes their place (`pipeline.sdl.dictionary.calibration`).

The kinds without a k have dense codes to begin with and sparse ones soon: as long as many entries are active all of
them are computed, and where few are, those alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pipeline.checks import not_negative, positive, refuse, whole
from pipeline.errors import InputError
from pipeline.precision import AUTO, TYPES, faster_type
from pipeline.sdl.dictionary.codes import Code
from pipeline.sdl.dictionary.selection import (
    dense_batch_top_k,
    dense_top_k,
    select_above,
    select_batch_top_k,
    select_top_k,
)
from pipeline.sdl.dictionary.sparse import Places


@dataclass(frozen=True)
class Products:
    """How codes are computed. What is chosen may change the last bits, and which of nearly equal entries are kept."""

    sparse: bool = True
    """False: dense codes and dense float32 products, the plain formula."""
    selection: str = AUTO
    """The type of the preactivations that are compared: float32, bfloat16, or auto, the faster one of the device. What
    is kept is float32 in any case."""
    dense: str = "float32"
    """The type of dense products, likewise."""

    def __post_init__(self) -> None:
        if wrong := {self.selection, self.dense} - {AUTO, *TYPES}:
            raise InputError(f"products are computed in {AUTO}, {' or '.join(TYPES)}, not {', '.join(sorted(wrong))}")

    def on(self, device: str) -> "Products":
        """The same with the faster type of a device in place of each auto."""
        return self if AUTO not in (self.selection, self.dense) else self.as_in(_all(faster_type(device)))

    def as_in(self, record: Mapping[str, Any]) -> "Products":
        """The same with what a run has recorded in place of each auto, so that it goes on as it began."""
        chosen = {name: record[name] for name in _all(AUTO) if name in record and getattr(self, name) == AUTO}
        return replace(self, **chosen)


def _all(name: str) -> dict[str, str]:
    """One type for all kinds of products."""
    return {"selection": name, "dense": name}


class Encoder(Protocol):
    """What an activation needs of a block: W_enc [latents, d_in], b_enc [latents], its own weights, and norms."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter

    def own(self, name: str) -> Tensor: ...

    def preactivations(self, x: Tensor) -> Tensor: ...

    def selection_weights(self) -> Tensor | None: ...


Spread = Callable[[Tensor], Tensor]
"""A weight of each latent [latents] -> of each entry, as `Code.of_entries`."""


class _Kind:
    """What most activations have in common: no weights of their own, and the preactivation where it is positive."""

    kind: ClassVar[str]
    is_sparse: ClassVar[bool] = False
    """True if the number of active latents is fixed in advance."""
    begins_dense: ClassVar[bool] = False
    """True if half of all latents are active with random weights and no bias."""
    trained: ClassVar[tuple[str, ...]] = ()
    """Names of own weights that are trained; other own weights are set by calibration."""

    def check(self, latents: int) -> None:
        """Raise InputError if a dictionary of `latents` latents cannot have it."""

    def own_weights(self, latents: int) -> dict[str, Tensor]:
        """Initial own weights, each [latents], float32."""
        return {}

    def shift(self, own: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
        """The own weights as if every product W_enc x were less by `by` [latents]."""
        return own

    def places(self, block: Encoder, x: Tensor, dtype: torch.dtype) -> Places | None:
        """Which entries can matter for x [rows, d_in], found with products in `dtype`; None: too many to gain by it."""
        return select_above(x, block.W_enc, block.b_enc, 0.0, dtype)

    def activate(self, preactivations: Tensor, block: Encoder, spread: Spread) -> tuple[Tensor, Tensor]:
        """Entries of preactivations -> values and gates; see `Code`."""
        values = preactivations.relu()
        return values, values

    def keep(self, preactivations: Tensor, block: Encoder) -> Tensor:
        """Return the preactivations [rows, latents] that compete successfully, and 0 in place of the others."""
        return preactivations

    def code(self, block: Encoder, x: Tensor, products: Products) -> Code:
        """The code of x [rows, d_in] in training, with gradients."""
        places = None
        if products.sparse:
            places = self.places(block, x, TYPES[products.on(x.device.type).selection])
        spread: Spread = _same
        if places is None:
            preactivations = self.keep(block.preactivations(x), block)
        else:
            preactivations = places.encode(x, block.W_enc, block.b_enc)
            spread = places.of_entries
        values, gates = self.activate(preactivations, block, spread)
        return Code(values, preactivations, gates, places)

    def infer(self, block: Encoder, x: Tensor) -> Tensor:
        """The code of x [rows, d_in] -> [rows, latents], of a finished dictionary."""
        return self.activate(self.keep(block.preactivations(x), block), block, _same)[0]


def _same(weights: Tensor) -> Tensor:
    return weights


@dataclass(frozen=True)
class TopK(_Kind):
    """The k largest preactivations of each row, where positive (Gao et al. 2024, arXiv 2406.04093)."""

    k: int = 32
    kind: ClassVar[str] = "topk"
    is_sparse: ClassVar[bool] = True

    def check(self, latents: int) -> None:
        _check_k(self.k, latents)

    def places(self, block: Encoder, x: Tensor, dtype: torch.dtype) -> Places | None:
        return select_top_k(x, block.W_enc, block.b_enc, self.k, dtype)

    def keep(self, preactivations: Tensor, block: Encoder) -> Tensor:
        return dense_top_k(preactivations, self.k)


@dataclass(frozen=True)
class BatchTopK(_Kind):
    """The k * rows largest preactivations of a batch, times the summed norms of the latent's decoders where those are
    several or free (Bussmann et al. 2024, arXiv 2412.06410). Afterwards: those above a threshold."""

    k: int = 32
    kind: ClassVar[str] = "batch_topk"
    is_sparse: ClassVar[bool] = True

    def check(self, latents: int) -> None:
        _check_k(self.k, latents)

    def own_weights(self, latents: int) -> dict[str, Tensor]:
        return {"threshold": torch.full((latents,), torch.nan)}  # set by calibration

    def places(self, block: Encoder, x: Tensor, dtype: torch.dtype) -> Places | None:
        return select_batch_top_k(x, block.W_enc, block.b_enc, self.k, dtype, block.selection_weights())

    def keep(self, preactivations: Tensor, block: Encoder) -> Tensor:
        return dense_batch_top_k(preactivations, self.k, block.selection_weights())

    def infer(self, block: Encoder, x: Tensor) -> Tensor:
        threshold = block.own("threshold")
        if torch.isnan(threshold).any():
            raise InputError("a BatchTopK dictionary encodes with a threshold, and this one's is not calibrated yet")
        preactivations = block.preactivations(x)
        return torch.where(preactivations > threshold, preactivations, 0).relu()


@dataclass(frozen=True)
class ReLU(_Kind):
    """max(0, preactivation)."""

    kind: ClassVar[str] = "relu"
    begins_dense: ClassVar[bool] = True


@dataclass(frozen=True)
class JumpReLU(_Kind):
    """The preactivation where it is above the latent's own threshold, else 0 (Rajamanoharan et al. 2024, 2407.14435).

    The threshold itself is trained, not its logarithm, which Adam freezes; straight-through gradients, see `_Jump`.
    """

    threshold: float = 1.0
    """Initial threshold, in units of normalised activations."""
    bandwidth: float = 1.0
    """Width around a threshold in which a preactivation gives it a gradient."""
    kind: ClassVar[str] = "jumprelu"
    trained: ClassVar[tuple[str, ...]] = ("threshold",)

    def check(self, latents: int) -> None:
        reasons = [*positive(bandwidth=self.bandwidth), *not_negative(threshold=self.threshold)]
        refuse([f"activation: jumprelu's {reason}" for reason in reasons])

    def own_weights(self, latents: int) -> dict[str, Tensor]:
        return {"threshold": torch.full((latents,), self.threshold)}

    def places(self, block: Encoder, x: Tensor, dtype: torch.dtype) -> Places | None:
        learns_from = block.own("threshold") - self.bandwidth / 2  # below it nothing happens, not even a gradient
        return select_above(x, block.W_enc, block.b_enc, learns_from, dtype)

    def activate(self, preactivations: Tensor, block: Encoder, spread: Spread) -> tuple[Tensor, Tensor]:
        threshold = spread(block.own("threshold")).expand_as(preactivations)
        values: Tensor = _Jump.apply(preactivations, threshold, self.bandwidth)
        return values, values

    def active(self, code: Code, block: Encoder) -> Tensor:
        """1 where an entry is active, else 0, with a gradient for the thresholds alone."""
        threshold = code.of_entries(block.own("threshold")).expand_as(code.preactivations)
        active: Tensor = _Step.apply(code.preactivations, threshold, self.bandwidth)
        return active


@dataclass(frozen=True)
class Gated(_Kind):
    """relu(magnitude) where the gate's preactivation is positive (Rajamanoharan et al. 2024, arXiv 2404.16014).

    gate = W_enc x + b_enc, magnitude = exp(r_mag) * (W_enc x) + b_mag. The gate learns from sparsity and from a
    reconstruction of its own (`pipeline.sdl.train.losses`), the magnitude from the reconstruction.
    """

    kind: ClassVar[str] = "gated"
    begins_dense: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("r_mag", "b_mag")

    def own_weights(self, latents: int) -> dict[str, Tensor]:
        return {"r_mag": torch.zeros(latents), "b_mag": torch.zeros(latents)}

    def activate(self, preactivations: Tensor, block: Encoder, spread: Spread) -> tuple[Tensor, Tensor]:
        product = preactivations - spread(block.b_enc)
        magnitude = spread(block.own("r_mag").exp()) * product + spread(block.own("b_mag"))
        return torch.where(preactivations > 0, magnitude.relu(), 0), preactivations.relu()

    def shift(self, own: dict[str, Tensor], by: Tensor) -> dict[str, Tensor]:
        return {**own, "b_mag": own["b_mag"] - own["r_mag"].exp() * by}


Activation = TopK | BatchTopK | ReLU | JumpReLU | Gated
ACTIVATIONS: dict[str, type[Activation]] = {a.kind: a for a in (TopK, BatchTopK, ReLU, JumpReLU, Gated)}


def activation_record(activation: Activation) -> dict[str, Any]:
    """As JSON: {"kind": "topk", "k": 32}."""
    return {"kind": activation.kind, **vars(activation)}


def activation_of(record: dict[str, Any]) -> Activation:
    """The activation of a record. Raises InputError for a kind that is not known."""
    values = dict(record)
    kind = values.pop("kind")
    if kind not in ACTIVATIONS:
        raise InputError(f"no activation {kind!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind](**values)


def _check_k(k: int, latents: int) -> None:
    if whole(k=k) or k > latents:
        raise InputError(f"activation.k must be a whole number between 1 and latents = {latents}, not {k}")


class _Jump(torch.autograd.Function):
    """x 1[x > theta]; d theta = -(theta / bandwidth) 1[|x - theta| < bandwidth / 2] (2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.bandwidth = bandwidth
        return torch.where((x > theta) & (x > 0), x, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, theta = ctx.saved_tensors
        near = (x - theta).abs() < ctx.bandwidth / 2
        return grad * ((x > theta) & (x > 0)), -(theta / ctx.bandwidth) * grad * near, None


class _Step(torch.autograd.Function):
    """1[x > theta]; d theta = -(1 / bandwidth) 1[|x - theta| < bandwidth / 2] (2407.14435, equation 12)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.bandwidth = bandwidth
        return (x > theta).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, theta = ctx.saved_tensors
        near = (x - theta).abs() < ctx.bandwidth / 2
        return None, -grad * near / ctx.bandwidth, None
