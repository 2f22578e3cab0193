"""Records in JSON lines (.jsonl, also .gz and .zst), and texts of one document a file (.txt).

A line that is no JSON object, or has no content, is counted with its number, from 1, and is no reason to stop.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.corpora.files import CorpusFile, reading
from pipeline.corpora.records import CHUNK_BYTES, Chunk, Columns, Piece, parted_labels
from pipeline.errors import InputError

PIECE_BYTES = 64 * 2**20
"""A local file that is not compressed is cut into pieces of about this size, at the ends of lines."""
DECOMPRESSED_BYTES = 4
"""Bytes of text in a compressed one, about."""
BROKEN = "broken JSON"
KEYS_TOLD = 8
"""Keys of a chunk's records that a refusal names at least, if there are so many."""


@dataclass(frozen=True)
class JsonLines:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        if _compression(file) is not None:
            return [Piece(number, 0, file.num_bytes, 1, file.num_bytes * DECOMPRESSED_BYTES)]
        if not file.is_local:  # counting its lines would fetch it twice
            return [Piece(number, 0, file.num_bytes, 1, file.num_bytes)]
        pieces, start, first_line, lines = [], 0, 1, 0
        with file.open() as handle:
            while block := handle.read(PIECE_BYTES):
                rest = handle.readline()
                lines = block.count(b"\n") + (1 if rest else 0)
                stop = start + len(block) + len(rest)
                pieces.append(Piece(number, start, stop, first_line, stop - start))
                start, first_line = stop, first_line + lines
        return pieces

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        seen: set[str] = set()
        has_content = False
        with file.open() as handle, reading(file.url):
            for first, lines in _grouped(_lines(handle, file, piece), piece.first_record):
                chunk, keys = self._parse(first, lines, file)
                seen.update(keys)
                has_content |= len(chunk.numbers) > 0
                yield chunk
        if seen and not has_content:
            self.columns.check_present(sorted(seen), file.url)

    def _parse(self, first: int, lines: list[bytes], file: CorpusFile) -> tuple[Chunk, set[str]]:
        """A chunk, and keys that its records have."""
        numbers, records, broken = [], [], []
        keys: set[str] = set()
        for number, line in enumerate(lines, first):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                broken.append((number, BROKEN))
                continue
            if len(keys) < KEYS_TOLD:
                keys.update(record)
            if self.columns.content in record:
                numbers.append(number)
                records.append(record)
            else:
                broken.append((number, f"no key {self.columns.content!r}"))
        at = np.array(numbers, dtype=np.int64)
        found = {name: [record.get(name) for record in records] for name in self.columns.labels}
        labels, aligned = parted_labels(self.columns, found, at, file)
        return Chunk(at, [r[self.columns.content] for r in records], labels, broken, aligned), keys


@dataclass(frozen=True)
class TextFiles:
    """Columns: `text`, and to be labels `file` and `folder`, the names of the file and of the folder it is in."""

    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        self.columns.check_present(["text", "file", "folder"], "text files")
        return [Piece(number, 0, file.num_bytes, 0, file.num_bytes)]

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with file.open() as handle:
            text = handle.read()
        values = {"file": file.name, "folder": file.folder}
        labels = {name: pa.array([values[name]], pa.string()) for name in self.columns.labels}
        yield Chunk(np.zeros(1, dtype=np.int64), [text], labels)


def _compression(file: CorpusFile) -> str | None:
    return {"gz": "gzip", "zst": "zstd"}.get(file.name.rpartition(".")[2])


def _lines(handle: IO[bytes], file: CorpusFile, piece: Piece) -> Iterator[bytes]:
    compression = _compression(file)
    try:
        if compression == "gzip":
            with gzip.open(handle) as text:  # checks the sum at the end, and takes files of several members
                yield from text
        elif compression == "zstd":
            yield from _split(pa.CompressedInputStream(pa.PythonFile(handle, "r"), "zstd"))
        else:
            handle.seek(piece.start)
            read = 0
            while read < piece.stop - piece.start and (line := handle.readline()):
                read += len(line)
                yield line
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"corpus.path: {file.url} is damaged, it cannot be read to its end: {error}") from None


def _split(stream: Any) -> Iterator[bytes]:
    """The lines of a stream that only knows blocks."""
    rest = b""
    while block := stream.read(2**20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _grouped(lines: Iterator[bytes], first: int) -> Iterator[tuple[int, list[bytes]]]:
    """Groups of lines of about CHUNK_BYTES, each with the number of its first line."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield first, group
            first, group, size = first + len(group), [], 0
    if group:
        yield first, group
