"""Taking activations out of a running decoder, and putting others in.

A tap wraps a module's `forward` and keeps references: a site costs nothing until its rows are gathered. Only where the
model writes over what was taken, as fused kernels may (`overwritten_sites`), is it copied.
Works on eager and on compiled layers alike, and with the outputs of transformers 4 (tuples) and 5 (tensors).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.capture.batches import Batch
from pipeline.capture.transfer import upload
from pipeline.model.families import Family
from pipeline.model.layers import decoder_layers, family_of
from pipeline.sites import Site

Replace = Callable[[Tensor], Tensor]
TRIED_TOKENS = 8
"""Tokens that show whether a model writes over what was taken."""


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site], copied: Collection[Site] = ()) -> Iterator[Mapping[Site, Tensor]]:
    """Within the block, each forward pass of `model` fills the mapping: site -> [batch, position, d_model].

    `copied`: sites that are copied as the model passes them, as it writes over them afterwards.
    """
    family, layers = family_of(model), decoder_layers(model)
    taken: dict[Site, Tensor] = {}

    with ExitStack() as stack:
        for site in sites:

            def take(acts: Tensor, site: Site = site) -> None:
                taken[site] = acts.clone() if site in copied else acts

            stack.enter_context(_tap(layers[site.layer], family, site.kind, take))
        yield taken


@torch.inference_mode()
def overwritten_sites(model: nn.Module, sites: Sequence[Site], device: torch.device) -> frozenset[Site]:
    """The sites that `model` writes over after they were taken, found by running a few tokens with and without copies.

    What a reference shows is then no longer the site: an MLP's output, say, to which a fused kernel has added the
    residual stream in place. A model that is spread over devices, or read from disk layer by layer, is not run for
    this: all sites are given.
    """
    places: Any = getattr(model, "hf_device_map", None)
    if places is not None and (len(set(places.values())) > 1 or "disk" in places.values()):
        return frozenset(sites)
    vocabulary: Any = getattr(model.config, "vocab_size", 1)
    tokens = torch.arange(TRIED_TOKENS, device=device)[None] % vocabulary
    with capture(model, sites) as seen, capture(model, sites, copied=sites) as kept:
        model(input_ids=tokens, use_cache=False)
        return frozenset(site for site in sites if not torch.equal(seen[site].nan_to_num(), kept[site].nan_to_num()))


@contextmanager
def splice(model: nn.Module, site: Site, replace: Replace) -> Iterator[None]:
    """Within the block, each forward pass goes on with replace(activations) at `site`, [batch, position, d_model]."""
    family, layer = family_of(model), decoder_layers(model)[site.layer]
    if site.kind != "resid_mid":
        with _tap(layer, family, site.kind, replace):
            yield
        return
    # resid_mid is a sum inside the layer that no module returns: attn_out is set to what makes the sum right.
    resid_pre: list[Tensor] = []

    def remember(acts: Tensor) -> None:
        resid_pre[:] = [acts]

    def complete(attn_out: Tensor) -> Tensor:
        before = resid_pre[0].to(attn_out.device)  # accelerate may move it there only within the layer
        return replace(before + attn_out) - before

    with _tap(layer, family, "resid_pre", remember), _tap(layer, family, "attn_out", complete):
        yield


@contextmanager
def _tap(layer: Any, family: Family, kind: str, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `visit` with the activations of a site; what it returns, if anything, takes their place."""
    module = layer if kind in ("resid_pre", "resid_post") else getattr(layer, getattr(family, kind))
    is_added = kind in ("mlp_out", "attn_out")
    factor = getattr(layer, family.multiplier) if is_added and family.multiplier else None
    forward = module.forward

    def visiting_input(*args: Any, **kwargs: Any) -> Any:
        acts = args[0] if args else kwargs["hidden_states"]
        new = visit(acts)
        if new is not None:
            args, kwargs = ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
        return forward(*args, **kwargs)

    def visiting_output(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        acts = output[0] if isinstance(output, tuple) else output
        new = visit(acts) if factor is None else _visit_scaled(visit, acts, factor)
        if new is None:
            return output
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # Not torch's hooks: inside a compiled layer they are dropped without a word (torch 2.13). accelerate's hooks wrap
    # `forward` too, before us: its own part, which brings weights and inputs together, is then inside ours.
    wrapped_before = vars(module).get("forward")
    module.forward = visiting_input if kind in ("resid_pre", "resid_mid", "mlp_in") else visiting_output
    try:
        yield
    finally:
        if wrapped_before is None:
            del module.forward
        else:
            module.forward = wrapped_before


def _visit_scaled(visit: Callable[[Tensor], Tensor | None], output: Tensor, factor: float) -> Tensor | None:
    """Visit what is added to the residual stream, output * factor, where the layer itself multiplies afterwards."""
    acts = output * factor
    new = visit(acts)
    # Where nothing changes, the output itself: dividing again would not give the same bits.
    return None if new is None else torch.where(new == acts, output, new / factor)


def model_inputs(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a forward pass of a batch is given: int64 [line, position] on `device`.

    Never a mask. Where lines hold one context each, attention is then plainly causal, and padding on the right cannot
    reach a row. Where they hold several, the positions begin anew with each, which transformers takes for packed
    sequences: it makes the masks, sliding windows and all, or hands their bounds to flash attention. The latter only if
    all stand in one line, so they are given as one.
    """
    inputs = {"input_ids": batch.tokens()}
    position_ids = batch.position_ids()
    if position_ids is not None:
        inputs["position_ids"] = position_ids
        attention: Any = getattr(model.config, "_attn_implementation", None)
        if str(attention).startswith("flash"):
            inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
    return {name: upload(torch.from_numpy(values), device) for name, values in inputs.items()}


def run_base(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The hidden states after the last layer of a base model, from `model_inputs`."""
    hidden = model(**inputs, use_cache=False).last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden
