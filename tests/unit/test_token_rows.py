"""What a token row is: BOS, control strings, excluded tokens, separators, and what is kept beside documents."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import VOCABULARY, plan, store_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from pipeline.corpora.contents import NOT_EMBEDDED, TextEncoder, TokensEncoder
from pipeline.errors import InputError
from pipeline.layout import ONLY_EXCLUDED
from pipeline.tokenizer import load_tokenizer
from storage.errors import StoreMismatch
from storage.store import Store
from workers import tabling
from workers.corpus_settings import CorpusSettings
from workers.planning import ensure_store
from workers.settings import ModelSettings

BOS, EOS = 0, 1
Tokenizing = Callable[[Path], Any]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def with_tokenizer(folder: Path, llama: Path, change: Callable[[Any], None]) -> Path:
    """A folder with the test model's tokenizer, changed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_added_bos(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A tokenizer that defines a BOS and does not add it, as SmolLM2's, OLMo's, Granite's and Phi-3's."""

    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    return with_tokenizer(tmp_path_factory.mktemp("no-bos"), llama, change)


def contexts_of(store: Store) -> list[list[int]]:
    return [tokens.tolist() for tokens in store.context_tokens(0, store.info.num_contexts - 1)]


def ids(model: Path, text: str) -> list[int]:
    return load_tokenizer(str(model)).backend_tokenizer.encode(text, add_special_tokens=False).ids


# ---- BOS


def test_auto_does_what_calling_the_tokenizer_does(tmp_path: Path, llama: Path, without_added_bos: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    for name, model in (("added", llama), ("not", without_added_bos)):
        called = transformers.AutoTokenizer.from_pretrained(model)("count every town")["input_ids"]
        assert contexts_of(store_of(tmp_path / name, corpus, model, skip_first=0)) == [called]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_as_the_spec_says(tmp_path: Path, llama: Path, without_added_bos: Path, bos: bool) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    for name, model in (("added", llama), ("not", without_added_bos)):
        found = contexts_of(store_of(tmp_path / name, corpus, model, bos=bos, skip_first=0))
        assert found == [[BOS] * bos + ids(model, "count every town")]


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_every_window_begins_alike(tmp_path: Path, llama: Path, bos: Any) -> None:
    text = "count every town " * 20
    corpus = write(tmp_path / "a.jsonl", [{"text": text}])
    windows = contexts_of(store_of(tmp_path / "store", corpus, llama, bos=bos, context=16, skip_first=0))
    assert len(windows) > 3
    lead = int(bos is not False)
    assert all(window[:lead] == [BOS] * lead for window in windows)
    assert [t for window in windows for t in window[lead:]] == ids(llama, text)


@pytest.mark.parametrize("content", ["text", "tokens"])
def test_a_bos_that_is_there_is_not_doubled(tmp_path: Path, llama: Path, content: str) -> None:
    given = {"text": "<s>one two three"} if content == "text" else {"tokens": [BOS, 40, 41, 42]}
    corpus = write(tmp_path / "a.jsonl", [given])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama, **{content: content}, specials="tokens"))
    assert context.count(BOS) == 1
    assert context[0] == BOS


def test_a_bos_is_asked_for_that_there_is_not(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"corpus\.bos: the tokenizer has no BOS; leave the key out"):
        plan(corpus, model, bos=True)
    assert plan(corpus, model, bos=False).sizes.rows


def test_a_tokenizer_that_begins_with_several_tokens(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> </s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"begins texts with 2 tokens \(<s> </s>\).*corpus\.bos: true"):
        plan(corpus, model)
    assert contexts_of(store_of(tmp_path / "store", corpus, model, bos=True))[0][:2] != [BOS, EOS]


def test_an_eos_that_a_tokenizer_adds_is_no_row(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    assert contexts_of(store_of(tmp_path / "store", corpus, model)) == [ids(llama, "count every town")]


# ---- control strings


@pytest.mark.parametrize(
    "text", ["strike <s>old</s> new text", "<s>one two three", "a log: <pad><pad></s>", "</s>", "<s><s> town"]
)
def test_control_strings_are_text(tmp_path: Path, llama: Path, text: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": text}])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama))
    assert context[0] == BOS
    assert not {BOS, EOS, 2}.intersection(context[1:])
    assert load_tokenizer(str(llama)).decode(context[1:]) == text


def test_control_strings_as_tokens(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "strike <s>old</s> new text"}])
    (context,) = contexts_of(store_of(tmp_path / "store", corpus, llama, specials="tokens"))
    assert context == [BOS, *ids(llama, "strike <s>old</s> new text")]
    assert EOS in context


