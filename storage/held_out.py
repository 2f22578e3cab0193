"""Which subpopulations the held-out rows lack. What is measured on held-out rows says nothing of those.

Rows are held out in whole units at the end of the table, whose documents are in a random order. A label's value of few
documents, or of a few long ones, can therefore be left out by chance.
"""

import pyarrow as pa
import pyarrow.compute as pc

from storage.store import Store


def values_without_held_out_rows(store: Store) -> dict[str, list[str]]:
    """Return label -> its values that no document has which begins in the held-out rows, in order; labels that lack
    none are left out, and so are all of them where nothing is held out."""
    info = store.info
    if info.held_out_start >= info.num_rows:
        return {}
    documents = store.documents_between(0, info.num_documents - 1, ("row_start", *info.labels))
    begins_there = documents.filter(pc.greater_equal(documents["row_start"], info.held_out_start))
    lacking = {label: sorted(_values(documents, label) - _values(begins_there, label)) for label in info.labels}
    return {label: values for label, values in lacking.items() if values}


def _values(documents: pa.Table, label: str) -> set[str]:
    return {str(value) for value in pc.unique(documents[label]).to_pylist()}
