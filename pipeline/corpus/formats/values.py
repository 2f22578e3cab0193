"""From Arrow columns, in any layout, to the contents and labels of records."""

from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.formats.arrow_types import BYTES_TYPES, is_json, is_list, plain_type
from pipeline.corpus.formats.paths import MISSING, fields_of, parsed
from pipeline.corpus.formats.records import Unreadable

NO_ID = "a token id is missing"
WORDS = ("content", "value")
"""Keys of a message that hold what is said, in the two spellings that there are."""
READABLE = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary(), pa.float16(): pa.float32()}
"""Types of labels of which Arrow or DuckDB can do little, and types of the same values."""
Convert = Callable[[Any], Any]
Int64 = npt.NDArray[np.int64]


def plain(array: pa.Array) -> pa.Array:
    """The same values without categories, runs and extension types at the top."""
    if isinstance(array.type, pa.BaseExtensionType):
        return plain(array.storage)
    if not (pa.types.is_dictionary(array.type) or pa.types.is_run_end_encoded(array.type)):
        return array
    try:
        return plain(array.dictionary_decode() if pa.types.is_dictionary(array.type) else _unrolled(array))
    except pa.ArrowNotImplementedError:  # Arrow cannot pick views
        return plain(pa.array(array.to_pylist(), array.type.value_type))


def _unrolled(array: pa.Array) -> pa.Array:
    rows = np.arange(array.offset, array.offset + len(array))
    return array.values.take(pa.array(np.searchsorted(array.run_ends.to_numpy(), rows, side="right")))


def content_list(column: pa.Array, kind: str) -> list[Any]:
    """An Arrow column as a list: of texts as bytes, which may be no UTF-8, of arrays of token ids, or of messages."""
    if kind == "text":
        return list(plain(column).cast(pa.large_binary()).to_pylist())
    if kind == "tokens" and is_list(plain_type(column.type)):
        return _token_lists(plain(column))
    return [content_value(value, kind) for value in python_values(column)]


def content_value(value: Any, kind: str) -> Any:
    """The content of a record out of a value as JSON has it; token ids may be JSON in a text. What does not fit is left
    to the encoder to judge."""
    if kind == "tokens":
        value = found if isinstance(found := _unless_plain_text(value), list) else value
        return Unreadable(NO_ID) if isinstance(value, list) and None in value else value
    return value


def _unless_plain_text(value: Any) -> Any:
    """The list or dictionary that a text is in JSON, or the text itself."""
    if not isinstance(value, str | bytes):
        return value
    found = parsed(value)
    return found if isinstance(found, list | dict) else value


