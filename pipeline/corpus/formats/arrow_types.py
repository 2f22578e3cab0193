"""Arrow's types as this project sees them: which can hold texts, token ids and messages, and what they are called.

The same values come in many layouts: categories (dictionaries), runs, lists of fixed size, lists with large offsets,
views, extension types. None of them changes what a record says.
"""

from collections.abc import Callable

import pyarrow as pa

from pipeline.errors import InputError

TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())
BYTES_TYPES = (pa.binary(), pa.large_binary(), pa.binary_view())
WHAT = {"text": "text", "tokens": "lists of token ids", "messages": "lists of messages ({role, content})"}


def is_list(found: pa.DataType) -> bool:
    """Return whether values are lists, in any of Arrow's five layouts."""
    kinds: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(kind(found) for kind in kinds)


def is_text(found: pa.DataType) -> bool:
    return found in TEXT_TYPES or found in BYTES_TYPES


def is_json(found: pa.DataType) -> bool:
    """Return whether values are JSON by their type, as `datasets` writes messages that differ in their keys."""
    if pa.types.is_dictionary(found) or pa.types.is_run_end_encoded(found):
        return is_json(found.value_type)
    return getattr(found, "extension_name", "") == "arrow.json"


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type of the values themselves, out of categories, runs and extension types."""
    if pa.types.is_dictionary(found) or pa.types.is_run_end_encoded(found):
        return plain_type(found.value_type)
    return plain_type(found.storage_type) if isinstance(found, pa.BaseExtensionType) else found


def words(found: pa.DataType) -> str:
    """A type in plain words."""
    if is_json(found):
        return "JSON"
    found = plain_type(found)
    if is_list(found):
        return f"lists of {words(found.value_type)}"
    if pa.types.is_struct(found):
        return f"records with {', '.join(found.field(i).name for i in range(found.num_fields)) or 'no fields'}"
    kinds: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
        (lambda kind: kind in TEXT_TYPES, "text"),
        (lambda kind: kind in BYTES_TYPES, "bytes"),
        (pa.types.is_null, "no value at all"),
        (pa.types.is_boolean, "truth values"),
        (pa.types.is_integer, "whole numbers"),
        (pa.types.is_floating, "numbers with fractions"),
        (pa.types.is_decimal, "decimal numbers"),
        (pa.types.is_temporal, "dates or times"),
        (pa.types.is_map, "maps"),
    )
    return next((name for is_kind, name in kinds if is_kind(found)), "values of another type")


def _fits(kind: str, found: pa.DataType) -> bool:
    plain = plain_type(found)
    if pa.types.is_null(plain):
        return True
    if kind == "text":
        return is_text(plain) and not is_json(found)
    if kind == "tokens":  # texts may hold lists in JSON, which their first values show
        return is_text(plain) or (is_list(plain) and _is_id(plain_type(plain.value_type)))
    if is_list(plain):
        message = plain_type(plain.value_type)
        return pa.types.is_struct(message) or pa.types.is_map(message) or pa.types.is_null(message) or is_text(message)
    if pa.types.is_struct(plain):  # a list for each key, as `datasets.Sequence` holds a list of dictionaries
        return plain.num_fields > 0 and all(is_list(plain_type(plain.field(i).type)) for i in range(plain.num_fields))
    return is_text(plain)


def _is_id(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_null(found))


def _meant(plain: pa.DataType) -> str | None:
    """The kind of content that a column of another kind clearly holds."""
    if plain in TEXT_TYPES:
        return "text"
    inner = plain_type(plain.value_type) if is_list(plain) else plain
    if inner is plain:
        return None
    if pa.types.is_struct(inner):
        names = {inner.field(i).name for i in range(inner.num_fields)}
        return "messages" if names & {"role", "from"} else None
    return "tokens" if pa.types.is_integer(inner) else None


def check_kind(kind: str, found: pa.DataType, column: str, where: str) -> None:
    """Raise InputError unless an Arrow column of this type can hold the content."""
    if _fits(kind, found):
        return
    plain = plain_type(found)
    if is_json(found):
        advice = (
            f"; name what of it is text, as {column}.{kind}, or name it as corpus.messages (chats) or corpus.tokens "
            "(lists of token ids)"
        )
    elif other := _meant(plain):
        advice = f"; name it as corpus.{other}"
    elif pa.types.is_struct(plain) and plain.num_fields:
        advice = f"; name one of its fields, as {column}.{plain.field(0).name}"
    else:
        advice = ""
    raise InputError(
        f"corpus.{kind}: column {column!r} of {where} holds {words(found)} ({found}), not {WHAT[kind]}{advice}"
    )
