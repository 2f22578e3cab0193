"""What `store.sql` gives: DuckDB's relation, every call of which keeps to the query's time and memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import duckdb
import pyarrow as pa

from storage.errors import StorageError
from storage.sql.bounded import Bounds


class Answer:
    """A query's result, which is computed when it is asked for: everything that a DuckDBPyRelation has.

    `fetchall`, `df`, `pl`, `to_arrow_table`, `show`, `columns`, `types`, `filter`, `order`, `limit` and the rest are
    the relation's own, each call within the bounds; relations come back as Answers. A reader of record batches
    (`arrow`, `to_arrow_reader`) keeps to the bounds over all its batches. Raises StorageError in place of DuckDB's.
    """

    def __init__(self, relation: duckdb.DuckDBPyRelation, session: "Session"):
        self._relation = relation
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self._session.run(lambda: getattr(self._relation, name))
        return self._bounded(value) if callable(value) else self._wrapped(value)

    def _bounded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given = [_relation_of(value) for value in arguments]
            by_name = {key: _relation_of(value) for key, value in named.items()}
            return self._wrapped(self._session.run(lambda: method(*given, **by_name)))

        call.__doc__ = method.__doc__
        return call

    def _wrapped(self, value: Any) -> Any:
        if isinstance(value, duckdb.DuckDBPyRelation):
            return Answer(value, self._session)
        if isinstance(value, pa.RecordBatchReader):
            return pa.RecordBatchReader.from_batches(value.schema, self._session.batches(value))
        return value

    def __getitem__(self, name: str) -> "Answer":
        return Answer(self._session.run(lambda: self._relation[name]), self._session)

    def __len__(self) -> int:
        return int(self._session.run(lambda: len(self._relation)))

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.arrow().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        """The first rows, as a table."""
        return str(self._session.run(lambda: str(self._relation)))

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._relation)})


class Session:
    """The connection and the bounds of one query."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, bounds: Bounds, in_words: Callable[[str], str]):
        """`in_words` makes a sentence of DuckDB's."""
        self.connection = connection
        self.bounds = bounds
        self._in_words = in_words
        self._preparing_s = 0.0

    def prepare(self, query: str, check: Callable[[], None]) -> Answer:
        """Bind a query that passes `check`. DuckDB computes constants then, which counts to the time of each fetch."""
        before = monotonic()

        def bound() -> duckdb.DuckDBPyRelation | None:
            check()
            return self.connection.sql(query)

        relation = self.run(bound)
        assert relation is not None
        self._preparing_s = monotonic() - before
        return Answer(relation, self)

    def run(self, call: Callable[[], Any], spent_s: float = 0.0) -> Any:
        """Run a call of DuckDB's within the bounds. Raises StorageError."""
        with self._errors():
            return self.bounds.run(call, self.connection.interrupt, self._preparing_s + spent_s)

    def batches(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        spent_s = 0.0
        while True:
            before = monotonic()
            batch = self.run(lambda: next(reader, None), spent_s)
            if batch is None:
                return
            spent_s += monotonic() - before
            yield batch

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # a reader's are those of Arrow
            raise StorageError(self._in_words(str(error))) from error


def _relation_of(value: Any) -> Any:
    return value._relation if isinstance(value, Answer) else value
