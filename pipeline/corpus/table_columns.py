"""The columns of the table of rows, range by range, from documents that are cut and in order."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.documents import Documents, Sizes, rows_of_contexts, starts_of

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def rows_between(documents: Documents, before: Sizes, start: int, stop: int) -> tuple[Documents, Sizes] | None:
    """The contexts with rows [start, stop) of the table, only those being rows, and the sizes of what is in front of
    them; None if the documents, which have `before` in front of them, have none of these rows."""
    rows = rows_of_contexts(documents)
    ends = before.rows + np.cumsum(rows)
    start, stop = max(start, before.rows), min(stop, int(ends[-1]))
    if start >= stop:
        return None
    first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop)) + 1
    begin = int(documents.context_lengths[:first].sum())
    is_row = documents.is_row[begin : begin + int(documents.context_lengths[first:last].sum())].copy()
    numbered = np.flatnonzero(is_row)
    first_row = int(ends[first] - rows[first])
    is_row[numbered[: start - first_row]] = False
    is_row[numbered[stop - first_row :]] = False
    context_ends = np.cumsum(documents.contexts)
    document, last_document = (int(np.searchsorted(context_ends, c, side="right")) for c in (first, last - 1))
    contexts = documents.contexts[document : last_document + 1].copy()
    contexts[0] -= first - int(context_ends[document] - documents.contexts[document])
    contexts[-1] -= int(context_ends[last_document]) - last
    part = replace(
        documents,
        keys=documents.keys[document : last_document + 1],
        contexts=contexts,
        about=documents.about.slice(document, last_document + 1 - document),
        context_lengths=documents.context_lengths[first:last],
        tokens=documents.tokens[begin : begin + len(is_row)],
        is_row=is_row,
        roles=None if documents.roles is None else documents.roles[begin : begin + len(is_row)],
        labels=documents.labels[begin : begin + len(is_row)],
    )
    return part, Sizes(before.documents + document, before.contexts + first, before.context_tokens + begin, start)


def row_column(documents: Documents, name: str, before: Sizes) -> Any:
    """A row column of the documents' part of the table; `before`: the sizes of the documents in front of them."""
    lengths, is_row = documents.context_lengths, documents.is_row
    if name == "token":
        return documents.tokens[is_row]
    if name == "role":
        assert documents.roles is not None
        return documents.roles[is_row]
    if name in documents.labels.codes:
        return documents.labels.codes[name][is_row]
    if name == "position":
        first = starts_of(lengths).astype(np.int32)  # a bucket has fewer tokens than 2^31
        return (np.arange(len(is_row), dtype=np.int32) - np.repeat(first, lengths))[is_row]
    rows = rows_of_contexts(documents)
    if name == "context":
        return np.repeat(before.contexts + np.arange(len(lengths)), rows)
    assert name == "document"
    return np.repeat(before.documents + np.repeat(np.arange(len(documents.keys)), documents.contexts), rows)


def context_starts(documents: Documents, before: Sizes) -> Int64:
    """Where each context begins in `context_token`."""
    return before.context_tokens + starts_of(documents.context_lengths)


def documents_table(documents: Documents, before: Sizes) -> pa.Table:
    """document, row_start, row_stop, source, and the labels."""
    number = len(documents.keys)
    stops = before.rows + np.cumsum(np.add.reduceat(rows_of_contexts(documents), starts_of(documents.contexts)))
    columns = {
        "document": before.documents + np.arange(number),
        "row_start": np.concatenate([[before.rows], stops[:-1]]),
        "row_stop": stops,
    }
    about = {name: documents.about.column(name) for name in documents.about.column_names}
    return pa.table({**{name: pa.array(values, pa.int64()) for name, values in columns.items()}, **about})
