"""Subpopulations by SQL: a condition over the columns of `rows` and `documents`, as `granary query` knows them.

Invariant: whether a row fulfils a condition depends on the row and its document alone, so that any part of the table
may be asked by itself, at any time, with the same answer. Sub-selects, and functions like random() and now(), are
refused for that reason.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import duckdb
import numpy as np

from storage.errors import StorageError
from storage.format.arrays import Array
from storage.read.reader import StoreReader
from storage.sql.bounded import Bounds
from storage.sql.query import rows_table
from storage.sql.sandbox import open_sandbox

_KEYWORDS = {"current_timestamp", "current_time", "localtime", "localtimestamp"}
"""Functions that are written without parentheses: DuckDB's parser takes them for columns."""
_Columns = tuple[list[str], list[str]]
"""Names of columns of rows, and of documents."""


def check_condition(condition: str) -> None:
    """Raise StorageError unless a text is one condition. Looks at no store: its columns may be unknown."""
    found, wanted = (_parsed(f"SELECT row FROM rows WHERE ({text}\n)") for text in (condition, "true"))
    where = found.pop("where_clause", None)
    del wanted["where_clause"]
    if where is None or found != wanted:
        raise StorageError(f"{condition!r} is more than a condition: write what may follow WHERE, and nothing after it")
    for part in _parts(where):
        kind, names = part.get("class"), part.get("column_names", [])
        if kind == "SUBQUERY":
            raise StorageError(f"{condition!r} has a sub-select: a condition says of one row whether it belongs")
        if kind == "PARAMETER":
            raise StorageError(f"{condition!r} has a parameter, for which there is no value: write the value itself")
        called = names[0] if len(names) == 1 else part.get("function_name", "")
        if called.lower() in _changing():
            raise StorageError(f"{condition!r} depends on more than the row: {called} is not the same at all times")


class Conditions:
    """Conditions that are checked against the columns of a store. Raises StorageError that names the wrong one."""

    def __init__(self, store: StoreReader, conditions: Sequence[str]):
        self.store, self.conditions = store, tuple(conditions)
        for condition in self.conditions:
            check_condition(condition)
        self._bounds = Bounds()
        # One for all ranges of rows, as opening one takes longer than asking it. There is a task on every core already.
        self._database = open_sandbox(memory_bytes=self._bounds.memory_bytes, threads=1)
        self._named: _Columns | None = None
        every = self._register(0, 1)
        self._known = list(dict.fromkeys(name for table in every for name in table))
        for condition in self.conditions:
            self._asked(condition)
            query = f"SELECT ({condition}\n) FROM {_JOINED}"
            (kind,) = self._bounds.run(partial(self._types, query), self._database.interrupt)
            if str(kind) != "BOOLEAN":
                raise StorageError(f"{condition!r} is no condition: it gives {kind}, not true or false")
        self._named = _named_among(self.conditions, every)

    def rows(self, start: int, stop: int) -> list[Array]:
        """Return those of the rows [start, stop) that fulfil each condition: int64, ascending. NULL is not
        fulfilled."""
        self._register(start, stop)
        return [np.sort(self._asked(condition)) for condition in self.conditions]

    def _register(self, start: int, stop: int) -> _Columns:
        """Read the columns that the conditions name, or all while that is not known. Return the names of those of rows,
        and of documents."""
        of_rows, of_documents = self._named or (None, None)
        rows = rows_table(self.store, start, stop, of_rows)
        document = rows.column("document").to_numpy()
        first, last = int(document.min()), int(document.max())
        documents = self.store.documents_between(first, last, of_documents)  # beside `document`, which they all have
        self._database.register("rows", rows)
        self._database.register("documents", documents)
        return rows.column_names, documents.column_names

    def _types(self, query: str) -> Sequence[Any]:
        return self._database.sql(query).types

    def _asked(self, condition: str) -> Array:
        query = f"SELECT rows.row FROM {_JOINED} WHERE ({condition}\n)"
        try:
            columns = self._bounds.run(lambda: self._database.execute(query).fetchnumpy(), self._database.interrupt)
        except StorageError as error:  # time or memory, for which a condition has no options
            what = str(error).partition(":")[0]
            raise StorageError(f"{condition!r} cannot be asked of the rows: {what}. Write a simpler one") from None
        except duckdb.Error as error:
            (reason, *_) = re.split(r"\n(?:Candidate|LINE|Did you mean)", str(error))
            names = ", ".join(name if name.isidentifier() else f'"{name}"' for name in self._known)
            words = " ".join(reason.split())
            raise StorageError(f"{condition!r} cannot be asked of the rows: {words}. Columns: {names}") from None
        return np.asarray(columns["row"], dtype=np.int64)


_JOINED = "rows JOIN documents USING (document)"


def _named_among(conditions: Sequence[str], every: _Columns) -> _Columns | None:
    """Return which columns some conditions need of those that there are: those that have the name of anything in a
    condition, as SQL compares names, and the one that joins the tables. None where it cannot be told: all."""
    named = {"document"}
    for condition in conditions:
        for part in _parts(_parsed(f"SELECT row FROM rows WHERE ({condition}\n)")["where_clause"]):
            names = [name.casefold() for name in part.get("column_names", [])]
            is_whole_row = bool(names) and names[-1] in ("rows", "documents")
            if is_whole_row or part.get("class") in ("STAR", "POSITIONAL_REFERENCE"):
                return None
            named.update(names)
    of_rows, of_documents = ([name for name in table if name.casefold() in named] for table in every)
    return of_rows, of_documents


def _parsed(query: str) -> dict[str, Any]:
    """DuckDB's tree of a SELECT, without the places of its words. Raises StorageError."""
    text = _parser().execute("SELECT json_serialize_sql(?)", [query]).fetchone()
    assert text is not None
    tree = json.loads(text[0])
    if tree["error"]:
        shown = query.removeprefix("SELECT row FROM rows WHERE (").removesuffix("\n)")
        raise StorageError(f"{shown!r} is no condition in SQL: {' '.join(str(tree['error_message']).split())}")
    if len(tree["statements"]) != 1:
        raise StorageError(f"{query!r} is more than one statement: give a condition")
    node: dict[str, Any] = _without_places(tree["statements"][0]["node"])
    return node


@cache
def _parser() -> duckdb.DuckDBPyConnection:
    """A database with nothing in it."""
    return open_sandbox(memory_bytes=Bounds.memory_bytes, threads=1)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items() if not k.startswith("query_location")}
    return [_without_places(v) for v in value] if isinstance(value, list) else value


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a tree."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _parts(inner)


@cache
def _changing() -> frozenset[str]:
    """The names of DuckDB's functions that may give something else when they are called again."""
    lines = _parser().execute(
        "SELECT DISTINCT lower(function_name) FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    )
    return frozenset({str(name) for (name,) in lines.fetchall()} | _KEYWORDS)