def test_a_tokenizer_is_left_as_it_was(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    TextEncoder(tokenizer, BOS, "text").encode(["</s>"])
    assert tokenizer.backend_tokenizer.encode("</s>", add_special_tokens=False).ids == [EOS]


def test_a_store_from_before_there_was_a_choice_says_so(tmp_path: Path, llama: Path) -> None:
    """Its control strings are tokens: it goes on with the key that says it, and is refused without."""
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every <s> town"}])
    model = ModelSettings(id=str(llama))

    def ensure(**options: Any) -> tuple[Store, bool]:
        spec = CorpusSettings(path=str(corpus), context=64, **options)
        return ensure_store(tmp_path / "store", spec, model, lambda done, total: None)

    store, made = ensure(specials="tokens")
    assert made
    assert "specials" not in store.info.plan  # as stores from before
    assert not ensure(specials="tokens")[1]
    with pytest.raises(StoreMismatch, match=r"corpus\.specials: 'tokens' in the store, 'text' in the spec"):
        ensure()


PIECES = ["count", " every", "<s>", "</s>", "<pad>", "<", "s>", "\n", "雨", " naïve", "a" * 40, "\t", "</", "é", "🌧"]


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), context=st.sampled_from([5, 9, 64]))
def test_rows_are_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: list[str], context: int
) -> None:
    """Decoding a document's rows gives its text back, whatever control strings it holds and however it is cut."""
    text = "".join(parts)
    if not text.strip():
        return
    folder = tmp_path_factory.mktemp("rows")
    store = store_of(folder / "store", write(folder / "a.jsonl", [{"text": text}]), llama, context=context)
    tokens = store.columns(0, store.num_rows, ("token",))["token"].tolist()
    assert load_tokenizer(str(llama)).decode(tokens, skip_special_tokens=False) == text
    assert not {BOS, EOS, 2}.intersection(tokens)


# ---- excluded tokens


@pytest.mark.parametrize("spelling", ["as the vocabulary spells it", "as text", "by its id"])
def test_excluded_tokens_are_run_and_are_no_rows(tmp_path: Path, llama: Path, spelling: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town and store what every town gave in towns"}])
    to = ids(llama, " to")
    assert len(to) == 1
    excluded = {"as the vocabulary spells it": "Ġto", "as text": " to", "by its id": to[0]}[spelling]
    plain = store_of(tmp_path / "plain", corpus, llama)
    store = store_of(tmp_path / "store", corpus, llama, exclude_tokens=(excluded,))
    tokens = plain.columns(0, plain.num_rows, ("token",))["token"]
    found = store.columns(0, store.num_rows, ("token", "position"))
    assert np.array_equal(found["token"], tokens[tokens != to[0]])
    assert np.array_equal(found["position"], 1 + np.flatnonzero(tokens != to[0]))
    assert contexts_of(store) == contexts_of(plain)  # all are run
    assert store.info.plan["exclude_tokens"] == to


def test_a_document_of_excluded_tokens_is_counted(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"tokens": [40, 40]}, {"tokens": [40, 41]}, {"tokens": []}])
    found = plan(corpus, llama, tokens="tokens", exclude_tokens=(40,))
    assert found.skipped.counts == {ONLY_EXCLUDED: 1, "empty": 1}
    assert found.sizes.rows == 1


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("count every town", r"'count every town' is no single token but c o u n t "),
        ("", r"'' is no single token but nothing"),
        (10**6, r"the tokenizer has no token 1000000; its ids are 0 to \d+"),
        (-1, r"the tokenizer has no token -1"),
    ],
)
def test_what_is_no_token(tmp_path: Path, llama: Path, token: Any, why: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    with pytest.raises(InputError, match=r"corpus\.exclude_tokens: " + why):
        plan(corpus, llama, exclude_tokens=(token,))


# ---- separators


def test_a_separator_cuts_records_into_documents(tmp_path: Path, llama: Path) -> None:
    records = [[40, 41, EOS, 42, 43, 44, EOS], [EOS, EOS, 45, 46], [50, 51], [EOS, EOS]]
    corpus = write(tmp_path / "a.jsonl", [{"tokens": r, "kind": f"k{i}"} for i, r in enumerate(records)])
    store = store_of(
        tmp_path / "store", corpus, llama, tokens="tokens", separator=EOS, labels=("kind",), rows_per_unit=1024
    )
    found = dict(zip(store.documents["source"].to_pylist(), contexts_of(store), strict=True))
    assert found == {
        "a.jsonl:1#0": [BOS, 40, 41],
        "a.jsonl:1#1": [BOS, 42, 43, 44],
        "a.jsonl:2#0": [BOS, 45, 46],
        "a.jsonl:3#0": [BOS, 50, 51],
    }
    kinds = dict(zip(store.documents["source"].to_pylist(), store.documents["kind"].to_pylist(), strict=True))
    assert (kinds["a.jsonl:1#0"], kinds["a.jsonl:1#1"], kinds["a.jsonl:2#0"]) == ("k0", "k0", "k1")
    assert store.info.skipped == {"empty": {"count": 1, "first": ["a.jsonl:4#0"]}}


def test_a_separator_by_its_string_and_without_bos(tmp_path: Path, llama: Path, without_added_bos: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"tokens": [40, 41, EOS, 42, 43]}])
    store = store_of(tmp_path / "store", corpus, without_added_bos, tokens="tokens", separator="</s>", skip_first=0)
    assert contexts_of(store) == [[40, 41], [42, 43]]
    assert store.info.plan["separator"] == EOS


