"""Records that are Python dictionaries already, as of JSON and of datasets by name."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus.formats.paths import MISSING, find, names_in, partitions
from pipeline.corpus.formats.records import Chunk, Columns, Unreadable, chunk_of
from pipeline.corpus.formats.values import content_value
from pipeline.corpus.sources.files import CorpusFile

RECORDS_TOLD = 8
"""Records of a chunk whose names a refusal tells."""


def chunk_of_objects(
    objects: Sequence[dict[str, Any] | Unreadable],
    numbers: npt.NDArray[np.int64],
    columns: Columns,
    file: CorpusFile,
    found: dict[str, None],
) -> Chunk:
    """Make a chunk of records.

    `found` takes names that records have: those that are wanted, if any record has them, and those of the first few.
    Raises InputError for a label that none of them has had, or one of these has not.
    """
    readable = [record for record in objects if not isinstance(record, Unreadable)]
    found.update((name, None) for record in readable[:RECORDS_TOLD] for name in names_in(record, columns.names))
    contents = [record if isinstance(record, Unreadable) else find(record, columns.content) for record in objects]
    if any(value is not MISSING and not isinstance(value, Unreadable) for value in contents):
        found.setdefault(columns.content)
    of_folders = partitions(file.url)
    labels: dict[str, list[Any]] = {}
    for name in columns.beside:
        values = [MISSING if isinstance(record, Unreadable) else find(record, name) for record in objects]
        if name in of_folders or any(value is not MISSING for value in values):
            found.setdefault(name)
        labels[name] = [of_folders.get(name) if value is MISSING else value for value in values]
    tools = None if columns.tools is None else [_tools(record, columns.tools, found) for record in objects]
    if columns.content in found:  # what has no content has no labels either, and is told by its content
        columns.required.check_present(sorted(found), file.url)
    return chunk_of(numbers, [_content(value, columns) for value in contents], labels, columns, file, tools)


def _tools(record: dict[str, Any] | Unreadable, column: str, found: dict[str, None]) -> Any:
    value = MISSING if isinstance(record, Unreadable) else find(record, column)
    if value is MISSING:
        return None
    found.setdefault(column)
    return value


def _content(value: Any, columns: Columns) -> Any:
    if value is MISSING:
        return Unreadable(f"no key {columns.content!r}")
    return value if isinstance(value, Unreadable) else content_value(value, columns.kind)
