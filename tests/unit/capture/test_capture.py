"""Stored rows against an independent capture: unmodified transformers, one context at a time, hooks of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import KINDS, harvest, start_harvest, write_corpus
from tokenizers import Tokenizer

from pipeline.capture.contexts import contexts_of_rows
from pipeline.capture.unit import UnitRunner
from pipeline.corpus.documents import Sizes
from pipeline.corpus.table_columns import context_starts, row_column
from pipeline.model.describe import describe_model
from pipeline.model.load import DTYPES, load_base_model
from pipeline.sites import parse_site
from storage.format.arrays import Array
from storage.store import Store
from workers.cluster.tasks import Here
from workers.plan.source import open_source
from workers.plan.stage import plan_rows
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

TOLERANCE = 1e-4
CONTEXT = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 8},
    "qwen2": {},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
ALL_SITES = [f"{kind}.{layer}" for layer in range(3) for kind in KINDS]


def independent_capture(folder: Path) -> Callable[[list[int]], dict[str, np.ndarray]]:
    """A function from the tokens of one context to site -> float32 [position, d_model]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    taken: dict[str, torch.Tensor] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        taken[name] = value.detach().squeeze(0).clone()

    for number, layer in enumerate(model.model.layers):
        for name, module in [
            ("resid_pre", layer),
            ("resid_mid", layer.post_attention_layernorm),
            ("mlp_in", layer.mlp),
        ]:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=f"{name}.{number}": keep(
                    name, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
        for name, module in [("resid_post", layer), ("mlp_out", layer.mlp), ("attn_out", layer.self_attn)]:
            module.register_forward_hook(lambda module, args, output, name=f"{name}.{number}": keep(name, output))

    @torch.no_grad()
    def run(tokens: list[int]) -> dict[str, np.ndarray]:
        hidden = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
        for number in range(len(model.model.layers)):  # transformers' own record says the hooks are in the right place
            assert torch.equal(taken[f"resid_pre.{number}"], hidden[number][0])
        return {name: value.numpy() for name, value in taken.items()}

    return run


def independent_rows(folder: Path, texts: list[str]) -> list[dict[str, np.ndarray]]:
    """What the store should hold for each text: its contexts alone, BOS dropped; and under "token" the tokens."""
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(folder), independent_capture(folder)
    found = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        windows = [tokens[start : start + CONTEXT - 1] for start in range(0, len(tokens), CONTEXT - 1)]
        parts = [{site: acts[1:] for site, acts in run([0, *window]).items()} for window in windows]
        rows = {site: np.concatenate([part[site] for part in parts]) for site in parts[0]}
        found.append({"token": np.asarray(tokens), **rows})
    return found


def rows_of_document(store: Store, number: int) -> range:
    document = store.documents.slice(number, 1).to_pylist()[0]
    return range(document["row_start"], document["row_stop"])


def record_number(store: Store, document: int) -> int:
    return int(store.documents.column("source")[document].as_py().rpartition(":")[2])


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: Any, corpus: Path
) -> tuple[Path, Store]:
    folder = make_model(request.param.split()[0], **FAMILIES[request.param])
    place = tmp_path_factory.mktemp("family") / "store"
    return folder, harvest(place, folder, corpus, ALL_SITES, dtype="float32", context=CONTEXT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, corpus: Path) -> Store:
    """The llama's float32 store, harvested with default batches."""
    return harvest(tmp_path_factory.mktemp("whole") / "store", llama, corpus, ALL_SITES, dtype="float32")


def test_rows_equal_an_independent_capture(family: tuple[Path, Store], texts: list[str]) -> None:
    folder, store = family
    stored = {site: store.read(site) for site in ALL_SITES}
    of_record = independent_rows(folder, texts)
    for document in range(store.info.num_documents):
        rows = rows_of_document(store, document)
        expected = of_record[record_number(store, document)]
        np.testing.assert_array_equal(store.columns(rows.start, rows.stop)["token"], expected["token"])
        for site in ALL_SITES:
            np.testing.assert_allclose(stored[site][rows], expected[site], rtol=0, atol=TOLERANCE, err_msg=site)


