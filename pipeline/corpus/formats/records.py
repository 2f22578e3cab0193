"""What every format gives: pieces that can be read apart from one another, and records in chunks of bounded size."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.chats.messages import WithTools
from pipeline.corpus.formats.aligned import AlignedLabel, aligned_label, check_name
from pipeline.corpus.formats.paths import partitions
from pipeline.corpus.sources.files import CorpusFile
from pipeline.errors import InputError

CHUNK_BYTES = 8 * 2**20
"""About as much content is in memory at once while a piece is read."""
FILE_SHIFT = 40
"""A record's number in the corpus is its file's number times 2^40, plus its number in the file: known without counting
the records of other files."""
SHOWN = 60
"""Letters of a value that a refusal shows."""
KEPT = "columns keep what has a type in Parquet: write its values as texts, or leave the column out"
TAKEN = (
    "labels are texts, numbers or truth values (or spans, {start, stop, value}): turn such values into those, or leave "
    "the label out"
)


@dataclass(frozen=True)
class Columns:
    """Which columns of the corpus are read. Each is a column's name, or a path into it: `meta.source`."""

    content: str
    """The column of texts, token ids or messages."""
    kind: str
    """text, tokens or messages: what `content` holds, and the key of the spec that says so."""
    labels: tuple[str, ...]
    kept: tuple[str, ...] = ()
    """Columns that are kept beside documents, whatever they hold."""
    tools: str | None = None
    """With messages: the column of the tools that a chat may call."""

    @property
    def beside(self) -> tuple[str, ...]:
        """What is kept beside each document."""
        return (*self.labels, *self.kept)

    def key(self, name: str) -> str:
        """The key of the spec that names what is kept beside documents."""
        return "corpus.labels" if name in self.labels else "corpus.columns"

    def wanted(self) -> list[tuple[str, str]]:
        """Every column to read, each with the key of the spec that names it."""
        return [
            (self.kind, self.content),
            *(("labels", label) for label in self.labels),
            *(("columns", name) for name in self.kept),
            *([] if self.tools is None else [("tools", self.tools)]),
        ]

    @property
    def required(self) -> "Columns":
        """Those that every file must have, where a record may lack a key that others have: a table of JSON has no
        columns, and what is there of it depends on how it is cut."""
        return replace(self, kept=(), tools=None)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to read, each once."""
        return tuple(dict.fromkeys(name for _, name in self.wanted()))

    def check_present(self, found: Collection[str], where: str) -> None:
        """Raise InputError for a column that is not among those of a file."""
        for key, column in self.wanted():
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
class Unreadable:
    """Stands for the content of a record that cannot be read."""

    reason: str


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

    @property
    def untold(self) -> list[str]:
        """Labels of which none of these records has a value: those are errors unless other records have spans."""
        return [name for name, label in self.aligned.items() if not label.is_told]


class Format(Protocol):
    """How the records of one kind of file are found and read."""

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        """Cut a file into pieces. Raises InputError for a file of another kind or without the columns."""
        ...

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        """Read a piece in bounded memory. Raises InputError for what is damaged or misses a label."""
        ...


def chunk_of(
    numbers: npt.NDArray[np.int64],
    contents: Sequence[Any],
    beside: Mapping[str, pa.Array | list[Any]],
    columns: Columns,
    file: CorpusFile,
    tools: Sequence[Any] | None = None,
) -> Chunk:
    """Make a chunk of records, some of which may be Unreadable: these are set aside, whatever their labels are.

    `beside`: labels, and what is kept without being one, as Arrow arrays or lists of values as JSON has them.
    Raises InputError for labels that are none. `tools`: those of each record's chat.
    """
    if tools is not None:
        contents = [c if isinstance(c, Unreadable) else WithTools(c, t) for c, t in zip(contents, tools, strict=True)]
    broken = [(int(n), c.reason) for n, c in zip(numbers, contents, strict=True) if isinstance(c, Unreadable)]
    if broken:
        sound = np.flatnonzero([not isinstance(content, Unreadable) for content in contents])
        beside = {name: _taken(values, sound) for name, values in beside.items()}
        numbers, contents = numbers[sound], [contents[i] for i in sound.tolist()]
    labels: dict[str, pa.Array] = {}
    aligned: dict[str, AlignedLabel] = {}
    for name, values in beside.items() if len(numbers) else ():
        label = aligned_label(values, columns.kind, contents) if name in columns.labels else None
        if label is not None and (label.is_told or name not in partitions(file.url)):  # folders hold no spans
            check_name(name, columns.kind, file.url)
            aligned[name] = label
        elif isinstance(values, list):
            labels[name] = label_array(name, values, numbers, file, columns.key(name))
        else:
            labels[name] = values
    check_labels({name: values for name, values in labels.items() if name in columns.labels}, numbers, file)
    check_kept({name: values for name, values in labels.items() if name in columns.kept}, numbers, file)
    return Chunk(numbers, list(contents), labels, broken, aligned)


def _taken(values: pa.Array | list[Any], kept: npt.NDArray[np.int64]) -> pa.Array | list[Any]:
    return [values[i] for i in kept.tolist()] if isinstance(values, list) else values.take(pa.array(kept))


def label_array(
    name: str, values: list[Any], numbers: npt.NDArray[np.int64], file: CorpusFile, key: str = "corpus.labels"
) -> pa.Array:
    """The values of a label, or of a column that is kept, in the records `numbers`, as JSON has them. Raises InputError
    for what cannot be one."""
    kinds = {type(value) for value in values if value is not None}
    if bool in kinds and kinds & {int, float}:  # Arrow would take true for 1
        raise InputError(f"{key}: {name!r} has truth values and numbers in {file.url}: give it one type")
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as error:
        is_label = key == "corpus.labels"
        for number, value in zip(numbers.tolist(), values, strict=True):
            if problem := _no_value(value, is_label):
                advice = TAKEN if is_label else KEPT
                raise InputError(f"{key}: {name!r} is {problem} in {file.url}:{number}; {advice}") from None
        raise InputError(
            f"{key}: {name!r} has values of different types in {file.url}: {_mixed(values, numbers) or error}; write "
            f"all of them as texts, or leave the {'label' if is_label else 'column'} out"
        ) from None


def _mixed(values: Sequence[Any], numbers: npt.NDArray[np.int64]) -> str | None:
    """Two values that are of no common type, and their records."""
    given = [(n, value) for n, value in zip(numbers.tolist(), values, strict=True) if value is not None]
    for number, value in given:
        try:
            pa.array([given[0][1], value])
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            first, other = (json.dumps(one, default=str)[:SHOWN] for one in (given[0][1], value))
            return f"{first} in record {given[0][0]} and {other} in record {number}"
    return None


def _no_value(value: Any, is_label: bool) -> str | None:
    """Why a JSON value cannot be a label, or kept."""
    if is_label and isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'dictionary'}"
    try:
        pa.array([value])
    except UnicodeEncodeError:
        return "a text with half of a surrogate pair (no Unicode)"
    except OverflowError:
        return "a whole number of more than 64 bits"
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return "a value whose parts are of different types"
    return None


def check_labels(labels: dict[str, pa.Array], numbers: npt.NDArray[np.int64], file: CorpusFile) -> None:
    """Raise InputError for labels that are no scalars, and for one without a value: a row whose subpopulation is
    unknown would spoil every mean."""
    for name, values in labels.items():
        missing = values.is_null(nan_is_null=True)
        if (first := missing.index(True).as_py()) >= 0:
            raise no_value(name, f"{file.url}:{numbers[first]}")
        if not len(values):
            continue
        where = f"{file.url}:{numbers[0]}"
        if not _is_told(values):
            raise InputError(
                f"corpus.labels: {name!r} has values of the type {values.type} in {where}, which SQL or Python cannot "
                "read: write them as texts, or leave the label out"
            )
        if pa.types.is_nested(values.type):
            fields = [values.type.field(i).name for i in range(values.type.num_fields)]
            advice = f"name one of its fields, as {name}.{fields[0]}" if fields and fields[0] else TAKEN
            advice = advice if pa.types.is_struct(values.type) else TAKEN
            raise InputError(f"corpus.labels: {name!r} is no single value but {values.type} in {where}; {advice}")


def no_value(label: str, where: str) -> InputError:
    return InputError(f"corpus.labels: {label!r} has no value in {where}; fill or drop such records")


def check_kept(columns: dict[str, pa.Array], numbers: npt.NDArray[np.int64], file: CorpusFile) -> None:
    """Raise InputError for columns whose values the documents of a store cannot hold, or could not be asked for."""
    for name, values in columns.items():
        if len(values) and not (_is_told(values) and _is_stored(values)):
            raise InputError(
                f"corpus.columns: {name!r} has values of the type {values.type} in {file.url}:{numbers[0]}, which "
                "Parquet or SQL cannot hold: write them as texts, or leave the column out"
            )


def _is_stored(values: pa.Array) -> bool:
    """Return whether Parquet takes the values. One is tried, or all where it depends on them: times have ranges."""
    if "decimal256" in str(values.type) or "union" in str(values.type):
        return False
    tried = values if pa.types.is_temporal(values.type) else values.slice(0, 1)
    try:
        pq.write_table(pa.table({"x": tried}), pa.BufferOutputStream())
    except (pa.ArrowException, OverflowError):
        return False
    return True


def _is_told(values: pa.Array) -> bool:
    """Return whether the values of a label have names: times may be in a zone that is unknown, or finer than
    Python's."""
    if not pa.types.is_temporal(values.type):
        return not pa.types.is_decimal256(values.type)
    try:
        values.to_pylist()
    except (pa.ArrowException, ValueError, LookupError, OverflowError):
        return False
    return not pa.types.is_interval(values.type)
