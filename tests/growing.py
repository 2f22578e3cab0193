"""Stores that grow, of made-up rows and by `storage` alone: fast, and without torch, for processes that are killed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.make.create import Table, corpus_digest
from storage.make.grow import grown_table
from storage.store import Store
from storage.table.root import CorpusInfo


def first_rows(table: Table, rows: int) -> Table:
    """The table of the same corpus with fewer rows: its last document and context are cut."""
    columns = {name: values[:rows] for name, values in table.columns.items()}
    context, document = int(columns["context"][-1]), int(columns["document"][-1])
    end = int(table.context_start[context]) + int(columns["position"][-1]) + 1
    stops = table.documents.column("row_stop").to_pylist()[:document]
    documents = table.documents.slice(0, document + 1)
    at = documents.column_names.index("row_stop")
    return replace(
        table,
        columns=columns,
        context_token=table.context_token[:end],
        context_start=pa.array([*table.context_start[: context + 1].tolist(), end]).to_numpy(),
        documents=documents.set_column(at, "row_stop", pa.array([*stops, rows])),
    )


def info_of(table: Table, digest: str, rows_per_unit: int) -> CorpusInfo:
    sizes = table.sizes
    fixed: dict[str, Any] = {"context": 64, "skip_first": 1, "labels": ["language"], "roles": [], "plan": {}}
    fixed |= {"tokenizer_digest": "none", "skipped": {}, "made_with": {}, "rows_per_unit": rows_per_unit}
    return CorpusInfo(
        num_rows=sizes.num_rows,
        num_contexts=sizes.num_contexts,
        num_context_tokens=sizes.num_context_tokens,
        num_documents=sizes.num_documents,
        held_out_start=sizes.num_rows,
        corpus_digest=digest,
        **fixed,
    )


def save_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def grow(store: Store, table: Table) -> Store:
    """Put a table in place of the store's, as `workers.plan.stage` does."""
    with grown_table(store) as draft:
        files = draft.begin_table(table.sizes)
        digests: dict[str, Sequence[str]] = {n: files.write_chunks(n, 0, v) for n, v in table.arrays.items()}
        digests["documents"] = [files.write_documents(0, table.documents)]
        files.write_tokenizer(save_no_tokenizer)
        return draft.finish(info_of(table, corpus_digest(digests), store.info.rows_per_unit))
