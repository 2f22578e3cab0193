"""Records in Arrow's two kinds of files: Parquet, cut by row groups, and the Arrow files of Hugging Face datasets that
were saved to disk (`save_to_disk`), cut by files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpora.files import CorpusFile, reading
from pipeline.corpora.records import CHUNK_BYTES, Chunk, Columns, Piece, check_kind, content_list, parted_labels
from pipeline.errors import InputError

MOST_RECORDS = 8192
"""Records of a chunk at most, however short they are."""


@dataclass(frozen=True)
class Parquet:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        with _parquet(file) as parquet:
            _check_schema(self.columns, parquet.schema_arrow, file)
            pieces, first = [], 0
            for group in range(parquet.num_row_groups):
                about = parquet.metadata.row_group(group)
                if about.num_rows:
                    pieces.append(Piece(number, group, group + 1, first, _content_bytes(about, self.columns)))
                first += about.num_rows
            return pieces

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with _parquet(file) as parquet:
            about = parquet.metadata.row_group(piece.start)
            mean = max(1, piece.num_bytes // about.num_rows)
            batches = parquet.iter_batches(
                batch_size=min(MOST_RECORDS, max(1, CHUNK_BYTES // mean)),
                row_groups=list(range(piece.start, piece.stop)),
                columns=list(self.columns),
            )
            yield from _chunks(batches, piece.first_record, self.columns, file)


@dataclass(frozen=True)
class SavedDataset:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        with _arrow(file) as stream:
            _check_schema(self.columns, stream.schema, file)
        return [Piece(number, 0, 1, 0, file.num_bytes)]

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with _arrow(file) as stream:
            yield from _chunks(_sliced(stream), 0, self.columns, file)


def saved_files(folder: str) -> list[CorpusFile]:
    """The Arrow files of the dataset that was saved to a local folder, in its own order. Raises InputError."""
    if (Path(folder) / "dataset_dict.json").is_file():
        splits = json.loads((Path(folder) / "dataset_dict.json").read_text())["splits"]
        raise InputError(
            f"corpus.path: {folder} holds the splits {', '.join(splits)} of a dataset; give the folder of one: "
            f"{folder.rstrip('/')}/{splits[0]}"
        )
    with reading(folder):
        names = [f["filename"] for f in json.loads((Path(folder) / "state.json").read_text())["_data_files"]]
        return [CorpusFile(str(Path(folder) / name), (Path(folder) / name).stat().st_size) for name in names]


def _check_schema(columns: Columns, schema: pa.Schema, file: CorpusFile) -> None:
    columns.check_present(schema.names, file.url)
    check_kind(columns.kind, schema.field(columns.content).type, columns.content, file.url)


def _chunks(batches: Iterator[pa.RecordBatch], first: int, columns: Columns, file: CorpusFile) -> Iterator[Chunk]:
    for batch in batches:
        numbers = np.arange(first, first + batch.num_rows)
        found = {name: _decoded(batch.column(name)) for name in columns.labels}
        labels, aligned = parted_labels(columns, found, numbers, file)
        contents = content_list(batch.column(columns.content), columns.kind)
        yield Chunk(numbers, contents, labels, aligned=aligned)
        first += batch.num_rows


def _decoded(column: pa.Array) -> pa.Array:
    """Pandas' categories as their values: dictionaries differ from file to file."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _sliced(stream: Any) -> Iterator[pa.RecordBatch]:
    """Batches as they were written may be of any size."""
    for batch in stream:
        most = max(1, batch.num_rows * CHUNK_BYTES // max(1, batch.nbytes))
        yield from (batch.slice(start, most) for start in range(0, batch.num_rows, most))


def _content_bytes(group: Any, columns: Columns) -> int:
    """Bytes of the content in a row group, out of Parquet's encodings: of texts, or of 32-bit token ids."""
    leaves = [group.column(i) for i in range(group.num_columns)]
    leaves = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] == columns.content]
    return sum(leaf.num_values * 4 if columns.kind == "tokens" else leaf.total_uncompressed_size for leaf in leaves)


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
def _arrow(file: CorpusFile) -> Iterator[Any]:
    with file.open() as handle, _damage(file):
        yield pa.ipc.open_stream(pa.memory_map(file.url) if file.is_local else handle)


@contextmanager
def _damage(file: CorpusFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"corpus.path: {file.url} is damaged, it cannot be read to its end: {error}") from None