def test_a_separator_needs_tokens() -> None:
    with pytest.raises(ValueError, match="a separator cuts records of token ids"):
        CorpusSettings(path="x", separator=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=6))
def test_no_token_is_lost_at_separators(records: list[list[int]]) -> None:
    encoded = TokensEncoder(10, None, separator=3).encode(records)
    assert encoded.tokens.tolist() == [t for record in records for t in record if t != 3]
    assert encoded.record is not None
    for number, record in enumerate(records):
        expected = [part for part in "".join(map(str, record)).split("3") if part]
        of_record = np.flatnonzero(encoded.record == number)
        ends = np.cumsum(encoded.lengths)
        found = ["".join(map(str, encoded.tokens[ends[i] - encoded.lengths[i] : ends[i]])) for i in of_record]
        assert [f for f in found if f] == expected
        assert (int(of_record[0]) in encoded.bad) == (not expected)


# ---- tokens without an embedding


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY)])

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}, {"text": f"an <extra{VOCABULARY - 1}> town"}])
    found = plan(corpus, model)
    assert found.skipped.counts == {NOT_EMBEDDED: 1}
    assert found.skipped.first[NOT_EMBEDDED] == [(2, "a.jsonl:2")]
    assert found.sizes.documents == 1


# ---- columns beside documents


