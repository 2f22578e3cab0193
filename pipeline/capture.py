"""Taking activations out of a running decoder, and putting others in.

A tap wraps a module's `forward` and keeps references, never copies: a site costs nothing until its rows are gathered.
Works on eager and on compiled layers alike, and with the outputs of transformers 4 (tuples) and 5 (tensors).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.sites import Site

Replace = Callable[[Tensor], Tensor]


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of a base or causal model. Raises InputError if it has no Llama-shaped layers."""
    base: Any = getattr(model, "model", model)
    layers = getattr(base, "layers", None)
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if layers is None or not all(hasattr(layer, part) for layer in layers for part in parts):
        raise InputError(f"{type(model).__name__} is not Llama-shaped: expected .layers with {', '.join(parts)}")
    return list(layers)


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[Mapping[Site, Tensor]]:
    """Within the block, each forward pass of `model` fills the mapping: site -> [batch, position, d_model]."""
    layers = decoder_layers(model)
    taken: dict[Site, Tensor] = {}

    with ExitStack() as stack:
        for site in sites:

            def take(acts: Tensor, site: Site = site) -> None:
                taken[site] = acts

            stack.enter_context(_tap(layers[site.layer], site.kind, take))
        yield taken


@contextmanager
def splice(model: nn.Module, site: Site, replace: Replace) -> Iterator[None]:
    """Within the block, each forward pass goes on with replace(activations) at `site`, [batch, position, d_model]."""
    layer = decoder_layers(model)[site.layer]
    if site.kind != "resid_mid":
        with _tap(layer, site.kind, replace):
            yield
        return
    # resid_mid is a sum inside the layer that no module returns: attn_out is set to what makes the sum right.
    resid_pre: list[Tensor] = []

    def remember(acts: Tensor) -> None:
        resid_pre[:] = [acts]

    def complete(attn_out: Tensor) -> Tensor:
        return replace(resid_pre[0] + attn_out) - resid_pre[0]

    with _tap(layer, "resid_pre", remember), _tap(layer, "attn_out", complete):
        yield


@contextmanager
def _tap(layer: Any, kind: str, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `visit` with the activations of a site; what it returns, if anything, takes their place."""

    inputs = {"resid_pre": layer, "resid_mid": layer.post_attention_layernorm, "mlp_in": layer.mlp}
    outputs = {"resid_post": layer, "mlp_out": layer.mlp, "attn_out": layer.self_attn}
    module = (inputs | outputs)[kind]
    forward = module.forward

    def visiting_input(*args: Any, **kwargs: Any) -> Any:
        acts = args[0] if args else kwargs["hidden_states"]
        new = visit(acts)
        if new is not None:
            args, kwargs = ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
        return forward(*args, **kwargs)

    def visiting_output(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        new = visit(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return output
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # Not torch's hooks: inside a compiled layer they are dropped without a word (torch 2.13).
    wrapped_before = vars(module).get("forward")
    module.forward = visiting_input if kind in inputs else visiting_output
    try:
        yield
    finally:
        if wrapped_before is None:
            del module.forward
        else:
            module.forward = wrapped_before


def run_base(model: nn.Module, tokens: Tensor) -> Tensor:
    """Run a base model on int64 [batch, position], contexts from position 0, padding on the right.

    No mask and no position ids are given: attention is then plainly causal, padding cannot reach a row, and
    transformers does not take the batch for packed sequences.
    """
    hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden
