"""What a new user tried by hand and found wrong: lost words, control tokens in texts, tracebacks of odd types."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from corpora import plan, store_of, with_tokenizer, write
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.corpus.chats.messages import NO_CONTENT, read_chat
from pipeline.corpus.encode import NOT_AS_TEXT, TextEncoder
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.tokens.tokenizer import load_tokenizer
from workers.settings.corpus import CorpusSettings

TEXT = "count every town"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "text": "hi"},
        {"role": "user", "message": "hi"},
        {"role": "user", "Content": "hi"},
        {"role": "user", "parts": [{"text": "hi"}]},
        {"from": "human", "text": "hi"},
    ],
)
def test_a_message_with_its_words_elsewhere_is_left_out(message: dict[str, Any]) -> None:
    assert read_chat([message]) == NO_CONTENT


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": [{"name": "weigh"}]},
        {"role": "assistant", "reasoning_content": "so"},
        {"from": "gpt", "value": None},
    ],
)
def test_a_message_that_may_have_no_words(message: dict[str, Any]) -> None:
    assert not isinstance(read_chat([message]), str)


def unigram() -> Any:
    """Its control strings are in its vocabulary, as SentencePiece writes them."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "\u2581strike<>/oldnwx")]
    of = Tokenizer(models.Unigram(pieces, unk_id=0))
    of.pre_tokenizer = pre_tokenizers.Metaspace()
    of.decoder = decoders.Metaspace()
    of.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of, **names)


def test_control_strings_that_cannot_be_read_as_text() -> None:
    encoder = TextEncoder(unigram(), None, "text")
    found = encoder.encode(["strike <s>old</s> new text", "strike old ?", "new"])
    assert found.bad == {0: NOT_AS_TEXT}
    assert found.lengths[0] == 0
    assert (found.lengths[1:] > 0).all()  # what is unknown is no control string
    as_tokens = TextEncoder(unigram(), None, "tokens").encode(["strike <s>old</s> new text"])
    assert {1, 2} <= set(as_tokens.tokens.tolist())


def test_dropout_of_training_is_switched_off(tmp_path: Path, llama: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", llama, lambda tokenizer: None)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    backend = load_tokenizer(str(folder)).backend_tokenizer
    assert len({tuple(backend.encode(TEXT * 4).ids) for _ in range(8)}) == 1


ODD = {
    "a struct without fields": pa.array([{}], pa.struct([])),
    "decimal256": pa.array([1], pa.decimal256(50, 2)),
    "a list of decimal256": pa.array([[1]], pa.list_(pa.decimal256(50, 2))),
    "a date out of range": pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
    "a time out of range": pa.array([2**62], pa.int64()).cast(pa.timestamp("s")),
}


@pytest.mark.parametrize("key", ["labels", "columns"])
@pytest.mark.parametrize("kind", ODD)
def test_values_that_a_store_cannot_hold(tmp_path: Path, llama: Path, kind: str, key: str) -> None:
    """Refused with a sentence while the corpus is read, or kept and asked for; never a traceback."""
    table = pa.table({"text": [TEXT], "x": ODD[kind]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=rf"corpus\.{key}: 'x'"):
        plan(tmp_path / "a.arrow", llama, format="saved", **{key: ("x",)})


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], "2026-11-30", 1.5, None])
def test_columns_keep_what_can_be_kept(tmp_path: Path, llama: Path, value: Any) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": TEXT, "x": value, "n": 1}, {"text": TEXT, "x": value, "n": 2}])
    if value is None:
        with pytest.raises(InputError, match=r"corpus\.columns: no record has a value for x"):
            plan(corpus, llama, columns=("x", "n"))
        return
    store = store_of(tmp_path / "store", corpus, llama, columns=("x", "n"))
    assert store.documents["x"].to_pylist() == [value, value]
    assert len(store.sql("select x, n from documents").fetchall()) == 2


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_spans_that_are_held_as_json_in_texts(tmp_path: Path, llama: Path, ending: str) -> None:
    spans = [json.dumps([]), json.dumps([{"start": 0, "end": 5, "label": "VERB"}]), "[broken"]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": [TEXT] * 3, "e": spans}), path)
    else:
        write(path, [{"text": TEXT, "e": of} for of in spans])
    store = store_of(tmp_path / "store", path, llama, labels=("e",))
    assert store.info.values_of_rows == {"e": ["VERB"]}
    assert store.info.skipped["e: no list of spans"]["count"] == 1


def test_labels_that_only_look_like_lists(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": TEXT, "e": "[deleted]"}, {"text": TEXT, "e": "{x}"}])
    store = store_of(tmp_path / "store", corpus, llama, labels=("e",))
    assert sorted(store.documents["e"].to_pylist()) == ["[deleted]", "{x}"]


def test_truth_values_among_numbers(tmp_path: Path, llama: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": TEXT, "k": value} for value in (1, 1.5, True)])
    with pytest.raises(InputError, match=r"corpus\.labels: 'k' has truth values and numbers"):
        plan(corpus, llama, labels=("k",))


def test_a_config_that_transformers_trips_over(tmp_path: Path, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": "gptq"}))
    with pytest.raises(InputError, match=r"model\.id: .* cannot be loaded"):
        describe_model(str(tmp_path))


@pytest.mark.parametrize("keys", [{"split": "test"}, {"subset": "x"}])
def test_parts_of_a_dataset_where_there_is_none(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="subset and split are those of a dataset by name"):
        CorpusSettings.model_validate({"path": "x", **keys})


@pytest.mark.parametrize("name", ["context", "token", "position", "row"])
def test_names_of_columns_that_rows_have(tmp_path: Path, llama: Path, name: str) -> None:
    corpus = write(tmp_path / "a.jsonl", [{"text": TEXT, name: 1}])
    with pytest.raises(InputError, match=rf"corpus\.columns: {name} is a column of Granary's own rows; rename it"):
        plan(corpus, llama, columns=(name,))


def test_no_row_of_a_text_is_a_control_token(llama: Path) -> None:
    encoder = TextEncoder(load_tokenizer(str(llama)), 0, "text")
    assert not np.isin(encoder.encode(["<s>town</s>", "<pad>", "a <s>"]).tokens, [0, 1, 2]).any()