def test_columns_are_kept_and_are_no_subpopulations(tmp_path: Path, llama: Path) -> None:
    table = pa.table({"text": ["count every town"] * 3, "url": ["a", None, "c"], "n": [1, 2, 3], "kind": ["x"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    store = store_of(tmp_path / "store", tmp_path / "a.parquet", llama, columns=("url", "n"), labels=("kind",))
    kept = sorted(store.documents.select(["url", "n", "kind"]).to_pylist(), key=lambda line: line["n"])
    assert kept == table.select(["url", "n", "kind"]).to_pylist()
    assert store.info.labels == ["kind"]
    assert store.sql("select count(*) from documents where url = 'c'").fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"columns": ("source",)}, r"corpus\.columns: source is a column of Granary's own"),
        ({"columns": ("nothing",)}, r"corpus\.columns: no column 'nothing' in"),
    ],
)
def test_columns_that_cannot_be(tmp_path: Path, llama: Path, options: dict[str, Any], why: str) -> None:
    pq.write_table(pa.table({"text": ["count every town"], "source": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=why):
        plan(tmp_path / "a.parquet", llama, **options)


def test_a_column_is_not_a_label_too() -> None:
    with pytest.raises(ValueError, match="leave kind out of columns"):
        CorpusSettings(path="x", labels=("kind",), columns=("kind", "url"))


def test_a_label_of_too_many_values_is_refused_before_anything_is_written(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabling, "LABEL_VALUES", 100)
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town", "url": f"u{i}"} for i in range(101)])
    with pytest.raises(InputError, match=r"'url' has more than 100 values \('u0', 'u1'.*corpus\.columns"):
        store_of(tmp_path / "store", corpus, llama, labels=("url",))
    assert not (tmp_path / "store").exists()
    corpus = write(tmp_path / "b.jsonl", [{"text": "count every town", "url": f"u{i % 100}"} for i in range(301)])
    assert store_of(tmp_path / "store", corpus, llama, labels=("url",)).info.labels == ["url"]


# ---- with labels of tokens and spans


def values_of(store: Store, label: str) -> list[tuple[int, str | None]]:
    return store.sql(f"select token, {label} from rows order by row").fetchall()


def test_labels_of_tokens_in_documents_that_were_cut(tmp_path: Path, llama: Path) -> None:
    records = [{"tokens": [BOS, 40, 41, EOS, 42, EOS], "tag": ["s", "a", None, "x", "b", "x"]}]
    corpus = write(tmp_path / "a.jsonl", records)
    store = store_of(tmp_path / "store", corpus, llama, tokens="tokens", separator=EOS, labels=("tag",))
    assert values_of(store, "tag") == [(40, "a"), (41, None), (42, "b")]


def test_spans_in_texts_with_control_strings(tmp_path: Path, llama: Path) -> None:
    """Offsets are those of the text as it is read: its control strings are characters."""
    text = "<s>town</s> and field"
    spans = [{"start": 3, "end": 7, "label": "PLACE"}, {"start": 16, "end": 21, "label": "LAND"}]
    corpus = write(tmp_path / "a.jsonl", [{"text": text, "entity": spans}])
    store = store_of(tmp_path / "store", corpus, llama, labels=("entity",))
    decode = load_tokenizer(str(llama)).decode
    for value, word in (("PLACE", "town"), ("LAND", " field")):
        assert decode([token for token, found in values_of(store, "entity") if found == value]) == word


def test_spans_of_a_text_that_begins_with_bos(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "<s>town", "entity": [{"start": 3, "end": 7, "label": "PLACE"}]}])
    store = store_of(tmp_path / "store", corpus, llama, labels=("entity",), specials="tokens")
    assert {found for _, found in values_of(store, "entity")} == {"PLACE"}


def test_labels_where_a_record_has_a_token_without_an_embedding(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY)])

    model = with_tokenizer(tmp_path / "model", llama, change)
    texts = [f"an <extra{VOCABULARY - 1}> town", "count every town"]
    spans = [[{"start": 0, "end": 2, "label": "FIRST"}], [{"start": 12, "end": 16, "label": "PLACE"}]]
    corpus = write(tmp_path / "a.jsonl", [{"text": t, "entity": s} for t, s in zip(texts, spans, strict=True)])
    store = store_of(tmp_path / "store", corpus, model, labels=("entity",))
    assert store.info.skipped == {NOT_EMBEDDED: {"count": 1, "first": ["a.jsonl:1"]}}
    assert {found for _, found in values_of(store, "entity")} == {None, "PLACE"}


@pytest.mark.parametrize("wrong", [2**31, 2**63, 2**70, -1, -(2**70), VOCABULARY])
def test_ids_of_any_size_are_told_to_be_of_another_tokenizer(tmp_path: Path, llama: Path, wrong: int) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"tokens": [40, 41]}, {"tokens": [40, wrong]}])
    with pytest.raises(InputError, match=rf"a\.jsonl:2 of .*token id {wrong} is outside the model's vocabulary"):
        plan(corpus, llama, tokens="tokens")


@pytest.mark.parametrize("ids", [[40, 1.5], [40, "x"], [True, False], [[40]], {"a": 1}, "40 41", [40, None]])
def test_what_is_no_list_of_token_ids_is_left_out(tmp_path: Path, llama: Path, ids: Any) -> None:
    found = plan(write(tmp_path / "a.jsonl", [{"tokens": [40, 41]}, {"tokens": ids}]), llama, tokens="tokens")
    assert found.sizes.documents == 1
    assert sum(found.skipped.counts.values()) == 1