def test_the_residual_stream_adds_up(family: tuple[Path, Store]) -> None:
    _, store = family
    for layer in range(3):
        site = {kind: store.read(f"{kind}.{layer}") for kind in KINDS}
        np.testing.assert_allclose(site["resid_pre"] + site["attn_out"], site["resid_mid"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(site["resid_mid"] + site["mlp_out"], site["resid_post"], rtol=0, atol=TOLERANCE)
        if layer:
            np.testing.assert_array_equal(site["resid_pre"], store.read(f"resid_post.{layer - 1}"))


def test_activations_are_large_against_the_tolerance(family: tuple[Path, Store]) -> None:
    """Or else the comparisons above could not fail."""
    _, store = family
    assert all(store.read(site).std() > 0.05 for site in ALL_SITES)


def test_every_token_is_a_row_and_nothing_else_is(whole: Store, llama: Path, texts: list[str]) -> None:
    encode = Tokenizer.from_file(str(llama / "tokenizer.json")).encode
    ids = [encode(text, add_special_tokens=False).ids for text in texts]
    columns = whole.columns(0, whole.num_rows)
    assert whole.num_rows == sum(map(len, ids))
    assert columns["position"].min() == 1  # BOS stands at 0
    assert columns["position"].max() == CONTEXT - 1
    for document in range(whole.info.num_documents):
        rows = rows_of_document(whole, document)
        assert columns["token"][rows].tolist() == ids[record_number(whole, document)]
        assert columns["position"][rows].tolist() == [1 + i % (CONTEXT - 1) for i in range(len(rows))]


def test_units_cut_contexts(whole: Store) -> None:
    """What makes the comparison with the independent capture cover unit boundaries too."""
    assert whole.info.num_units >= 3
    assert whole.num_rows % 1024
    context = whole.columns(0, whole.num_rows)["context"]
    assert any(context[boundary - 1] == context[boundary] for boundary in range(1024, whole.num_rows, 1024))


@pytest.mark.parametrize("batch_tokens", [1, 50, 333, 100_000])
def test_rows_do_not_depend_on_batches(
    tmp_path: Path, whole: Store, llama: Path, corpus: Path, batch_tokens: int
) -> None:
    sites = ["resid_post.2", "mlp_in.1"]
    other = harvest(tmp_path / "store", llama, corpus, sites, dtype="float32", batch_tokens=batch_tokens)
    for site in sites:
        np.testing.assert_allclose(other.read(site), whole.read(site), rtol=0, atol=TOLERANCE)


def test_rows_do_not_depend_on_other_documents(tmp_path: Path, whole: Store, llama: Path, texts: list[str]) -> None:
    chosen = list(range(1, len(texts), 5))
    path = write_corpus(tmp_path / "some.parquet", [texts[i] for i in chosen])
    some = harvest(tmp_path / "store", llama, path, ["resid_post.2"], dtype="float32", seed=7)
    of_record = {record_number(whole, d): rows_of_document(whole, d) for d in range(whole.info.num_documents)}
    stored = whole.read("resid_post.2")
    for document in range(some.info.num_documents):
        rows = of_record[chosen[record_number(some, document)]]
        alone = some.read("resid_post.2", np.asarray(rows_of_document(some, document)))
        np.testing.assert_allclose(alone, stored[rows], rtol=0, atol=TOLERANCE)


def test_layers_above_the_deepest_site_do_not_matter(tmp_path: Path, whole: Store, llama: Path, corpus: Path) -> None:
    harvesting = start_harvest(tmp_path / "store", llama, corpus, ["mlp_out.0"], dtype="float32")
    assert harvesting.jobs[0].setup.layers == 1
    harvesting.run()
    np.testing.assert_array_equal(harvesting.store.read("mlp_out.0"), whole.read("mlp_out.0"))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest and ties to even, by integer arithmetic on the bits."""
    wide = values.view(np.uint32).astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def test_bfloat16_is_float32_rounded_to_nearest_even(tmp_path: Path, whole: Store, llama: Path, corpus: Path) -> None:
    rounded = harvest(tmp_path / "store", llama, corpus, ALL_SITES, dtype="bfloat16")
    for site in ALL_SITES:
        np.testing.assert_array_equal(rounded.read(site).view(np.uint16), bfloat16_bits(whole.read(site)))


def test_float16_is_float32_rounded(tmp_path: Path, whole: Store, llama: Path, corpus: Path) -> None:
    rounded = harvest(tmp_path / "store", llama, corpus, ["resid_post.2"], dtype="float16").read("resid_post.2")
    np.testing.assert_array_equal(rounded, whole.read("resid_post.2").astype(np.float16))


def test_a_model_in_bfloat16_stores_what_it_computes(tmp_path: Path, llama: Path, corpus: Path, whole: Store) -> None:
    store = harvest(tmp_path / "store", llama, corpus, ["resid_post.0"], dtype="bfloat16", model_dtype="bfloat16")
    stored, exact = store.read("resid_post.0").astype(np.float32), whole.read("resid_post.0")
    assert np.abs(stored - exact).max() < 0.05 * np.abs(exact).max()


def test_without_dropped_positions_bos_is_a_row(tmp_path: Path, llama: Path, texts: list[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus.parquet", texts[:4])
    store = harvest(tmp_path / "store", llama, corpus, ["resid_post.1"], dtype="float32", skip_first=0)
    columns = store.columns(0, store.num_rows)
    assert (columns["token"][columns["position"] == 0] == 0).all()
    assert (columns["position"] == 0).sum() == store.info.num_contexts
    assert np.isfinite(store.read("resid_post.1")).all()


@pytest.mark.parametrize("skip_first", [2, 5])
def test_more_dropped_positions_change_no_row(
    tmp_path: Path, whole: Store, llama: Path, corpus: Path, skip_first: int
) -> None:
    store = harvest(tmp_path / "store", llama, corpus, ["resid_post.2"], dtype="float32", skip_first=skip_first)
    kept = np.flatnonzero(whole.columns(0, whole.num_rows)["position"] >= skip_first)
    np.testing.assert_allclose(store.read("resid_post.2"), whole.read("resid_post.2", kept), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def planned(llama: Path, corpus: Path) -> tuple[dict[str, Array], list[Array]]:
    """The columns of 300 rows, and the tokens of their contexts."""
    source = open_source(
        CorpusSettings(path=str(corpus), context=32, rows=300), ModelSettings(id=str(llama)), 328, "main"
    )
    (bucket,) = plan_rows(source, lambda done, total: None, Here()).buckets
    nothing = Sizes(0, 0, 0, 0)
    columns = {name: row_column(bucket.documents, name, nothing) for name in ("token", "position", "context")}
    return columns, np.split(bucket.documents.tokens, context_starts(bucket.documents, nothing)[1:])


@pytest.mark.parametrize("rows_per_unit", [3, 7, 50, 300])
def test_units_of_any_size_give_the_same_rows(
    llama: Path, planned: tuple[dict[str, Array], list[Array]], rows_per_unit: int
) -> None:
    columns, contexts = planned
    model = load_base_model(describe_model(str(llama)), layers=3, dtype="float32")
    sites = [parse_site(site) for site in ALL_SITES]
    runner = UnitRunner(model, dict.fromkeys(sites, "float32"), d_model=32, batch_tokens=100, context=64, device="cpu")

    def unit(start: int, stop: int) -> dict[str, np.ndarray]:
        position, context = columns["position"][start:stop], columns["context"][start:stop]
        tokens = contexts[int(context[0]) : int(context[-1]) + 1]
        result = runner.run(contexts_of_rows(position, context, tokens), stop - start)
        return {str(site): acts.values.numpy() for site, acts in result.sites.items()}

    whole = unit(0, 300)
    units = [unit(start, min(start + rows_per_unit, 300)) for start in range(0, 300, rows_per_unit)]
    for site in ALL_SITES:
        together = np.concatenate([acts[site] for acts in units])
        np.testing.assert_allclose(together, whole[site], rtol=0, atol=TOLERANCE)


def test_any_positions_may_be_rows(llama: Path, planned: tuple[dict[str, Array], list[Array]]) -> None:
    """Every third position kept: the same activations as when all are, from contexts that are run whole."""
    columns, contexts = planned
    model = load_base_model(describe_model(str(llama)), layers=3, dtype="float32")
    site = parse_site("resid_post.2")
    runner = UnitRunner(model, {site: "float32"}, d_model=32, batch_tokens=100, context=64, device="cpu")
    every = runner.run(contexts_of_rows(columns["position"], columns["context"], contexts), 300).sites[site].values
    kept = np.flatnonzero(columns["position"] % 3 == 0)
    context = columns["context"][kept]
    some = runner.run(contexts_of_rows(columns["position"][kept], context, contexts[context[0] :]), len(kept))
    np.testing.assert_allclose(some.sites[site].values.numpy(), every.numpy()[kept], rtol=0, atol=TOLERANCE)


def test_a_tokenizer_saved_with_truncation_and_padding_still_gives_every_token(
    tmp_path: Path, make_model: Callable[..., Path], corpus: Path, whole: Store
) -> None:
    """tokenizer.json may carry both, left there by whoever saved it; they are no part of the text."""
    folder = make_model("llama", tie_word_embeddings=True)
    path = folder / "tokenizer.json"
    bpe = Tokenizer.from_file(str(path))
    bpe.enable_truncation(16)
    bpe.enable_padding(pad_id=2, pad_token="<pad>")
    bpe.save(str(path))
    store = harvest(tmp_path / "store", folder, corpus, ["resid_post.0"])
    assert store.num_rows == whole.num_rows
    np.testing.assert_array_equal(store.columns(0, store.num_rows)["token"], whole.columns(0, whole.num_rows)["token"])


def test_sources_of_the_corpus_are_those_of_the_file(whole: Store, corpus: Path) -> None:
    languages = pq.read_table(corpus).column("language").to_pylist()
    stored = whole.documents.column("language").to_pylist()
    assert stored == [languages[record_number(whole, document)] for document in range(whole.info.num_documents)]


def test_dtypes_of_models_are_torch_s() -> None:
    assert {name: str(dtype) for name, dtype in DTYPES.items()} == {n: f"torch.{n}" for n in DTYPES}


def test_no_document_is_skipped_here(whole: Store) -> None:
    assert whole.info.skipped == {}
