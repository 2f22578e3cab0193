"""Which subpopulations the held-out rows lack. What is measured on held-out rows says nothing of those.

Rows are held out in whole units at the end of the table, whose documents are in a random order. A label's value of few
documents, or of a few long ones, can therefore be left out by chance. So can the value of a few spans.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.read.reader import StoreReader
from storage.table.root import label_columns
from storage.table.table import COLUMN_CHUNK_ROWS

ROWS_AT_ONCE = 16 * COLUMN_CHUNK_ROWS


def values_without_held_out_rows(store: StoreReader) -> dict[str, list[str]]:
    """Return label -> its values that no document has which begins in the held-out rows, in order, and of a label of
    rows those that no row of these documents has; labels that lack none are left out, and so are all of them where
    nothing is held out."""
    info = store.info
    if info.held_out_start >= info.num_rows:
        return {}
    documents = store.documents_between(0, info.num_documents - 1, ("row_start", *info.labels))
    begins_there = documents.filter(pc.greater_equal(documents["row_start"], info.held_out_start))
    lacking = {label: sorted(_values(documents, label) - _values(begins_there, label)) for label in info.labels}
    start = begins_there["row_start"][0].as_py() if begins_there.num_rows else info.num_rows
    lacking |= _lacking_rows(store, start)
    return {label: values for label, values in lacking.items() if values}


def _lacking_rows(store: StoreReader, start: int) -> dict[str, list[str]]:
    """The values of each label of rows that no row from `start` on has."""
    named = store.info.values_of_rows
    columns = label_columns(named)
    is_there = {name: np.zeros(len(named[label]) + 1, dtype=bool) for name, label in columns.items()}
    for first in range(start, store.num_rows, ROWS_AT_ONCE) if columns else ():
        codes = store.columns(first, min(first + ROWS_AT_ONCE, store.num_rows), list(columns))
        for name, seen in is_there.items():
            seen[codes[name]] = True  # -1, no value, is the last
    return {
        label: sorted(value for value, seen in zip(named[label], is_there[name], strict=False) if not seen)
        for name, label in columns.items()
    }


def _values(documents: pa.Table, label: str) -> set[str]:
    return {str(value) for value in pc.unique(documents[label]).to_pylist()}
