"""Which of its layouts a file of JSON has, and the records of each: one a line, all in one list, or over several lines.

All are read block by block. A line that is no record is counted and is no reason to stop; in the other layouts there is
no way to go on from what is broken, so that the file is refused with the place.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from pipeline.corpus.encode import UNDECODABLE
from pipeline.corpus.formats.records import Unreadable
from pipeline.corpus.sources.files import CorpusFile
from pipeline.errors import InputError

HEAD_BYTES = 2**16
"""The layout is told from so much of a file."""
BLOCK_BYTES = 2**20
UTF8_MARK = codecs.BOM_UTF8
MARKS = UTF8_MARK + b"\x1e"
"""What may stand before a record: byte-order marks, of each of several files that were put together, and the record
separator of JSON text sequences. No JSON begins with one of these bytes."""
OTHER_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
OTHER_KINDS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet", b"ARROW1": "arrow", b"BZh": "bz2"}
"""How files of other kinds begin, and their endings."""
UNFINISHED = 12
"""A value that is cut shows within so many characters of the end (`-Infinit`, `\\u00e`), or in a text without end."""
NOTHING = " \t\r\n\ufeff\x1e"
"""Characters that may stand between values: white space and MARKS."""
MOST_CHARACTERS = 2**28
"""Characters of a record over several lines at most: a larger object holds records, and would fill the memory."""
CUT = "it ends in the middle"
BROKEN = "broken JSON"
NO_OBJECT = "not a JSON object"
TOO_DEEP = "JSON that is nested too deeply"
TOO_LONG = "a number of too many digits"


def with_head(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The beginning of a file, and all of its blocks."""
    taken: list[bytes] = []
    while sum(map(len, taken)) < HEAD_BYTES and (block := next(blocks, b"")):
        taken.append(block)
    return b"".join(taken)[:HEAD_BYTES], chain(taken, blocks)


def layout_of(head: bytes, file: CorpusFile) -> str:
    """Which layout a file has that begins so: lines, list, or objects (over several lines). Raises InputError for a
    file of another kind or in UTF-16 or UTF-32."""
    if kind := next((kind for start, kind in OTHER_KINDS.items() if head.startswith(start)), None):
        raise InputError(f"corpus.path: {file.url} is no JSON: it begins as .{kind} files do; rename it")
    if head.startswith(OTHER_MARKS) or b"\0" in head[:4]:
        raise InputError(
            f"corpus.path: {file.url} is in UTF-16 or UTF-32 and JSON is read as UTF-8: write it anew, as with "
            "`iconv -f UTF-16 -t UTF-8`"
        )
    text = head.lstrip(MARKS).decode("utf-8", "replace").lstrip()
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    if text.startswith("["):
        return "lines" if len(lines) > 1 and _parses(lines[0]) else "list"
    if lines and _are_several(lines[0]) and not any(map(_is_record, lines[1:])):
        return "objects"  # else one line of many is odd, and is counted
    return "objects" if len(lines) > 1 and _goes_on(lines[0]) and not _parses(lines[1]) else "lines"


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line.lstrip(NOTHING)), dict)
    except (ValueError, RecursionError):
        return False


