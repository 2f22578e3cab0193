"""All six sites of every family, against what they mean instead of where they are.

A site's meaning needs none of the names of a family's modules but the MLP's own: a layer whose MLP returns zeros
returns resid_mid, as every norm and factor after it leaves zero alone. What the branches add is the difference to
what goes in and comes out. Independent models: unmodified transformers, one context at a time, torch's hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import KINDS
from torch import Tensor, nn

from pipeline.capture.batches import batches_of
from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import capture, splice
from pipeline.capture.unit import UnitRunner
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.families import FAMILIES
from pipeline.model.load import check_weights, load_base_model, load_causal_model
from pipeline.sites import Site

LAYERS, D_MODEL, VOCABULARY = 3, 32, 320
BATCH_TOKENS = 320
LENGTHS = (23, 40, 7, 40, 31, 2)
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
SCALED = {"residual_multiplier": 0.37, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "olmo2": {},
    "olmo3": SLIDING,
    "granite": SCALED,
    "granitemoe": {**SCALED, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = {"gemma2": ["eager"]}
"""The others: eager and sdpa."""
ALL_SITES = [Site(layer, kind) for layer in range(LAYERS) for kind in KINDS]
Rows = dict[Site, Tensor]


def test_every_family_is_tested() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_no_weights_of_a_whole_checkpoint_are_missing(make_model: Callable[..., Path], family: str) -> None:
    info = describe_model(str(make_model(family, **MODELS[family])))
    for layers in (1, LAYERS):
        check_weights(info, layers)


def some_contexts() -> list[ContextRows]:
    """Contexts of several lengths, the first position of each no row; some run beside others, with padding."""
    rng, found, row = np.random.default_rng(0), [], 0
    for length in LENGTHS:
        tokens = rng.integers(3, VOCABULARY, length).astype(np.int32)
        found.append(ContextRows(tokens, np.arange(1, length), row))
        row += length - 1
    return found


NUM_ROWS = sum(LENGTHS) - len(LENGTHS)


def test_contexts_have_neighbours_and_padding() -> None:
    batches = batches_of(some_contexts(), BATCH_TOKENS, 40)
    assert any(batch.is_packed for batch in batches)
    assert any(len(batch.contents) > 1 for batch in batches)
    assert any(batch.padding for batch in batches)


def harvested(folder: Path, attention: str, layers: int = LAYERS, **options: Any) -> Rows:
    model = load_base_model(describe_model(str(folder)), layers=layers, dtype="float32", attention=attention, **options)
    sites = [site for site in ALL_SITES if site.layer < layers]
    stored = dict.fromkeys(sites, "float32")
    runner = UnitRunner(model, stored, d_model=D_MODEL, batch_tokens=BATCH_TOKENS, context=40, device="cpu")
    return {site: acts.values for site, acts in runner.run(some_contexts(), NUM_ROWS).sites.items()}


def mlp_of(layer: nn.Module) -> nn.Module:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Within the block the module returns zeros."""
    handle = module.register_forward_hook(
        lambda module, args, output: (
            (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
        )
    )
    yield
    handle.remove()


@torch.no_grad()
def independent(folder: Path, attention: str) -> Rows:
    """Every site's rows, each context alone, by what the sites mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    layers = model.model.layers
    seen: Rows = {}
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.__setitem__(
                Site(number, "resid_pre"), (args[0] if args else kwargs["hidden_states"])[0, 1:].clone()
            ),
            with_kwargs=True,
        )
        layer.register_forward_hook(
            lambda module, args, output, number=number: seen.__setitem__(
                Site(number, "resid_post"),
                (output[0] if isinstance(output, tuple) else output).reshape(-1, D_MODEL)[1:].clone(),
            )
        )
        mlp_of(layer).register_forward_pre_hook(
            lambda module, args, number=number: seen.__setitem__(Site(number, "mlp_in"), args[0][0, 1:].clone())
        )
    found: dict[Site, list[Tensor]] = {site: [] for site in ALL_SITES}
    for context in some_contexts():
        tokens = torch.from_numpy(context.tokens).long()[None]
        for number, layer in enumerate(layers):
            with silenced(mlp_of(layer)):
                model(input_ids=tokens)
            found[Site(number, "resid_mid")].append(seen[Site(number, "resid_post")])
        model(input_ids=tokens)
        for number in range(LAYERS):
            for kind in ("resid_pre", "resid_post", "mlp_in"):
                found[Site(number, kind)].append(seen[Site(number, kind)])
    rows = {site: torch.cat(parts) for site, parts in found.items() if parts}
    for number in range(LAYERS):
        pre, mid, post = (rows[Site(number, kind)] for kind in ("resid_pre", "resid_mid", "resid_post"))
        rows |= {Site(number, "attn_out"): mid - pre, Site(number, "mlp_out"): post - mid}
    return rows


def assert_close(found: Tensor, expected: Tensor, scale: Tensor, what: object) -> None:
    """Relative to the residual stream, of which attn_out and mlp_out are differences."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * scale.abs().max(), what


@dataclass(frozen=True)
class Case:
    folder: Path
    attention: str
    rows: Rows


@pytest.fixture(scope="module", params=[f"{m} {a}" for m in MODELS for a in ATTENTION.get(m, ["eager", "sdpa"])])
def case(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Case:
    family, attention = request.param.split()
    folder = make_model(family, **MODELS[family])
    return Case(folder, attention, harvested(folder, attention))


def test_rows_are_what_the_sites_mean(case: Case) -> None:
    """Also that neighbours in a batch change nothing: the independent model runs each context alone."""
    expected = independent(case.folder, case.attention)
    assert case.rows.keys() == expected.keys() == set(ALL_SITES)
    for site in ALL_SITES:
        assert expected[site].std() > 0.02, site  # or else the comparison could not fail
        assert_close(case.rows[site], expected[site], expected[Site(site.layer, "resid_post")], site)


def test_the_residual_stream_adds_up(case: Case) -> None:
    for number in range(LAYERS):
        site = {kind: case.rows[Site(number, kind)] for kind in KINDS}
        assert_close(site["resid_pre"] + site["attn_out"], site["resid_mid"], site["resid_mid"], number)
        assert_close(site["resid_mid"] + site["mlp_out"], site["resid_post"], site["resid_post"], number)


@pytest.mark.parametrize("layers", [1, 2])
def test_fewer_layers_give_the_same_rows(case: Case, layers: int) -> None:
    early = harvested(case.folder, case.attention, layers)
    assert len(early) == 6 * layers
    for site, acts in early.items():
        assert torch.equal(acts, case.rows[site]), site


# ---- splicing


@pytest.fixture(scope="module", params=MODELS)
def causal(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Any:
    folder = make_model(request.param, **MODELS[request.param])
    attention = ATTENTION.get(request.param, ["sdpa"])[0]
    return load_causal_model(describe_model(str(folder)), dtype="float32", attention=attention)


TOKENS = torch.from_numpy(np.random.default_rng(1).integers(3, VOCABULARY, (2, 20)))


@torch.no_grad()
def run_spliced(model: Any, site: Site, replace: Callable[[Tensor], Tensor]) -> tuple[Rows, Tensor]:
    """Logits, and every site of the layer as it is after the splice."""
    here = [s for s in ALL_SITES if s.layer == site.layer]
    with splice(model, site, replace), capture(model, here) as taken:
        logits = model(input_ids=TOKENS, use_cache=False).logits
        return {s: acts.clone() for s, acts in taken.items()}, logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_changes_nothing(causal: Any, kind: str) -> None:
    with torch.no_grad():
        clean = causal(input_ids=TOKENS, use_cache=False).logits
    _, spliced = run_spliced(causal, Site(1, kind), lambda acts: acts)
    if kind == "resid_mid":
        assert_close(spliced, clean, clean, kind)
    else:
        assert torch.equal(spliced, clean)
    before = {id(module): module.__dict__.get("forward") for module in causal.modules()}
    assert all(forward is None for forward in before.values())  # nothing is left behind


@torch.no_grad()
def layer_output(model: Any, number: int) -> Tensor:
    """What a layer returns, by torch's hook."""
    kept: list[Tensor] = []
    hook = model.model.layers[number].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=TOKENS, use_cache=False)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("number", [0, 2])
def test_what_is_put_in_is_what_the_model_goes_on_with(causal: Any, number: int) -> None:
    layer, generator = causal.model.layers[number], torch.Generator().manual_seed(0)
    new = torch.randn(2, 20, D_MODEL, generator=generator)
    clean, _ = run_spliced(causal, Site(number, "resid_pre"), lambda acts: acts)
    pre, mid, mlp_out = (clean[Site(number, kind)] for kind in ("resid_pre", "resid_mid", "mlp_out"))

    def outputs(kind: str, replace: Callable[[Tensor], Tensor], silence: nn.Module | None = None) -> Tensor:
        with splice(causal, Site(number, kind), replace):
            if silence is None:
                return layer_output(causal, number)
            with silenced(silence):
                return layer_output(causal, number)

    def check(found: Tensor, expected: Tensor) -> None:
        assert_close(found, expected, expected, number)

    check(outputs("resid_post", lambda acts: new), new)
    check(outputs("mlp_out", lambda acts: new), mid + new)
    check(outputs("mlp_out", torch.zeros_like), mid)
    check(outputs("attn_out", lambda acts: new, silence=mlp_of(layer)), pre + new)
    check(outputs("resid_mid", lambda acts: new, silence=mlp_of(layer)), new)
    # The MLP works on each position alone: what it receives reversed, it adds reversed, to the same residual stream.
    check(outputs("mlp_in", lambda acts: acts.flip(1)), mid + mlp_out.flip(1))
    # A layer without attention goes from resid_pre to resid_mid unchanged.
    check(outputs("resid_pre", lambda acts: new, silence=layer.self_attn), outputs("resid_mid", lambda acts: new))


@pytest.mark.parametrize("kind", ["mlp_out", "attn_out"])
def test_what_a_splice_leaves_alone_keeps_its_bits(make_model: Callable[..., Path], kind: str) -> None:
    """In bfloat16, dividing by Granite 3's own multiplier and multiplying again changes every hundredth number."""
    folder = make_model("granite", **{**SCALED, "residual_multiplier": 0.22})
    model = load_causal_model(describe_model(str(folder)), dtype="bfloat16")
    with torch.no_grad():
        clean = model(input_ids=TOKENS, use_cache=False).logits
    _, spliced = run_spliced(model, Site(1, kind), lambda acts: acts)
    assert torch.equal(spliced, clean)


# ---- what differs between families, and what is refused


def test_the_text_part_of_gemma3(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """A checkpoint of text and images: its language part is run, and nothing else is read."""
    text = transformers.AutoConfig.from_pretrained(make_model("gemma3_text", **SLIDING))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whole.model.language_model.parameters():
            parameter.normal_(0, 0.3)
    whole.save_pretrained(tmp_path / "gemma3")
    info = describe_model(str(tmp_path / "gemma3"))
    check_weights(info, LAYERS)
    assert (info.num_layers, info.d_model) == (LAYERS, D_MODEL)
    found = harvested(tmp_path / "gemma3", "sdpa")
    for context in some_contexts():
        with torch.no_grad():
            states = whole(
                input_ids=torch.from_numpy(context.tokens).long()[None], output_hidden_states=True
            ).hidden_states
        for number in range(LAYERS):
            acts = found[Site(number, "resid_pre")][context.first_row : context.first_row + context.num_rows]
            assert_close(acts, states[number][0, 1:], states[number], number)
    causal = load_causal_model(info, dtype="float32")
    with torch.no_grad():
        assert_close(causal(TOKENS).logits, whole(TOKENS).logits, whole(TOKENS).logits, "logits")


def test_sdpa_is_refused_where_logits_are_capped(make_model: Callable[..., Path]) -> None:
    info = describe_model(str(make_model("gemma2", **SLIDING)))
    info.check_attention("eager")
    with pytest.raises(
        InputError, match=r"harvest\.attention: .* caps its attention logits.* set harvest\.attention: eager"
    ):
        info.check_attention("sdpa")


def test_contexts_beyond_where_rotary_angles_change(make_model: Callable[..., Path]) -> None:
    info = describe_model(str(make_model("phi3", **MODELS["phi3"])))
    info.check_context(64)
    with pytest.raises(
        InputError, match=r"65 tokens are more than the 64 positions .*original_max_position_embeddings"
    ):
        info.check_context(65)


def test_a_model_that_sees_later_tokens(make_model: Callable[..., Path]) -> None:
    folder = make_model("gemma3_text", **SLIDING, use_bidirectional_attention=True)
    with pytest.raises(InputError, match="attends to later tokens too: it is no causal language model"):
        describe_model(str(folder))


def test_an_unknown_family_is_refused_with_the_list(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=320).save_pretrained(tmp_path)
    with pytest.raises(InputError) as refusal:
        describe_model(str(tmp_path))
    assert all(family in str(refusal.value) for family in [*FAMILIES, "gemma3"])
    with pytest.raises(InputError, match="of no family that is known"), capture(nn.Linear(1, 1), []):
        pass
