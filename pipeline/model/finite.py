"""Weights that are nan or infinite: which tensors of a loaded model have them.

A decoder layer with one such weight makes every row of every later site nan. An embedding may have them for ids that no
text has, as models are padded with rows that nobody set.
"""

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError

CHECKED_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Others are of quantised weights, which are numbers whatever their bits."""
MOST_NAMED = 3


class NotFinite(InputError):
    """Activations that are nan or infinite: of which row of a unit, at which site, and why. It can be pickled, as what
    an actor raises is."""

    def __init__(self, row: int, reason: str, site: str = ""):
        super().__init__(row, reason, site)
        self.row, self.reason, self.site = row, reason, site

    def __str__(self) -> str:
        return f"{f'{self.site}: ' if self.site else ''}row {self.row} of the unit {self.reason}"


def check_layers(model_id: str, model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raise InputError for decoder layers of a model with weights that are nan or infinite. Reads each weight once,
    where it is; not those that accelerate keeps elsewhere."""
    inside = {id(tensor) for layer in layers for tensor in layer.parameters()}
    if found := tensors_not_finite(model, inside):
        raise InputError(f"model.id: {words_of(model_id, found)}")


def embedding_not_finite(model: nn.Module, tokens: Tensor) -> list[str]:
    """The name of a model's token embedding where a row of one of `tokens` is nan or infinite."""
    return tensors_not_finite(model, {id(_embedding(model))}, tokens)


@torch.inference_mode()
def tensors_not_finite(
    model: nn.Module, among: Container[int] | None = None, tokens: Tensor | None = None
) -> list[str]:
    """The names of a model's weights that are nan or infinite. `among`: the ids of the tensors to look at; all, if not
    given. `tokens`: those that the model ran; other rows of its embedding count only where its head has them too."""
    found = []
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    by_token = None if tokens is None or (embedding := _embedding(model)) is head else embedding
    for name, tensor in model.named_parameters():  # buffers, as masks, may be infinite on purpose
        if (among is not None and id(tensor) not in among) or tensor.dtype not in CHECKED_TYPES:
            continue
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        looked_at = tensor if tensor is not by_token or tokens is None else tensor[tokens.unique().to(tensor.device)]
        if not looked_at.numel():
            continue
        least, most = torch.aminmax(looked_at)  # both nan where there is one; no copy of the weights is made
        if not bool(least.isfinite() & most.isfinite()):
            found.append(name)
    return found


def _embedding(model: nn.Module) -> Tensor | None:
    module: Any = model  # of transformers
    weight: Tensor | None = getattr(module.get_input_embeddings(), "weight", None)
    return weight


def words_of(model_id: str, names: list[str]) -> str:
    """One sentence on tensors of a model that are nan or infinite."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (
        f"the weights of {model_id} are nan or infinite in {', '.join(names[:MOST_NAMED])}{more}, and so would the "
        "activations be; download the checkpoint again, take one from before its training diverged, or if it was saved "
        "in float16 one in bfloat16 or float32"
    )
