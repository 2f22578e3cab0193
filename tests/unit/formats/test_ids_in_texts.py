"""Token ids that are JSON in a text, and lists of ids that are none: masks, padding, texts."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import contexts_of, plan, store_of, write

from pipeline.errors import InputError

IDS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def json_type(texts: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def table(path: Path, column: Any, **more: Any) -> Path:
    pq.write_table(pa.table({"ids": column, **more}), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "made",
    [
        lambda texts: pa.array(texts),
        lambda texts: pa.array(texts, pa.large_string()),
        lambda texts: pa.array([text.encode() for text in texts]),
        lambda texts: pa.array(texts).dictionary_encode(),
        json_type,
    ],
)
def test_ids_in_json_are_those_in_lists(tmp_path: Path, llama: Path, made: Any) -> None:
    wanted = contexts_of(store_of(tmp_path / "lists", table(tmp_path / "lists.parquet", IDS), llama, tokens="ids"))
    texts = table(tmp_path / "texts.parquet", made([json.dumps(ids) for ids in IDS]))
    assert contexts_of(store_of(tmp_path / "texts", texts, llama, tokens="ids")) == wanted


def test_ids_in_json_in_lines_in_structs_and_beside_labels(tmp_path: Path, llama: Path) -> None:
    """With a separator, values for each id, and a null among them."""
    lines = [{"doc": {"ids": json.dumps(ids)}, "tag": json.dumps(["A"] * len(ids)), "k": "x"} for ids in IDS]
    lines += [{"doc": {"ids": "[5, null]"}, "tag": "[]", "k": "x"}, {"doc": {"ids": "none"}, "tag": None, "k": "x"}]
    corpus = write(tmp_path / "c.jsonl", lines)
    store = store_of(tmp_path / "store", corpus, llama, tokens="doc.ids", labels=("tag", "k"), separator=11)
    rows = store.sql("select token, tag from rows").fetchall()
    assert sorted(rows) == [(token, "A") for token in (5, 6, 7, 8, 9, 10, 12, 13)]
    assert {reason: entry["first"] for reason, entry in store.info.skipped.items()} == {
        "a token id is missing": ["c.jsonl:4"],
        "not a list of token ids": ["c.jsonl:5#0"],
    }


@pytest.mark.parametrize("value", ["the grain", "5 6 7", '{"ids": [5]}', "5", '"[5]"', b"\xff\xfe"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_texts_that_hold_no_lists_are_refused_with_advice(tmp_path: Path, llama: Path, ending: str, value: Any) -> None:
    if ending == "parquet":
        path = table(tmp_path / "c.parquet", [value, None, value])
    elif isinstance(value, bytes):
        return
    else:
        path = write(tmp_path / "c.jsonl", [{"ids": value}, {"ids": None}])
    what = "bytes" if isinstance(value, bytes) else "text"
    with pytest.raises(InputError, match=rf"corpus\.tokens: column 'ids' holds {what}, not .*name it as corpus\.text"):
        plan(path, llama, tokens="ids")


@pytest.mark.parametrize(
    ("texts", "advice"),
    [
        (["[5, 6]"], r"holds JSON \(.*\), not text; name what of it is text, as ids\.text, or name it as corpus\.mess"),
        (['{"text": "a town"}'], r"holds JSON .*as ids\.text"),
    ],
)
def test_json_that_is_named_as_text(tmp_path: Path, llama: Path, texts: list[str], advice: str) -> None:
    path = table(tmp_path / "c.parquet", json_type(texts))
    with pytest.raises(InputError, match=rf"corpus\.text: column 'ids' of .* {advice}"):
        plan(path, llama, text="ids")
    if "text" in texts[0]:
        assert plan(path, llama, text="ids.text").sizes.documents == 1  # the advice holds


@pytest.mark.parametrize("wrong", [-1, -100, -(2**40)])
@pytest.mark.parametrize("separator", [None, 7])
def test_ids_below_zero_are_told_to_be_padding_or_masks(
    tmp_path: Path, llama: Path, wrong: int, separator: int | None
) -> None:
    path = write(tmp_path / "c.jsonl", [{"labels": [5, 6]}, {"labels": [wrong, wrong, 5]}])
    with pytest.raises(InputError) as caught:
        plan(path, llama, tokens="labels", separator=separator)
    for words in (
        f"record c.jsonl:2 of {path}: token id {wrong} is outside the model's",
        "padding",
        "input_ids, not labels",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("labels", [["[12]", "[13]", "[12]"], ["[12]", "[8, 9]", "web"], ["[1,2,3]", "[broken", "[1]"]])
def test_labels_of_documents_that_look_like_lists_stay_plain(
    tmp_path: Path, llama: Path, labels: list[str], ending: str
) -> None:
    """They would have to be lists in all records, and as long as the ids in one."""
    if ending == "parquet":
        path = tmp_path / "c.parquet"
        pq.write_table(pa.table({"ids": IDS, "k": labels}), path)
    else:
        path = write(tmp_path / "c.jsonl", [{"ids": ids, "k": k} for ids, k in zip(IDS, labels, strict=True)])
    store = store_of(tmp_path / "store", path, llama, tokens="ids", labels=("k",))
    assert sorted(store.documents["k"].to_pylist()) == sorted(labels)
    assert store.info.skipped == {}


def test_values_of_ids_in_texts_of_which_some_do_not_fit_are_counted(tmp_path: Path, llama: Path) -> None:
    values = ['["A", "B", "C"]', '["A"]', "[]"]
    path = write(tmp_path / "c.jsonl", [{"ids": ids, "k": k} for ids, k in zip(IDS, values, strict=True)])
    store = store_of(tmp_path / "store", path, llama, tokens="ids", labels=("k",))
    assert store.info.values_of_rows == {"k": ["A", "B", "C"]}
    assert [entry["first"] for entry in store.info.skipped.values()] == [["c.jsonl:2"]]