def _are_several(line: str) -> bool:
    """Whether a line has an object behind another, as streams of records are written to files by some services."""
    try:
        record, stop = json.JSONDecoder().raw_decode(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and line[stop:].lstrip().startswith("{")


def _goes_on(line: str) -> bool:
    """Return whether a line is the beginning of an object and no more."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.startswith("{") and error.pos >= len(line.rstrip()) - 1
    except (ValueError, RecursionError):
        pass
    return False


def refuse_object(record: dict[str, Any], has_content: bool, file: CorpusFile) -> None:
    """Raise InputError if the only record of a file holds the records: in a list, or column by column."""
    columns = [value for value in record.values() if isinstance(value, list | dict)]
    if has_content and len(columns) == len(record) and len({len(column) for column in columns}) == 1:
        raise InputError(
            f"corpus.path: {file.url} is one object that holds the records column by column; give one record a line: "
            f"`pandas.read_json({file.name!r}).to_json('records.jsonl', orient='records', lines=True)` writes it so"
        )
    for name, value in record.items():
        if not has_content and isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            raise _holds_records(name, file)


def _holds_records(name: str, file: CorpusFile) -> InputError:
    query = f".{json.dumps(name)}[]"
    return InputError(
        f"corpus.path: {file.url} is one object whose list {name!r} holds records; give one record a line, or the list "
        f"alone: `jq -c '{query}' {file.name} > records.jsonl` writes one a line"
    )


# ---- one a line


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file, which may end in \\n, \\r\\n or \\r, without their ends."""
    rest: list[bytes] = []
    held = b""  # \r at the end of a block: \n may follow
    for block in blocks:
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""
        block = block[: len(block) - len(held)]
        if not block:
            continue
        lines = block.splitlines()
        lines[0] = b"".join([*rest, lines[0]])
        rest = [] if block.endswith((b"\n", b"\r")) else [lines.pop()]
        yield from lines
    if rest or held:
        yield b"".join(rest)


def count_lines(block: bytes) -> int:
    """The ends of lines in a block."""
    return block.count(b"\n") + (block.count(b"\r") - block.count(b"\r\n") if b"\r" in block else 0)


def record_of(line: bytes) -> dict[str, Any] | Unreadable:
    """The record that a line holds."""
    try:
        record = json.loads(line.lstrip(MARKS).decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        return Unreadable(UNDECODABLE)
    except (ValueError, RecursionError) as error:
        return Unreadable(_reason(error))
    return record if isinstance(record, dict) else Unreadable(NO_OBJECT)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return BROKEN if isinstance(error, json.JSONDecodeError) else TOO_LONG


# ---- all in one list, or over several lines

Records = Iterator[tuple[dict[str, Any] | Unreadable, int]]
"""Records, and how many characters each takes."""


def records_in_list(blocks: Iterator[bytes], file: CorpusFile) -> Records:
    """The records of a list. Raises InputError where it is broken."""
    text = _Text(blocks)
    if text.next() == "[":
        text.at += 1
    if text.next() == "]":
        text.at += 1
        return
    number = 0
    while True:
        yield _next_record(text, number, file)
        mark = text.next()
        text.at += 1
        if mark == "]":
            break
        if mark != ",":
            raise _damaged(file, number, CUT if not mark else f"{mark!r} follows it")
        number += 1
    if text.next():
        raise InputError(
            f"corpus.path: {file.url} goes on after the list that it begins with; give one list of records, or one "
            "record a line"
        )


def records_over_lines(blocks: Iterator[bytes], file: CorpusFile) -> Records:
    """The records of a file that has one after the other, each over several lines. Raises InputError where it is
    broken, and for one object that holds more than a record may."""
    text = _Text(blocks, MOST_CHARACTERS)
    number = 0
    while text.next():
        try:
            yield _next_record(text, number, file)
        except _TooLong:
            found = re.search(r'"([^"\\]+)"\s*:\s*\[\s*\{', text.text[:HEAD_BYTES])
            raise _holds_records(found[1] if found else "records", file) from None
        number += 1


def _next_record(text: "_Text", number: int, file: CorpusFile) -> tuple[dict[str, Any] | Unreadable, int]:
    before = text.passed
    try:
        value = text.value()
    except (ValueError, RecursionError) as error:
        raise _damaged(file, number, CUT if text.is_cut else f"{_reason(error)}: {error}") from None
    return value if isinstance(value, dict) else Unreadable(NO_OBJECT), text.passed - before


def _damaged(file: CorpusFile, number: int, why: str) -> InputError:
    return InputError(
        f"corpus.path: {file.url} is no JSON, it cannot be read beyond record {number} (counted from 0): {why}"
    )


class _TooLong(Exception):
    """A value has more characters than it may."""


class _Text:
    """The text of a file, of which no more is held than the value that is being read and a block."""

    def __init__(self, blocks: Iterator[bytes], most: int | None = None):
        self._blocks, self._most = blocks, most
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._read = json.JSONDecoder().raw_decode
        self._dropped = 0
        self.text = ""
        self.at = 0
        self.is_whole = False
        self.is_cut = False
        """True if the last value was not whole."""

    @property
    def passed(self) -> int:
        """The characters before the place where it is."""
        return self._dropped + self.at

    def next(self) -> str:
        """Go to the next character that is no white space, and return it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in NOTHING:
                self.at += 1
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self) -> Any:
        """Read the JSON value that follows. Raises ValueError and RecursionError as `json` does, and _TooLong."""
        self.next()
        while True:
            try:
                value, end = self._read(self.text, self.at)
            except json.JSONDecodeError as error:
                beyond = len(self.text.rstrip()) if self.is_whole else len(self.text) - UNFINISHED
                self.is_cut = error.pos >= beyond or error.msg.startswith("Unterminated string")
                if not self.is_cut or self.is_whole:
                    raise
            else:
                if end < len(self.text) or self.is_whole:  # a number may go on
                    self.at = end
                    return value
            self._more()

    def _more(self) -> None:
        """Read at least as much as is held, so that a long value is not parsed again for every block."""
        parts = [self.text[self.at :]]
        if self._most is not None and len(parts[0]) > self._most:
            raise _TooLong
        wanted = max(BLOCK_BYTES, len(parts[0]))
        while wanted > 0 and not self.is_whole:
            block = next(self._blocks, b"")
            self.is_whole = not block
            parts.append(self._decoder.decode(block, final=self.is_whole))
            wanted -= len(block)
        self._dropped += self.at
        self.text, self.at = "".join(parts), 0