def _token_lists(column: pa.Array) -> list[Any]:
    """An array of ids for each list; None for a list that is null, and Unreadable for one with a null in it."""
    starts, stops = _bounds(column)
    valid = np.asarray(column.is_valid())
    starts, stops = np.where(valid, starts, 0), np.where(valid, stops, 0)
    filled = stops > starts
    if not filled.any():
        return [np.empty(0, np.int32) if ok else None for ok in valid.tolist()]
    low, high = int(starts[filled].min()), int(stops[filled].max())
    ids = plain(column.values.slice(low, high - low))  # of a whole file, where the column is a slice of it
    starts, stops = np.where(filled, starts - low, 0), np.where(filled, stops - low, 0)
    lacking = np.zeros(len(column), dtype=bool)
    if ids.null_count:
        before = np.concatenate([[0], np.cumsum(np.asarray(ids.is_null()))])
        lacking = before[stops] > before[starts]
        ids = pa.nulls(len(ids), pa.int32()) if pa.types.is_null(ids.type) else ids
        ids = ids.fill_null(0)
    flat = ids.to_numpy(zero_copy_only=False)
    found: list[Any] = [flat[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    for i in np.flatnonzero(~valid).tolist():
        found[i] = None
    for i in np.flatnonzero(lacking).tolist():
        found[i] = Unreadable(NO_ID)
    return found


def _bounds(column: pa.Array) -> tuple[Int64, Int64]:
    """Where in `column.values` each list begins and ends."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        starts = (np.arange(len(column)) + column.offset) * size
        return starts, starts + size
    offsets = column.offsets.to_numpy().astype(np.int64)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return offsets[:-1], offsets[1:]
    return offsets, offsets + column.sizes.to_numpy()  # views


def label_values(column: pa.Array) -> pa.Array | list[Any]:
    """The values of a label: an array without categories, runs and views, or a list where JSON holds them."""
    if is_json(column.type):
        return python_values(column)
    if getattr(column.type, "extension_name", "") == "arrow.uuid":
        return [str(value) if isinstance(value, UUID) else None for value in column.to_pylist()]
    values = plain(column)
    if getattr(column.type, "extension_name", "") == "arrow.bool8":
        return values.cast(pa.bool_())
    if values.type in READABLE:
        return values.cast(READABLE[values.type])
    if (whole := _without_views(values.type)) != values.type:
        return pa.array(values.to_pylist(), whole)
    return values


def _without_views(found: pa.DataType) -> pa.DataType:
    """A type of the same values whose parts are no views and runs, which Arrow cannot pick values of."""
    if pa.types.is_run_end_encoded(found):
        return _without_views(found.value_type)
    if pa.types.is_list(found) or pa.types.is_list_view(found):
        inner = _without_views(found.value_type)
        return found if inner == found.value_type else pa.list_(inner)
    if pa.types.is_large_list(found) or pa.types.is_large_list_view(found):
        inner = _without_views(found.value_type)
        return found if inner == found.value_type else pa.large_list(inner)
    if pa.types.is_fixed_size_list(found):
        inner = _without_views(found.value_type)
        return found if inner == found.value_type else pa.list_(inner, found.list_size)
    if pa.types.is_struct(found):
        return pa.struct([field.with_type(_without_views(field.type)) for field in fields_of(found)])
    if pa.types.is_map(found):
        return pa.map_(_without_views(found.key_type), _without_views(found.item_type))
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(found, found)


def python_values(array: pa.Array) -> list[Any]:
    """An Arrow column as Python values: JSON is parsed, maps are dictionaries, bytes are text where they can be."""
    convert = _converter(array.type)
    values = array.to_pylist()
    return list(values) if convert is None else [convert(value) for value in values]


def _converter(found: pa.DataType, name: str = "") -> Convert | None:
    """What is to be done with Arrow's own Python values of a type, in a field called `name`; None if nothing is."""
    if is_json(found):
        return partial(_from_json, is_words=name in WORDS)
    found = plain_type(found)
    if is_list(found):
        inner = _converter(found.value_type)
        return None if inner is None else partial(_each, inner)
    if pa.types.is_struct(found):
        fields = [found.field(i) for i in range(found.num_fields)]
        by_name = {field.name: c for field in fields if (c := _converter(field.type, field.name)) is not None}
        return partial(_by_field, by_name) if by_name else None
    if pa.types.is_map(found):
        return partial(_from_pairs, _converter(found.key_type), _converter(found.item_type))
    return _decoded if found in BYTES_TYPES else None


def _each(convert: Convert, values: list[Any] | None) -> list[Any] | None:
    return None if values is None else [convert(value) for value in values]


def _by_field(converts: dict[str, Convert], record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {name: converts[name](value) if name in converts else value for name, value in record.items()}


def _from_pairs(key: Convert | None, item: Convert | None, pairs: list[tuple[Any, Any]] | None) -> Any:
    return None if pairs is None else {key(k) if key else k: item(v) if item else v for k, v in pairs}


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _from_json(text: str | bytes | None, is_words: bool) -> Any:
    """`datasets` leaves a text that reads as JSON unquoted: of what is said, `5` and `{"a": 1}` are those texts."""
    if text is None or (found := parsed(text)) is MISSING:
        return text
    if not is_words or found is None or isinstance(found, str):
        return found
    is_parts = isinstance(found, list) and all(isinstance(part, dict) and "type" in part for part in found)
    return found if is_parts else text
