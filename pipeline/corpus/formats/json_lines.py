"""Records in JSON (a line each, or one list) and texts of one document a file, also compressed (.gz, .zst).

A line that is no JSON object, or has no content, is counted with its number, from 1, and is no reason to stop. Records
of a list, or over several lines, are counted from 0.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.formats.json_files import (
    BLOCK_BYTES,
    HEAD_BYTES,
    MARKS,
    OTHER_MARKS,
    UTF8_MARK,
    count_lines,
    layout_of,
    lines_of,
    record_of,
    records_in_list,
    records_over_lines,
    refuse_object,
    with_head,
)
from pipeline.corpus.formats.objects import chunk_of_objects
from pipeline.corpus.formats.paths import MISSING, find, partitions
from pipeline.corpus.formats.records import CHUNK_BYTES, Chunk, Columns, Piece, Unreadable, chunk_of
from pipeline.corpus.sources.files import CorpusFile, reading
from pipeline.errors import InputError

PIECE_BYTES = 64 * 2**20
"""A local file that is not compressed is cut into pieces of about this size, at the ends of lines."""
DECOMPRESSED_BYTES = 4
"""Bytes of text in a compressed one, about."""
_NOTHING = MARKS + b" \t\r\n"
"""Bytes of lines in which there is nothing."""
Group = tuple[list[int], list[dict[str, Any] | Unreadable]]
"""Numbers of records, and the records."""


@dataclass(frozen=True)
class JsonLines:
    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        if _compression(file) is not None:
            return [Piece(number, 0, file.num_bytes, 1, file.num_bytes * DECOMPRESSED_BYTES)]
        if not file.is_local:  # counting its lines would fetch it twice
            return [Piece(number, 0, file.num_bytes, 1, file.num_bytes)]
        pieces, start, first_line = [], 0, 1
        with file.open() as handle:
            if layout_of(handle.read(HEAD_BYTES), file) != "lines":
                return [Piece(number, 0, file.num_bytes, 0, file.num_bytes)]
            handle.seek(0)
            while block := handle.read(PIECE_BYTES):
                stop = _end_of_line(handle, start + len(block))
                handle.seek(start + len(block))
                rest = handle.read(stop - start - len(block))
                pieces.append(Piece(number, start, stop, first_line, stop - start))
                first_line += count_lines(block) + count_lines(rest) - (block[-1:] + rest[:1] == b"\r\n")
                start = stop
        return pieces

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        found: dict[str, None] = {}
        number, only = 0, None
        with file.open() as handle, reading(file.url):
            for numbers, records in self._groups(handle, file, piece):
                number += len(records)
                only = records[0]
                yield chunk_of_objects(records, np.array(numbers, dtype=np.int64), self.columns, file, found)
        if found:
            if number == 1 and isinstance(only, dict):
                content = find(only, self.columns.content)
                if content is MISSING or (self.columns.kind == "text" and not isinstance(content, str)):
                    refuse_object(only, content is not MISSING, file)
            self.columns.required.check_present(sorted(found), file.url)

    def _groups(self, handle: IO[bytes], file: CorpusFile, piece: Piece) -> Iterator[Group]:
        """The records of a piece, in groups of about CHUNK_BYTES."""
        if piece.start == 0:
            head = b""
            if _compression(file) is None and file.is_local:  # as `pieces` has seen it
                head = handle.read(HEAD_BYTES)
                handle.seek(0)
                blocks = _blocks(handle, file, piece.stop)
            else:
                head, blocks = with_head(_blocks(handle, file))
            if (layout := layout_of(head, file)) != "lines":
                records = records_in_list(blocks, file) if layout == "list" else records_over_lines(blocks, file)
                yield from _grouped((number, *found) for number, found in enumerate(records))
                return
        else:
            handle.seek(piece.start)
            blocks = _blocks(handle, file, piece.stop - piece.start)
        numbered = enumerate(lines_of(blocks), piece.first_record)
        yield from _grouped((n, record_of(line), len(line)) for n, line in numbered if line.strip(_NOTHING))


@dataclass(frozen=True)
class TextFiles:
    """Columns: `text`, and to be labels `file` and `folder`, the names of the file and of the folder it is in."""

    columns: Columns

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        self.columns.check_present(["text", "file", "folder", *partitions(file.url)], "text files")
        times = 1 if _compression(file) is None else DECOMPRESSED_BYTES
        return [Piece(number, 0, file.num_bytes, 0, file.num_bytes * times)]

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        with file.open() as handle:
            text = b"".join(_blocks(handle, file))
        content: bytes | Unreadable = text.removeprefix(UTF8_MARK)
        if text.startswith(OTHER_MARKS):
            content = Unreadable("in UTF-16 or UTF-32, not UTF-8")
        values = {**partitions(file.url), "file": file.name, "folder": file.folder}
        labels = {name: pa.array([values[name]], pa.string()) for name in self.columns.beside}
        yield chunk_of(np.zeros(1, dtype=np.int64), [content], labels, self.columns, file)


def _compression(file: CorpusFile) -> str | None:
    return {"gz": "gzip", "zst": "zstd"}.get(file.name.lower().rpartition(".")[2])


def _blocks(handle: IO[bytes], file: CorpusFile, num_bytes: int | None = None) -> Iterator[bytes]:
    """The content of a file, decompressed; `num_bytes` from where the handle is, or all. Raises InputError."""
    compression = _compression(file)
    try:
        stream: Any = handle
        if compression == "gzip":
            stream = gzip.GzipFile(fileobj=handle)  # checks the sum at the end, and takes files of several members
        elif compression == "zstd":
            stream = pa.CompressedInputStream(pa.PythonFile(handle, "r"), "zstd")
        while block := stream.read(BLOCK_BYTES if num_bytes is None else min(BLOCK_BYTES, num_bytes)):
            yield block
            num_bytes = None if num_bytes is None else num_bytes - len(block)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise InputError(f"corpus.path: {file.url} is damaged, it cannot be read to its end: {error}") from None


def _end_of_line(handle: IO[bytes], at: int) -> int:
    """The place behind the first end of a line that is found from `at` on."""
    handle.seek(at)
    while part := handle.read(HEAD_BYTES):
        if found := re.search(rb"\r\n?|\n", part):
            is_cut = found[0] == b"\r" and found.end() == len(part)
            return at + found.end() + (is_cut and handle.read(1) == b"\n")
        at += len(part)
    return at


def _grouped(records: Iterator[tuple[int, dict[str, Any] | Unreadable, int]]) -> Iterator[Group]:
    """Groups of records of about CHUNK_BYTES together."""
    numbers: list[int] = []
    group: list[dict[str, Any] | Unreadable] = []
    total = 0
    for number, record, size in records:
        numbers.append(number)
        group.append(record)
        total += size
        if total >= CHUNK_BYTES:
            yield numbers, group
            numbers, group, total = [], [], 0
    if group:
        yield numbers, group
