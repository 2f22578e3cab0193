"""The demo's corpus: the text of the running Python's own standard library.

It needs no network and no licence, everyone has it, and it comes with honest labels: `kind` says
whether a text is code, docstring, comment or reference documentation, `package` says where it is from.
Comments and docstrings are taken out of the code, so no text appears under two kinds.
"""

import ast
import io
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
MIN_CHARACTERS = 200
"""Shorter texts say little about their label and become contexts of a few tokens."""
LABELS = ("kind", "package")
DEMO_CHARACTERS = 2_600_000
"""Text of the demo: some 760,000 tokens of its model."""
HELD_OUT_SHARE = 0.08
"""Share of the text in the second file. Less than the spec's corpus.holdout, so that all of it is held out."""
LEAST_DOCUMENTS = 4
"""The demo takes this many documents of a label's value, however rare the value is, or all that there are."""
LONG_CHARACTERS = 16_000
"""Longer texts are not held out, unless a value has no others: a few of them would be all that is."""


class DemoDocument(NamedTuple):
    text: str
    kind: str
    package: str
    source: str


def write_corpus(path: Path) -> int:
    """Write the corpus as one Parquet file with the columns text, kind, package, source; return its documents."""
    documents = all_documents()
    write_documents(path, documents)
    return len(documents)


def write_split(training: Path, held_out: Path) -> tuple[int, int]:
    """Write the demo's part of the corpus as two Parquet files; return the documents of each."""
    parts = split_documents(all_documents())
    for path, documents in zip((training, held_out), parts, strict=True):
        write_documents(path, documents)
    return len(parts[0]), len(parts[1])


def all_documents() -> list[DemoDocument]:
    """Return every text of the standard library once, in the order of its files."""
    return sorted(set(standard_library_documents()), key=lambda d: (d.source, d.kind, d.text))


def write_documents(path: Path, documents: Sequence[DemoDocument]) -> None:
    """Write documents as one Parquet file with a column for each of their fields."""
    columns = {field: [getattr(d, field) for d in documents] for field in DemoDocument._fields}
    pq.write_table(pa.table(columns), path)


def split_documents(
    documents: Sequence[DemoDocument], characters: int = DEMO_CHARACTERS, share: float = HELD_OUT_SHARE
) -> tuple[list[DemoDocument], list[DemoDocument]]:
    """Choose texts of `characters` in all, and return those to train on and the `share` that is held out.

    Drawn at random, a value of few documents would be on one side only, or in neither. So each value of a label first
    gives some documents, of which one is held out; the others follow in an order that their texts decide.
    """
    order = sorted(documents, key=lambda d: zlib.crc32(d.text.encode()))
    first = _some_of_each(sorted(order, key=lambda d: len(d.text) > LONG_CHARACTERS), LEAST_DOCUMENTS)
    others = _within([d for d in order if d not in set(first)], characters - _characters(first))
    of_several = Counter(value for d in first for value in _values(d))
    held_out = _some_of_each([d for d in first if min(of_several[value] for value in _values(d)) > 1], 1)
    short = [d for d in others if len(d.text) <= LONG_CHARACTERS]
    held_out += _within(short, int(share * characters) - _characters(held_out))
    return [d for d in (*first, *others) if d not in set(held_out)], held_out


def _values(document: DemoDocument) -> list[tuple[str, str]]:
    return [(label, getattr(document, label)) for label in LABELS]


def _some_of_each(documents: Sequence[DemoDocument], number: int) -> list[DemoDocument]:
    """Return the first documents of each value of each label. One may stand for a value of every label."""
    chosen: list[DemoDocument] = []
    have: Counter[tuple[str, str]] = Counter()
    for document in documents:
        if any(have[value] < number for value in _values(document)):
            chosen.append(document)
            have.update(_values(document))
    return chosen


def _within(documents: Sequence[DemoDocument], characters: int) -> list[DemoDocument]:
    """Return documents in order, leaving out those that would go beyond `characters`."""
    chosen, total = [], 0
    for document in documents:
        if total + len(document.text) <= characters:
            chosen.append(document)
            total += len(document.text)
    return chosen


def _characters(documents: Sequence[DemoDocument]) -> int:
    return sum(len(document.text) for document in documents)


def standard_library_documents() -> Iterator[DemoDocument]:
    """Yield every text of the standard library, file by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or _is_generated(relative):
            continue
        package = relative.parts[0] if len(relative.parts) > 1 else "modules"
        try:
            source = file.read_bytes().decode("utf-8")
            parts = split_source(source)
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue  # a few files of lib2to3 and encodings are not valid modern Python on purpose
        for kind, text in parts:
            if len(text.strip()) >= MIN_CHARACTERS:
                yield DemoDocument(text, kind, package, relative.as_posix())
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        if len(text.strip()) >= MIN_CHARACTERS:
            yield DemoDocument(text, "docs", "pydoc_data", f"pydoc_data/topics/{topic}")


def split_source(source: str) -> list[tuple[str, str]]:
    """Split Python source into (kind, text): one code text, each docstring, all comment blocks of the file together."""
    lines = source.splitlines(keepends=True)
    parts: list[tuple[str, str]] = []
    blank: list[tuple[int, int, int, int]] = []  # (line, column, end line, end column), 0-based lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=True)
            if docstring is not None:
                constant = node.body[0]
                assert isinstance(constant, ast.Expr)
                assert constant.end_lineno is not None
                parts.append(("docstring", docstring))
                # ast counts columns in UTF-8 bytes; a docstring starts after ASCII indentation, so only its end differs
                end_line = lines[constant.end_lineno - 1].encode()[: constant.end_col_offset].decode()
                blank.append((constant.lineno - 1, constant.col_offset, constant.end_lineno - 1, len(end_line)))
    comments: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.string)
            blank.append((token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1]))
    if comments:
        parts.append(("comment", "\n".join(comments)))
    for first, column, last, end_column in sorted(blank, reverse=True):
        tail = lines[last][end_column:]
        lines[first : last + 1] = [lines[first][:column].rstrip() + tail]
    code = "".join(line for line in lines if line.strip())
    parts.append(("code", code))
    return parts


def _is_generated(relative: Path) -> bool:
    """The charmap codecs are megabytes of one repeated line and would drown their package; config-* is the build's."""
    if relative.parts[0].startswith("config-"):
        return True
    return relative.parts[0] == "encodings" and relative.name.startswith(
        ("cp", "iso", "mac", "koi", "kz", "ptcp", "tis")
    )
