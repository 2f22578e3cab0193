"""Columns that are labels of spans or tokens: lists that are aligned with the content, told by their type.

A list of spans is {start, stop or end, value or label} each, [start, stop, value] each, or, as Hugging Face stores a
sequence of spans, one {start: [...], end: [...], label: [...]}. A list of plain values has one for each token id. What
is in a list is looked at later, record by record (`pipeline.corpus.spans`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.corpus.formats.arrow_types import is_list, is_text
from pipeline.errors import InputError

START_KEYS = ("start", "begin", "start_offset")
STOP_KEYS = ("stop", "end", "end_offset")
VALUE_KEYS = ("label", "entity_group", "entity_type", "entity", "tag", "type", "value")
"""The first that is there counts: where there is a label besides, `value` is often the text of the span."""
TEXT_KEY = "text"
"""Where a span may have its own text, which shows whether it counts as we do."""
OWN_COLUMNS = ("row", "token", "position", "context", "role")
"""Names that labels cannot have: they are columns of the rows already."""


@dataclass(frozen=True)
class AlignedLabel:
    """A label of spans or tokens, of some records."""

    values: list[Any]
    """The value of each record, as JSON has it."""
    are_tags: bool
    """A plain value for each token, else spans."""
    is_told: bool = True
    """False where there is no value at all: other records say whether the label is of spans, or one of documents, which
    has to have values."""

    def take(self, kept: Sequence[int]) -> "AlignedLabel":
        return replace(self, values=[self.values[i] for i in kept])


def aligned_label(column: pa.Array | list[Any], kind: str, contents: Sequence[Any] = ()) -> AlignedLabel | None:
    """A column as a label of spans or tokens; None if it is something else. `kind`: what the content is; `contents`:
    that of each record."""
    if kind != "messages" and _has_nothing(column):
        return AlignedLabel([None] * len(column), are_tags=False, is_told=False)
    if isinstance(column, list):
        values = _from_json(column, kind)
        are_tags = _form_of_values(values, kind)
        held_in: list[Any] | None = column
    elif (texts := _texts(column)) is not None:
        values = _from_json(texts, kind)
        are_tags = _form_of_values(values, kind)
        held_in = texts
    else:
        are_tags = _form_of_type(column.type, kind)
        values = column.to_pylist() if are_tags is not None else []
        held_in = None
    if are_tags is None or (are_tags and kind != "tokens"):
        return None
    if are_tags and held_in is not None and not _fit(held_in, values, contents):
        return None
    return AlignedLabel(values, are_tags)


def _has_nothing(column: pa.Array | list[Any]) -> bool:
    """Whether a column has no value, and a type in which spans may be held."""
    if isinstance(column, list):
        return all(value is None for value in column)
    return column.null_count == len(column) and (pa.types.is_null(column.type) or is_text(column.type))


def _texts(column: pa.Array) -> list[Any] | None:
    """A column of texts, of which some begin as lists do in JSON; None for any other."""
    if not is_text(column.type):
        return None
    values = column.to_pylist()
    return values if any(isinstance(value, str) and value.lstrip()[:1] in ("[", "{") for value in values) else None


def _from_json(values: list[Any], kind: str) -> list[Any]:
    """Spans, or values of token ids, that are held as JSON in texts, where the first of them that is not empty shows
    that they are."""
    texts = [value for value in values if isinstance(value, str) and value.lstrip()[:1] in ("[", "{")]
    first: Any = next((parsed for text in texts if (parsed := _parsed(text)) not in ([], {})), [])
    is_spans = _is_columnar(first) or (
        isinstance(first, list) and (kind == "tokens" or all(isinstance(span, dict | list) for span in first))
    )
    if not texts or not is_spans or not all(value is None or isinstance(value, str) for value in values):
        return values
    return [None if value is None else _parsed(value) for value in values]


def _fit(texts: Sequence[Any], values: Sequence[Any], contents: Sequence[Any]) -> bool:
    """Whether texts that hold lists are values of token ids: all are lists in JSON, and one has its record's length. A
    label of documents may look like a list, too (`[12]`)."""
    told = [(value, ids) for text, value, ids in zip(texts, values, contents, strict=True) if isinstance(text, str)]
    if not all(isinstance(value, list) for value, _ in told):
        return False
    return not told or any(hasattr(ids, "__len__") and len(value) == len(ids) for value, ids in told if value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_name(name: str, kind: str, where: str) -> None:
    """Raise InputError for a label of spans that the content has no place for."""
    if kind == "messages":
        raise InputError(
            f"corpus.labels: {name!r} is a list of spans in {where}; spans are places in a text or in a list of token "
            "ids, and corpus.messages has chats: leave the label out, or give the chats as texts"
        )


def _form_of_values(values: Sequence[Any], kind: str) -> bool | None:
    """Return whether JSON values are tags (True) or spans (False); None if they are neither."""
    lists = [value for value in values if isinstance(value, list)]
    firsts = [next((one for one in value if one is not None), None) for value in lists]
    if any(isinstance(first, dict | list) for first in firsts) or any(map(_is_columnar, values)):
        return False
    if any(first is not None for first in firsts):
        return True
    return kind == "tokens" and any(lists) if lists else None  # of tokens a list of null says something, of spans not


def _is_columnar(value: Any) -> bool:
    """Whether spans are one {start: [...], end: [...]}, or would be if they were not null."""
    return isinstance(value, dict) and any(
        key in value and (value[key] is None or isinstance(value[key], list)) for key in START_KEYS
    )


def _form_of_type(found: pa.DataType, kind: str) -> bool | None:
    if pa.types.is_struct(found):
        return False if any(f.name in START_KEYS and is_list(f.type) for f in found) else None
    if not is_list(found):
        return None
    inner = found.value_type
    if pa.types.is_null(inner):  # of each token, nothing; there are no spans that are null
        return kind == "tokens"
    return not (pa.types.is_struct(inner) or is_list(inner))
