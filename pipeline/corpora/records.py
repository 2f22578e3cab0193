"""What every format gives: pieces that can be read apart from one another, and records in chunks of bounded size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpora.aligned import AlignedLabel, aligned_label, check_names
from pipeline.corpora.files import CorpusFile
from pipeline.errors import InputError

CHUNK_BYTES = 8 * 2**20
"""About as much content is in memory at once while a piece is read."""
FILE_SHIFT = 40
"""A record's number in the corpus is its file's number times 2^40, plus its number in the file: known without counting
the records of other files."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the corpus are read."""

    content: str
    """The column of texts, token ids or messages."""
    kind: str
    """text, tokens or messages: what `content` holds, and the key of the spec that says so."""
    labels: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter((self.content, *(label for label in self.labels if label != self.content)))

    def check_present(self, found: Sequence[str], where: str) -> None:
        """Raise InputError for a column that is not among those of a file."""
        for key, column in [(self.kind, self.content), *(("labels", label) for label in self.labels)]:
            if column not in found:
                raise InputError(f"corpus.{key}: no column {column!r} in {where}; it has {', '.join(found)}")


@dataclass(frozen=True)
class Piece:
    """A part of one file that can be read apart from the others."""

    file: int
    """The number of the file."""
    start: int
    """What start and stop count is the format's own: row groups, bytes."""
    stop: int
    first_record: int
    num_bytes: int
    """About as much content, uncompressed."""


@dataclass(frozen=True)
class Chunk:
    """Some records of a file."""

    numbers: npt.NDArray[np.int64]
    """The records' numbers in the file."""
    contents: list[Any]
    labels: dict[str, pa.Array]
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Records that could not be read: number and reason."""
    aligned: dict[str, AlignedLabel] = field(default_factory=dict)
    """Labels of spans or tokens."""


class Format(Protocol):
    """How the records of one kind of file are found and read."""

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        """Cut a file into pieces. Raises InputError for a file of another kind or without the columns."""
        ...

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        """Read a piece in bounded memory. Raises InputError for what is damaged or misses a label."""
        ...


def parted_labels(
    columns: Columns, found: Mapping[str, pa.Array | list[Any]], numbers: npt.NDArray[np.int64], file: CorpusFile
) -> tuple[dict[str, pa.Array], dict[str, AlignedLabel]]:
    """Part the label columns of the records `numbers`, Arrow's or lists as JSON has them, into labels of documents and
    labels of spans or tokens. Raises InputError for what is neither."""
    labels: dict[str, pa.Array] = {}
    aligned: dict[str, AlignedLabel] = {}
    for name, column in found.items() if len(numbers) else ():
        if (label := aligned_label(column, columns.kind)) is not None:
            check_names(name, columns.labels, columns.kind, file.url)
            aligned[name] = label
        else:
            labels[name] = label_array(name, column, numbers, file) if isinstance(column, list) else column
    check_labels(labels, numbers, file)
    return labels, aligned


def label_array(name: str, values: list[Any], numbers: npt.NDArray[np.int64], file: CorpusFile) -> pa.Array:
    """The values of a label in the records `numbers`, as JSON has them. Raises InputError for what is no label."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as error:
        for number, value in zip(numbers.tolist(), values, strict=True):
            if problem := _no_label(value):
                raise InputError(f"corpus.labels: {name!r} is {problem} in {file.url}:{number}; {TAKEN}") from None
        raise InputError(f"corpus.labels: {name!r} has values of different types in {file.url}: {error}") from None


TAKEN = (
    "labels are texts, numbers or truth values (or spans, {start, stop, value}): turn such values into those, or leave "
    "the label out"
)


def _no_label(value: Any) -> str | None:
    """Why a JSON value cannot be a label."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'dictionary'}"
    try:
        pa.array([value])
    except UnicodeEncodeError:
        return "a text with half of a surrogate pair (no Unicode)"
    except OverflowError:
        return "a whole number of more than 64 bits"
    return None


def check_labels(labels: dict[str, pa.Array], numbers: npt.NDArray[np.int64], file: CorpusFile) -> None:
    """Raise InputError for labels that are no scalars, and for one without a value: a row whose subpopulation is
    unknown would spoil every mean."""
    for name, values in labels.items():
        missing = values.is_null(nan_is_null=True)
        if (first := missing.index(True).as_py()) >= 0:
            raise InputError(
                f"corpus.labels: {name!r} has no value in {file.url}:{numbers[first]}; fill or drop such records"
            )
        if len(values) and pa.types.is_nested(values.type):
            where = f"{file.url}:{numbers[0]}"
            raise InputError(f"corpus.labels: {name!r} is no single value but {values.type} in {where}; {TAKEN}")


def content_list(column: pa.Array, kind: str) -> list[Any]:
    """An Arrow column as a list: of texts as bytes, which may be no UTF-8, of arrays of token ids, or of messages."""
    if kind == "text":
        return list(column.cast(pa.large_binary()).to_pylist())
    if kind == "tokens":
        values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
        valid = column.is_valid().to_pylist()
        return [values[a:b] if ok else None for (a, b), ok in zip(pairwise(offsets), valid, strict=True)]
    return list(column.to_pylist())


TEXT_TYPES = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(), pa.binary_view())


def check_kind(kind: str, found: pa.DataType, column: str, where: str) -> None:
    """Raise InputError unless an Arrow column of this type can hold the content."""
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    fits = {
        "text": found in TEXT_TYPES,
        "tokens": is_list and pa.types.is_integer(found.value_type),
        "messages": is_list and pa.types.is_struct(found.value_type),
    }
    what = {"text": "text", "tokens": "lists of token ids", "messages": "lists of messages ({role, content})"}
    if not fits[kind]:
        raise InputError(f"corpus.{kind}: column {column!r} of {where} holds {found}, not {what[kind]}")
