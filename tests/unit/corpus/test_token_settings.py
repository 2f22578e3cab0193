"""Which tokens are rows, and what is kept beside documents: excluded tokens, separators, columns, labels of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import VOCABULARY, contexts_of, ensure_rows, ids, plan, store_of, values_of, with_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.documents import ONLY_EXCLUDED
from pipeline.corpus.encode import NOT_EMBEDDED, TokensEncoder
from pipeline.errors import InputError
from pipeline.tokens.tokenizer import load_tokenizer
from storage.errors import StoreMismatch
from workers.plan import table_plan as tabling
from workers.plan.match import check_settings
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

BOS, EOS = 0, 1
Tokenizing = Callable[[Path], Any]


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


# ---- what a critic found


@pytest.mark.parametrize("content", [{"text": "text"}, {"tokens": "ids"}, {"messages": "chat"}])
def test_a_spec_that_is_written_out_whole_is_read_again(content: dict[str, str]) -> None:
    """As a job's is, with every default."""
    given = CorpusSettings.model_validate({"path": "x", **content})
    assert CorpusSettings.model_validate(given.model_dump(mode="json")) == given


@pytest.mark.parametrize("token", [True, False])
def test_truth_values_are_no_tokens(token: bool) -> None:
    for keys in ({"exclude_tokens": [token]}, {"tokens": "ids", "separator": token}):
        with pytest.raises(ValueError, match=f"a token is an id or a string, not {str(token).lower()}"):
            CorpusSettings.model_validate({"path": "x", **keys})


def test_a_separator_without_an_embedding(tmp_path: Path, llama: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY)])

    model = with_tokenizer(tmp_path / "model", llama, change)
    corpus = write(tmp_path / "a.jsonl", [{"tokens": [40, 41, VOCABULARY + 5, 42]}])
    store = store_of(tmp_path / "store", corpus, model, tokens="tokens", separator=VOCABULARY + 5)
    assert contexts_of(store) == [[BOS, 40, 41], [BOS, 42]]


def test_bad_labels_of_a_record_that_is_cut_count_once(tmp_path: Path, llama: Path) -> None:
    records = [{"tokens": [40, EOS, 41, EOS, 42], "tag": ["a"]}, {"tokens": [43, EOS, 44], "tag": ["a", None, "b"]}]
    corpus = write(tmp_path / "a.jsonl", records)
    store = store_of(tmp_path / "store", corpus, llama, tokens="tokens", separator=EOS, labels=("tag",))
    ((reason, entry),) = store.info.skipped.items()
    assert reason == "tag: not one value for each token"
    assert entry == {"count": 1, "first": ["a.jsonl:1#0"]}
    assert values_of(store, "tag") == [(43, "a"), (44, "b")]


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        ({"text": "<s>"}, {"skip_first": 0, "bos": False, "exclude_tokens": (BOS,)}, "nothing but"),
        ({"text": "<s>"}, {"skip_first": 0}, "empty"),
        ({"text": "<s>"}, {"skip_first": 1}, "empty"),
    ],
)
def test_reasons_of_documents_without_rows(
    tmp_path: Path, llama: Path, record: dict[str, str], options: dict[str, Any], reason: str
) -> None:
    corpus = write(tmp_path / "a.jsonl", [record, {"text": "count every town"}])
    (found,) = plan(corpus, llama, specials="tokens", **options).skipped.counts
    assert found.startswith(reason)


@pytest.mark.parametrize("task_bytes", [1, 2**20])
def test_sparse_columns_do_not_depend_on_how_a_corpus_is_cut(
    tmp_path: Path, llama: Path, task_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.corpus.formats.json_lines.PIECE_BYTES", 64 if task_bytes == 1 else 2**20)
    records = [{"text": f"count every town {i}", **({"url": "u"} if i == 7 else {})} for i in range(40)]
    corpus = write(tmp_path / "a.jsonl", records)
    store = store_of(tmp_path / "store", corpus, llama, tabling.Cuts(task_bytes=task_bytes), columns=("url",))
    assert store.sql("select count(url) from documents").fetchall() == [(1,)]
    with pytest.raises(InputError, match=r"corpus\.columns: no record has a value for link"):
        plan(corpus, llama, columns=("link",))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"specials": "tokens"}, "specials"),
        ({"bos": False}, "bos"),
        ({"exclude_tokens": (40,)}, "exclude_tokens"),
        ({"exclude_tokens": ("x",)}, "exclude_tokens"),
    ],
)
def test_later_stages_notice_other_tokens(tmp_path: Path, llama: Path, options: dict[str, Any], why: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    store = store_of(tmp_path / "store", corpus, llama)
    check_settings(store, CorpusSettings(path=str(corpus), bos=True))
    check_settings(store, CorpusSettings(path=str(corpus)))
    with pytest.raises(StoreMismatch, match=rf"corpus\.{why}: "):
        check_settings(store, CorpusSettings(path=str(corpus), **options))


def test_a_bos_is_told_as_the_spec_says_it(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": "count every town"}])
    model = ModelSettings(id=str(llama))
    ensure_rows(tmp_path / "store", CorpusSettings(path=str(corpus), context=64), model)
    with pytest.raises(StoreMismatch, match=r"corpus\.bos: True in the store, False in the spec"):
        ensure_rows(tmp_path / "store", CorpusSettings(path=str(corpus), context=64, bos=False), model)
