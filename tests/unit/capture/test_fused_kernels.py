"""Layers that write over what was taken from them, as fused kernels do: each site is the value at its place."""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KINDS
from torch import Tensor, nn

from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import capture, overwritten_sites
from pipeline.capture.unit import UnitRunner
from pipeline.model.describe import describe_model
from pipeline.model.load import load_base_model, load_causal_model
from pipeline.sdl.measure.loss_recovered import loss_recovered
from pipeline.sites import Site

LAYERS = 3
SITES = [Site(layer, kind) for layer in range(LAYERS) for kind in KINDS]
CPU = torch.device("cpu")


def added_into_the_branch(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The residual stream is added into what the branch gave: attn_out and mlp_out are overwritten."""
    attn_out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    resid_mid = attn_out.add_(hidden_states)
    mlp_out: Tensor = self.mlp(self.post_attention_layernorm(resid_mid))
    return mlp_out.add_(resid_mid)


def added_into_the_stream(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """One tensor is the residual stream of all layers: every resid_* is overwritten."""
    attn_out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states.add_(attn_out)
    hidden_states.add_(self.mlp(self.post_attention_layernorm(hidden_states)))
    return hidden_states


def normed_in_place(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The norm's output takes the place of what it normed, a copy of which goes on: resid_mid is overwritten."""
    attn_out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    resid_mid = hidden_states + attn_out
    kept = resid_mid.clone()
    resid_mid.copy_(self.post_attention_layernorm(resid_mid))
    mlp_in = resid_mid
    mlp_out: Tensor = self.mlp(mlp_in)
    mlp_in.zero_()
    return kept + mlp_out


def plain(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attn_out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    resid_mid = hidden_states + attn_out
    mlp_out: Tensor = self.mlp(self.post_attention_layernorm(resid_mid))
    return resid_mid + mlp_out


FUSED: dict[Callable[..., Tensor], set[str]] = {
    plain: set(),
    added_into_the_branch: {"attn_out", "mlp_out"},
    added_into_the_stream: {"resid_pre", "resid_mid", "resid_post"},
    normed_in_place: {"resid_mid", "mlp_in"},
}


def with_layers(model: nn.Module, forward: Callable[..., Tensor] | None) -> nn.Module:
    layers: Any = getattr(model, "model", model).layers
    for layer in layers if forward is not None else ():
        layer.forward = MethodType(forward, layer)
    return model


def rows_of(model: nn.Module, compile_layers: bool = False) -> dict[Site, np.ndarray]:
    runner = UnitRunner(
        model,
        dict.fromkeys(SITES, "float32"),
        d_model=32,
        batch_tokens=48,
        context=16,
        device="cpu",
        compile_layers=compile_layers,
    )
    contexts = [
        ContextRows(np.arange(n, n + 16, dtype=np.int32), np.arange(1, 16, dtype=np.int64), 15 * n) for n in range(7)
    ]
    return {site: found.values.numpy().copy() for site, found in runner.run(contexts, 105).sites.items()}


def base(llama: Path, forward: Callable[..., Tensor] | None) -> nn.Module:
    return with_layers(load_base_model(describe_model(str(llama)), layers=LAYERS, dtype="float32"), forward)


@pytest.mark.parametrize("forward", FUSED)
def test_a_site_is_the_value_at_its_place(llama: Path, forward: Callable[..., Tensor]) -> None:
    expected, found = rows_of(base(llama, None)), rows_of(base(llama, forward))
    for site in SITES:
        np.testing.assert_allclose(found[site], expected[site], rtol=0, atol=1e-5, err_msg=str(site))


@pytest.mark.parametrize("forward", FUSED)
def test_only_what_is_overwritten_is_copied(llama: Path, forward: Callable[..., Tensor]) -> None:
    """References cost nothing: a plain model keeps them. A fused one is found out by its first tokens."""
    model = base(llama, forward)
    found = overwritten_sites(model, SITES, CPU)
    assert {site.kind for site in found} == FUSED[forward]
    with capture(model, SITES) as taken, torch.inference_mode():
        model(torch.arange(8)[None])
        assert set(taken) == set(SITES)


def test_the_models_of_transformers_overwrite_nothing(make_model: Callable[..., Path]) -> None:
    for family in ("llama", "qwen3", "gemma2", "olmo2", "granite", "mixtral"):
        model = load_base_model(
            describe_model(str(make_model(family))), layers=LAYERS, dtype="float32", attention="eager"
        )
        assert overwritten_sites(model, SITES, CPU) == frozenset(), family


def test_the_loss_is_measured_with_what_was_there(llama: Path) -> None:
    """The reconstruction is made of what was taken in the clean pass: the identity must recover all of the loss."""
    site = Site(1, "mlp_out")
    contexts = [ContextRows(np.arange(3, 35, dtype=np.int32), np.arange(1, 32, dtype=np.int64), 0)]
    for forward in (None, added_into_the_branch, added_into_the_stream):
        model = with_layers(load_causal_model(describe_model(str(llama)), dtype="float32"), forward)
        found = loss_recovered(model, lambda x: x, [site], {site: torch.zeros(32)}, contexts, 64)
        assert found.spliced == pytest.approx(found.clean, abs=1e-5)
