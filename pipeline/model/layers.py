"""The decoder layers of a loaded model, and its family."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.errors import InputError
from pipeline.model.families import FAMILIES, Family


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of a base or causal model. Raises InputError if its family is not known or not as expected."""
    family = family_of(model)
    base: Any = getattr(model, "model", model)
    layers = getattr(base, "layers", None)
    parts = sorted({family.resid_mid, family.mlp_in, family.mlp_out, family.attn_out})
    if layers is None or not all(hasattr(layer, part) for layer in layers for part in parts):
        raise InputError(f"{type(model).__name__} is not as expected: it should have .layers with {', '.join(parts)}")
    return list(layers)


def family_of(model: nn.Module) -> Family:
    """Raises InputError for a model of no known family."""
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise InputError(f"{type(model).__name__} ({kind}) is of no family that is known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
