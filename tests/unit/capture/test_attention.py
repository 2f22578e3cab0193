"""Attention in blocks against attention written out in float64, and compiled layers against eager ones, on CPU."""

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.config
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

import pipeline.capture.attention
from pipeline.capture.attention import BLOCK, attend_in_blocks, block_attention
from pipeline.capture.batches import Batch
from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import model_inputs
from pipeline.capture.unit import UnitRunner
from pipeline.sites import KINDS, Site

D_MODEL, VOCABULARY, CONTEXT = 64, 200, 32
SHAPE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler, of torch itself
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling on CPU needs g++, and it is not here")


def attention_written_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """float64 [batch, position, head, width]."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(groups, 1), value.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = torch.where(visible, scores, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(groups, 1))


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("window", [None, 50])
def test_blocks_equal_attention_written_out(length: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    apart = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    visible = (apart >= 0) & (apart < (window or length))
    found = block_attention(query, key, value, visible[None, None] if window else None)
    torch.testing.assert_close(found.double(), attention_written_out(query, key, value, visible), atol=1e-5, rtol=1e-5)


def test_models_that_are_not_bfloat16_with_sdpa_are_left_alone() -> None:
    config = LlamaConfig(**SHAPE, num_hidden_layers=1)
    for dtype, attention, changed in [
        (torch.bfloat16, "sdpa", True),
        (torch.bfloat16, "eager", False),
        (torch.float32, "sdpa", False),
        (torch.float16, "sdpa", False),
    ]:
        model = LlamaModel._from_config(config, dtype=dtype, attn_implementation=attention)
        attend_in_blocks(model)
        assert (model.config._attn_implementation != attention) == changed


def contexts() -> list[ContextRows]:
    """Full batches, which run compiled, of whole contexts and of several in a line; and a line that runs eagerly."""
    rng = np.random.default_rng(0)
    found, row = [], 0
    for length in (*[CONTEXT] * 4, *[20, 12] * 4, 20):
        found.append(ContextRows(rng.integers(0, VOCABULARY, length).astype(np.int32), np.arange(1, length), row))
        row += length - 1
    return found


def activations(
    layers: int, sites: list[Site], dtype: torch.dtype, compiled: bool, window: int | None = None
) -> dict[Site, Tensor]:
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, num_hidden_layers=layers, sliding_window=window)
    model = MistralModel(config).eval().requires_grad_(False).to(dtype)
    runner = UnitRunner(
        model, dict.fromkeys(sites, "float32"), d_model=D_MODEL, batch_tokens=4 * CONTEXT, context=CONTEXT,
        device="cpu", compile_layers=compiled, blocks=True,
    )  # fmt: skip
    rows = sum(context.num_rows for context in contexts())
    return {site: acts.values.clone() for site, acts in runner.run(contexts(), rows).sites.items()}


@needs_compiler
def test_compiled_layers_equal_eager_ones() -> None:
    sites = [Site(0, kind) for kind in KINDS]
    eager, compiled = (activations(1, sites, torch.float32, compiled) for compiled in (False, True))
    for site in sites:
        torch.testing.assert_close(compiled[site], eager[site], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("window", [None, 8])
def test_compiled_bfloat16_layers_attend_in_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are as near to float32 as eager ones, with the mask of a window as transformers makes it too."""
    sites = [Site(0, "attn_out"), Site(1, "resid_post")]
    exact, eager = (activations(2, sites, dtype, False, window) for dtype in (torch.float32, torch.bfloat16))
    traced = []
    attend = pipeline.capture.attention.block_attention
    monkeypatch.setattr(pipeline.capture.attention, "block_attention", lambda *of: traced.append(1) or attend(*of))
    compiled = activations(2, sites, torch.bfloat16, True, window)
    assert traced
    for site in sites:
        assert (compiled[site] - exact[site]).norm() < 1.5 * (eager[site] - exact[site]).norm()
    again = activations(2, sites, torch.bfloat16, True, window)
    assert all(torch.equal(again[site], compiled[site]) for site in sites)


@pytest.mark.slow
@needs_compiler
def test_more_layers_than_the_compiler_takes_by_default_are_compiled() -> None:
    """Each tapped layer is other code to the compiler, which would leave the ninth and later ones eager."""
    torch._dynamo.reset()
    layers = 9
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        activations(layers, [Site(layer, "mlp_in") for layer in range(layers)], torch.float32, compiled=True)


def test_flash_attention_is_told_where_each_context_begins() -> None:
    """By transformers' own reading of what the model is given; without a GPU the kernel itself does not run."""
    batch = Batch([contexts()[4:6], contexts()[6:7]], 2 * CONTEXT, 2)  # 20 and 12, and then 20 tokens
    model = LlamaModel._from_config(LlamaConfig(**SHAPE, num_hidden_layers=1))
    model.config._attn_implementation_internal = "flash_attention_2"
    position_ids = model_inputs(model, batch, torch.device("cpu"))["position_ids"]
    assert _is_packed_sequence(position_ids, batch_size=len(position_ids))
    (bounds, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
    assert bounds.tolist() == [0, 20, 32, 64, 84, 128]  # what is left of a line counts as one more
