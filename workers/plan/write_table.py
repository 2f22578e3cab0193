"""Writing a table of rows that is planned: in chunks, each by one call, from the buckets it lies in.

A call writes the whole chunks that begin in a bucket, and takes what the last of them lacks from the buckets that
follow. What is in a chunk does not depend on the buckets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa

from pipeline.corpus.documents import Documents, Sizes
from pipeline.corpus.table_columns import context_starts, documents_table, row_column, rows_between
from pipeline.corpus.token_labels import LabelValues
from storage.format.arrays import DTYPES
from storage.make.create import TableFiles
from storage.table.root import label_columns
from storage.table.table import COLUMN_CHUNK_ROWS, DOCUMENTS_PER_FILE
from workers.cluster.tasks import Tasks
from workers.plan.table_plan import TablePlan

WRITE_ROWS = 8 * COLUMN_CHUNK_ROWS
"""Rows whose columns are made and written at once: little against the tokens of a bucket."""


@dataclass(frozen=True)
class Naming:
    """What the whole plan says of columns."""

    schema: pa.Schema
    """The schema of what is known of documents."""
    label_names: LabelValues
    """The values of each label of tokens, in the order of their numbers."""


Written = tuple[dict[str, list[str]]]
"""Array name, or documents -> the digests of what was written, in order."""


def write_table(plan: TablePlan, files: TableFiles, tasks: Tasks) -> dict[str, list[str]]:
    """Write every array and documents file. Return their digests, as `storage.make.create.corpus_digest` takes them."""
    before = list(accumulate((bucket.sizes for bucket in plan.buckets), initial=Sizes(0, 0, 0, 0)))
    naming = Naming(plan.schema, plan.label_names)
    digests: dict[str, list[str]] = {}
    cuts: list[tuple[Callable[..., Written], list[int], int]] = [
        (write_rows, [size.rows for size in before], COLUMN_CHUNK_ROWS),
        (write_context_tokens, [size.context_tokens for size in before], COLUMN_CHUNK_ROWS),
        (write_context_starts, [size.contexts for size in before], COLUMN_CHUNK_ROWS),
        (write_documents, [size.documents for size in before], DOCUMENTS_PER_FILE),
    ]
    for write, offsets, align in cuts:
        calls = []
        for start, stop, first, last in _aligned(offsets, align):
            handles = [bucket.documents for bucket in plan.buckets[first:last]]
            calls += tasks.call(write, files, start, stop, before[first:last], naming, *handles, returns=1)
        for written in tasks.get(calls):
            for name, of_chunks in written.items():
                digests.setdefault(name, []).extend(of_chunks)
    return digests


def _aligned(offsets: Sequence[int], align: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut [0, offsets[-1]) where buckets begin, moved up to multiples of `align`: ranges and their buckets."""
    total = offsets[-1]
    cuts = sorted({min(-(-offset // align) * align, total) for offset in offsets})
    for start, stop in pairwise(cuts):
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        yield start, stop, first, last


def write_rows(
    files: TableFiles, start: int, stop: int, before: Sequence[Sizes], plan: Naming, *buckets: Documents
) -> Written:
    """Write the row columns of rows [start, stop), which lie in these buckets; return the digests of the chunks."""
    written: dict[str, list[str]] = {}
    for first in range(start, stop, WRITE_ROWS):
        last = min(first + WRITE_ROWS, stop)
        found = [part for b, d in _pairs(before, buckets) if (part := rows_between(d, b, first, last))]
        parts = [(replace(d, labels=d.labels.numbered(plan.label_names)), b) for d, b in found]
        labels = label_columns(files.sizes.row_labels)
        for name, dtype in files.sizes.row_columns.items():
            what = labels.get(name, name)
            values = np.concatenate([row_column(documents, what, sizes) for documents, sizes in parts])
            values = values.astype(DTYPES[dtype], copy=False)
            written.setdefault(name, []).extend(files.write_chunks(name, first, values))
    return (written,)


def write_context_tokens(
    files: TableFiles, start: int, stop: int, before: Sequence[Sizes], plan: Naming, *buckets: Documents
) -> Written:
    values = [d.tokens[max(0, start - b.context_tokens) : stop - b.context_tokens] for b, d in _pairs(before, buckets)]
    return ({"context_token": files.write_chunks("context_token", start, np.concatenate(values))},)


def write_context_starts(
    files: TableFiles, start: int, stop: int, before: Sequence[Sizes], plan: Naming, *buckets: Documents
) -> Written:
    starts = [context_starts(d, b) for b, d in _pairs(before, buckets)]
    values = np.concatenate(starts)[start - before[0].contexts : stop - before[0].contexts]
    if stop == files.sizes.num_contexts:  # where the last one ends
        values = np.append(values, files.sizes.num_context_tokens)
    return ({"context_start": files.write_chunks("context_start", start, values)},)


def write_documents(
    files: TableFiles, start: int, stop: int, before: Sequence[Sizes], plan: Naming, *buckets: Documents
) -> Written:
    tables = [_cast(documents_table(d, b), plan.schema) for b, d in _pairs(before, buckets)]
    table = pa.concat_tables(tables).slice(start - before[0].documents, stop - start)
    parts = [table.slice(first, DOCUMENTS_PER_FILE) for first in range(0, table.num_rows, DOCUMENTS_PER_FILE)]
    first_part = start // DOCUMENTS_PER_FILE
    return (
        {"documents": [files.write_documents(first_part + i, part.combine_chunks()) for i, part in enumerate(parts)]},
    )


def _pairs(before: Sequence[Sizes], buckets: Sequence[Documents]) -> list[tuple[Sizes, Documents]]:
    return list(zip(before, buckets, strict=True))


def _cast(table: pa.Table, about: pa.Schema) -> pa.Table:
    fields = [about.field(f.name) if f.name in about.names else f for f in table.schema]
    return table.cast(pa.schema(fields))
