"""Records in Arrow's kinds of files: Parquet, cut by row groups, and Arrow files, cut by files: those of Hugging Face
datasets that were saved to disk (`save_to_disk`), and others (Arrow's stream format and its file format)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.formats.arrow_types import check_kind, plain_type
from pipeline.corpus.formats.paths import MISSING, Route, find, find_route, partitions, schema_names
from pipeline.corpus.formats.records import CHUNK_BYTES, Chunk, Columns, Piece, Unreadable, chunk_of
from pipeline.corpus.formats.values import content_list, content_value, label_values, plain, python_values
from pipeline.corpus.sources.files import CorpusFile, reading
from pipeline.errors import InputError

MOST_RECORDS = 8192
"""Records of a chunk at most, however short they are."""
FILE_MAGIC = b"ARROW1"
"""How Arrow's file format begins; its stream format has no mark."""
Routes = dict[str, Route | str | None]
"""Where each column is: in the table, or the value that the file's folder gives it."""


@dataclass(frozen=True)
class Parquet:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        with _parquet(file) as parquet:
            content = find_routes(self.columns, parquet.schema_arrow, file)[self.columns.content]
            assert isinstance(content, Route)
            pieces, first = [], 0
            for group in range(parquet.num_row_groups):
                about = parquet.metadata.row_group(group)
                if about.num_rows:
                    num_bytes = _content_bytes(about, content.column, self.columns.kind)
                    pieces.append(Piece(number, group, group + 1, first, num_bytes))
                first += about.num_rows
            return pieces

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with _parquet(file) as parquet:
            routes = find_routes(self.columns, parquet.schema_arrow, file)
            about = parquet.metadata.row_group(piece.start)
            mean = max(1, piece.num_bytes // about.num_rows)
            batches = parquet.iter_batches(
                batch_size=min(MOST_RECORDS, max(1, CHUNK_BYTES // mean)),
                row_groups=list(range(piece.start, piece.stop)),
                columns=list(dict.fromkeys(route.column for route in routes.values() if isinstance(route, Route))),
            )
            yield from _chunks(batches, piece.first_record, self.columns, routes, file)


@dataclass(frozen=True)
class SavedDataset:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        with _arrow(file) as (schema, _):
            find_routes(self.columns, schema, file)
        return [Piece(number, 0, 1, 0, file.num_bytes)]

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with _arrow(file) as (schema, batches):
            routes = find_routes(self.columns, schema, file)
            tops = list(dict.fromkeys(route.names[0] for route in routes.values() if isinstance(route, Route)))
            yield from _chunks(_sliced(batch.select(tops) for batch in batches), 0, self.columns, routes, file)


def saved_files(folder: str) -> list[CorpusFile]:
    """The Arrow files of the dataset that was saved to a local folder, in its own order. Raises InputError."""
    if (Path(folder) / "dataset_dict.json").is_file():
        splits = json.loads((Path(folder) / "dataset_dict.json").read_text())["splits"]
        raise InputError(
            f"corpus.path: {folder} holds the splits {', '.join(splits)} of a dataset; give the folder of one: "
            f"{folder.rstrip('/')}/{splits[0]}"
        )
    with reading(folder):
        state = (Path(folder) / "state.json").read_text()
        try:
            names = [f["filename"] for f in json.loads(state)["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"corpus.path: {folder} has a state.json that is not one of a saved dataset") from None
        return [CorpusFile(str(Path(folder) / name), (Path(folder) / name).stat().st_size) for name in names]


def find_routes(columns: Columns, schema: pa.Schema, file: CorpusFile) -> Routes:
    """Where each column of a file is. Raises InputError for one that it does not have, or whose type does not fit."""
    for key, name in columns.wanted():
        if schema.names.count(name.partition(".")[0]) > 1 or schema.names.count(name) > 1:
            raise InputError(f"corpus.{key}: {file.url} has two columns of the name {name!r}: rename one of them")
    of_folders = partitions(file.url)
    routes: Routes = {name: find_route(list(schema), name) for name in columns.names}
    for name in columns.beside:
        if routes[name] is None and name != columns.content:
            routes[name] = of_folders.get(name)
    there = {name for name in columns.beside if name in of_folders} | {name for name in routes if routes[name]}
    columns.check_present([*dict.fromkeys([*schema_names(list(schema), columns.names), *sorted(there)])], file.url)
    content = routes[columns.content]
    assert isinstance(content, Route)
    if not content.inside:
        check_kind(columns.kind, _type_at(schema, content), columns.content, file.url)
    return routes


def _type_at(schema: pa.Schema, route: Route) -> pa.DataType:
    found = schema.field(route.names[0]).type
    for name in route.names[1:]:
        found = plain_type(found).field(name).type
    return found


def _array_at(batch: pa.RecordBatch, route: Route) -> pa.Array:
    array = batch.column(route.names[0])
    for name in route.names[1:]:
        array = plain(array)
        array = pc.struct_field(array, array.type.get_field_index(name))  # by its number: names may have dots
    return array


def _chunks(
    batches: Iterator[pa.RecordBatch], first: int, columns: Columns, routes: Routes, file: CorpusFile
) -> Iterator[Chunk]:
    for batch in batches:
        numbers = np.arange(first, first + batch.num_rows)
        labels = {name: _labels(batch, routes[name], name, columns, file) for name in columns.beside}
        tools = None if columns.tools is None else _values(batch, routes[columns.tools])
        yield chunk_of(numbers, _contents(batch, routes[columns.content], columns), labels, columns, file, tools)
        first += batch.num_rows


def _values(batch: pa.RecordBatch, route: Route | str | None) -> list[Any]:
    """Return what is at a place in each record, in Python's types; None where there is nothing."""
    assert isinstance(route, Route)
    values = python_values(_array_at(batch, route))
    found = [find(value, route.inside) for value in values] if route.inside else values
    return [None if value is MISSING else value for value in found]


def _contents(batch: pa.RecordBatch, route: Route | str | None, columns: Columns) -> list[Any]:
    assert isinstance(route, Route)
    array = _array_at(batch, route)
    if not route.inside:
        return content_list(array, columns.kind)
    absent = Unreadable(f"no key {columns.content!r}")
    found = [find(value, route.inside) for value in python_values(array)]
    return [absent if value is MISSING else content_value(value, columns.kind) for value in found]


def _labels(
    batch: pa.RecordBatch, route: Route | str | None, name: str, columns: Columns, file: CorpusFile
) -> pa.Array | list[Any]:
    if not isinstance(route, Route):
        return pa.array([route] * batch.num_rows, pa.string())
    array = _array_at(batch, route)
    if not route.inside:
        return label_values(array)
    found = [find(value, route.inside) for value in python_values(array)]
    if found and all(value is MISSING for value in found):
        column = ".".join(route.names)
        raise InputError(
            f"{columns.key(name)}: no column {name!r} in {file.url}; its column {column!r} holds values in "
            f"which there is no {route.inside!r}, as {str(array[0])[:80]!r}"
        )
    return [None if value is MISSING else value for value in found]


def _sliced(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches as they were written may be of any size."""
    for batch in batches:
        most = max(1, batch.num_rows * CHUNK_BYTES // max(1, batch.get_total_buffer_size()))
        yield from (batch.slice(start, most) for start in range(0, batch.num_rows, most))


def _content_bytes(group: Any, column: str, kind: str) -> int:
    """Bytes of the content in a row group, out of Parquet's encodings: of texts, or of 32-bit token ids."""
    leaves = [group.column(i) for i in range(group.num_columns)]
    leaves = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{column}.")]
    are_ids = [kind == "tokens" and leaf.physical_type.startswith("INT") for leaf in leaves]
    return sum(
        leaf.num_values * 4 if are_numbers else leaf.total_uncompressed_size
        for leaf, are_numbers in zip(leaves, are_ids, strict=True)
    )


@contextmanager
def _parquet(file: CorpusFile) -> Iterator[pq.ParquetFile]:
    with file.open() as handle:
        try:
            opened = pq.ParquetFile(file.url if file.is_local else handle)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"corpus.path: {file.url} cannot be read as Parquet: {error}") from None
        with opened, _damage(file):
            yield opened


@contextmanager
def _arrow(file: CorpusFile) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the batches of a file in either of Arrow's formats."""
    with file.open() as handle, _damage(file):
        source = pa.memory_map(file.url) if file.is_local else pa.PythonFile(handle, "r")
        begins = source.read(len(FILE_MAGIC))
        source.seek(0)
        if begins == FILE_MAGIC:
            reader = pa.ipc.open_file(source)
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            stream = pa.ipc.open_stream(source)
            yield stream.schema, iter(stream)


@contextmanager
def _damage(file: CorpusFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"corpus.path: {file.url} is damaged, it cannot be read to its end: {error}") from None
