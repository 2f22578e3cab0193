"""From Parquet files to documents: one text each, with its labels.

Nothing is dropped in silence: a record that gives no text is counted by reason, and a label without a value is an
error, because a row whose subpopulation is unknown would spoil every mean it is in.
"""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError

EXAMPLES_KEPT = 5
TEXT_TYPES = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
HASHED_WHOLE_BYTES = 256 * 2**20
SAMPLED_BLOCKS, SAMPLED_BYTES = 256, 2**20
RESERVED_COLUMNS = {"text", "document", "row_start", "row_stop", "source"}


@dataclass
class Skipped:
    """How many source records gave no rows, by reason, and the keys of the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(source)

    def to_record(self) -> dict[str, Any]:
        return {reason: {"count": n, "first": self.examples[reason]} for reason, n in sorted(self.counts.items())}


def find_files(pattern: str) -> list[Path]:
    """The files a path, folder or glob pattern names, in sorted order. Raises InputError when there are none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (may be absolute)
    if not files:
        raise InputError(
            f"corpus.path: no file matches {pattern!r}; give a Parquet file, a folder of them or a pattern"
        )
    return files


def fingerprint(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Identify source files by size and hash: of everything in files up to 256 MiB; of evenly spaced blocks and the
    tail, which holds Parquet's footer, in larger ones."""
    found = []
    for file in files:
        size = file.stat().st_size
        sha = hashlib.sha256()
        with file.open("rb") as handle:
            if size <= HASHED_WHOLE_BYTES:
                sha.update(handle.read())
            else:
                for block in range(SAMPLED_BLOCKS):
                    handle.seek(size * block // SAMPLED_BLOCKS)
                    sha.update(handle.read(SAMPLED_BYTES))
                handle.seek(size - SAMPLED_BYTES)
                sha.update(handle.read())
        found.append({"bytes": size, "sha256": sha.hexdigest()[:16]})
    return found


def read_documents(files: Sequence[Path], text: str, labels: Sequence[str]) -> tuple[pa.Table, Skipped]:
    """Read the columns `text` (string) and `labels`, and add `source` ("file name:record number").

    Texts that are empty or are not UTF-8 are left out and counted. Raises InputError for a file that is not Parquet,
    a column that is not there or not text, and a label with missing values.
    """
    reserved = sorted(RESERVED_COLUMNS.intersection(labels))
    if reserved:
        raise InputError(f"corpus.labels: {', '.join(reserved)} is a column of Granary's own; rename the label")
    skipped = Skipped()
    tables = [_read_file(file, text, labels, skipped) for file in files]
    try:
        documents = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"corpus.labels: the files do not agree on a label's type: {error}") from None
    if documents.num_rows == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.counts.items()) or "no records"
        raise InputError(f"the corpus is empty: {len(files)} file(s) with {reasons}; the first is {files[0]}")
    return documents, skipped


def _read_file(file: Path, text: str, labels: Sequence[str], skipped: Skipped) -> pa.Table:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"corpus.path: {file} cannot be read as Parquet: {error}") from None
    columns = parquet.schema_arrow.names
    for role, column in [("text", text), *(("labels", label) for label in labels)]:
        if column not in columns:
            raise InputError(f"corpus.{role}: no column {column!r} in {file}; it has {', '.join(columns)}")
    kind = parquet.schema_arrow.field(text).type
    if kind not in TEXT_TYPES:
        raise InputError(f"corpus.text: column {text!r} of {file} holds {kind}, not text")
    try:
        table = parquet.read(columns=[text, *labels])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"corpus.path: {file} is damaged, it cannot be read to its end: {error}") from None
    for label in labels:
        missing = table.column(label).is_null(nan_is_null=True)
        if count := missing.to_pylist().count(True):
            first = missing.index(True).as_py()
            raise InputError(
                f"corpus.labels: {label!r} has no value in {count} of {len(missing)} records of {file} "
                f"(the first is record {first}); fill or drop them"
            )
    texts, kept = [], []
    for number, raw in enumerate(table.column(text).cast(pa.large_binary()).to_pylist()):
        source = f"{file.name}:{number}"
        if not raw or not raw.strip():
            skipped.add("empty", source)
            continue
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            skipped.add("undecodable", source)
            continue
        kept.append(number)
    found = {label: table.column(label).take(pa.array(kept, pa.int64())) for label in labels}
    sources = [f"{file.name}:{number}" for number in kept]
    return pa.table({"text": pa.array(texts, pa.large_string()), "source": pa.array(sources, pa.string()), **found})
