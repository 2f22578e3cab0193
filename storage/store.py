"""A store: what a user opens. Its rows, shuffled streams of them, and SQL over them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.backends.place import Place, open_place
from storage.backends.retry import Waiting
from storage.format.arrays import Array
from storage.read.reader import StoreReader
from storage.read.stream import stream
from storage.table.root import read_root

if TYPE_CHECKING:
    from storage.sql.answer import Answer


def open_store(url: str | Path | Place, *, waiting: Waiting | None = None) -> "Store":
    """Open the store at a path or URL. Raises NotAStore when there is none, or it is of another format version.

    `waiting`: who is told of pauses, for a process that was started for this store; see `open_place`.
    """
    path = open_place(url, waiting=waiting)
    return Store(path, read_root(path))


class Store(StoreReader):
    """A store that is open for reading. Cheap to make; holds no file open; safe to use from several threads."""

    def stream(
        self,
        sites: Sequence[str],
        *,
        batch_rows: int,
        seed: int = 0,
        start_step: int = 0,
        steps: int | None = None,
        max_norm: float | None = None,
        norm_site: str | None = None,
    ) -> Iterator[dict[str, Array]]:
        """Yield shuffled batches {site: [batch_rows, d_model]} of rows that are not held out; see storage.read.stream.

        `max_norm`: leave out rows whose norm is above this many times the median; 10, say, leaves out attention sinks.
        """
        return stream(
            self,
            sites,
            batch_rows=batch_rows,
            seed=seed,
            start_step=start_step,
            steps=steps,
            max_norm=max_norm,
            norm_site=norm_site,
        )

    def sql(self, query: str, **bounds: Any) -> "Answer":
        """Run SQL over the tables documents, rows, tokens, units and sites: a DuckDB relation; see storage.sql.query.

        A query only reads, ends within 30 s (`timeout_s`), and takes 1 GiB at most (`memory_bytes`), which all threads
        of the process share while it works. `allow_files=True` lets it read local files.
        """
        from storage.sql.query import sql  # duckdb is slow to import, and few who open a store ask it anything

        return sql(self, query, **bounds)
