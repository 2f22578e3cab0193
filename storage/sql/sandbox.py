"""A DuckDB that reads what it is given and nothing else.

Invariant: a statement that `check_statement` lets through, on a connection of `open_sandbox`, changes nothing outside
its own empty database, and reads nothing outside what is registered with it, or with `allow_files` local files.
DuckDB's own switches keep files, networks, extensions and configuration out, and are locked. Beside `allow_files`,
which lifts the first of them, nothing but the statement's form keeps files from being written.
What was weighed is in docs/decisions/0014-safe-sql.md.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from storage.errors import StorageError

READ_ONLY = "a store is read-only: ask it with one SELECT"
MOST_THREADS = 8
SHARE_OF_DUCKDB = 0.75
"""The share of a query's memory that DuckDB may fill. The rest is for results in Arrow and Python, and for strings and
lists, which DuckDB does not count."""

_SELECT, _EXPLAIN, _MULTI = (
    duckdb.StatementType.SELECT,
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.MULTI,
)
_EXPLAIN_WORDS = re.compile(r"\s*explain\b(\s+analyze\b)?", re.IGNORECASE)
_EXPLAIN_OPTIONS = re.compile(r"\s*\([\w\s,]*\)")
_TABLE_WORDS = re.compile(r"(?:\s|--[^\r\n]*\n)*(?:\(|(?:pivot|pivot_wider|select|from|with)\b)", re.IGNORECASE)
"""How a PIVOT may begin. DuckDB calls whatever holds one MULTI: COPY (PIVOT ...) TO, too."""
_SQL_IN_TEXT = ("query", "json_execute_serialized_sql")
"""Table functions that run what a string says."""
_WRITING_WORDS = re.compile(rf"\b(copy|{'|'.join(_SQL_IN_TEXT)})\b", re.IGNORECASE)


def open_sandbox(
    *, memory_bytes: int, threads: int | None = None, allow_files: bool = False
) -> duckdb.DuckDBPyConnection:
    """Open an empty database in memory, to which tables may be registered.

    `allow_files`: local files may be read, by any of DuckDB's functions; networks stay out.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    connection = duckdb.connect(
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "memory_limit": f"{max(int(memory_bytes * SHARE_OF_DUCKDB) // 2**20, 1)}MiB",
            "max_temp_directory_size": "0B",  # what does not fit is refused: spilling writes files
            "threads": threads or min(cores, MOST_THREADS),
            "python_enable_replacements": False,  # a table is never a Python variable of ours
        }
    )
    connection.execute("set enable_progress_bar = false")
    if allow_files:
        connection.execute("set allowed_directories = ['/']")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def check_statement(connection: duckdb.DuckDBPyConnection, query: str, *, allow_files: bool) -> None:
    """Raise StorageError unless `query` is one statement that only reads: SELECT, DESCRIBE, SHOW, PIVOT and the like,
    or EXPLAIN of one. Raises duckdb.Error where it is no SQL."""
    kinds = _kinds(connection, query)
    if kinds == [_EXPLAIN]:  # EXPLAIN ANALYZE runs what it explains
        inner = (text for text in _explained(query) if _is_one_select(connection, text))
        query, kinds = next(inner, ""), [_SELECT]
    if kinds == [_SELECT] and query:
        ((text,),) = connection.execute("select json_serialize_sql(?)", [query]).fetchall()
        try:
            tree = json.loads(text)
        except RecursionError:
            raise StorageError("the query is nested too deeply, some 400 levels: write it flatter") from None
        if tree["error"] or any(_is_forbidden(part, allow_files) for part in _objects(tree)):
            raise StorageError(READ_ONLY)
    elif kinds == [_MULTI]:  # DuckDB gives no tree of it
        words = _EXPLAIN_WORDS.match(query)
        if not _TABLE_WORDS.match(query, words.end() if words else 0):
            raise StorageError(READ_ONLY)
        if allow_files and (word := _WRITING_WORDS.search(query)):
            raise StorageError(f"{READ_ONLY}; beside files a PIVOT may not hold the word {word[0]}")
    else:
        raise StorageError(READ_ONLY)


def _kinds(connection: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    return [statement.type for statement in connection.extract_statements(query)]


def _explained(query: str) -> Iterator[str]:
    """What an EXPLAIN may explain. Comments before it are not understood: they nest, which a pattern cannot follow."""
    if words := _EXPLAIN_WORDS.match(query):
        yield query[words.end() :]
        if options := _EXPLAIN_OPTIONS.match(query, words.end()):
            yield query[options.end() :]


def _is_one_select(connection: duckdb.DuckDBPyConnection, text: str) -> bool:
    try:
        return _kinds(connection, text) == [_SELECT]
    except duckdb.ParserException:
        return False


def _is_forbidden(part: dict[str, Any], allow_files: bool) -> bool:
    """Return whether a part of a SELECT's tree writes (a common table may be COPY or INSERT), or may hide such a
    one."""
    if str(part.get("type", "")).endswith("_QUERY_NODE"):
        return True
    return allow_files and str(part.get("function_name", "")).lower() in _SQL_IN_TEXT


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a tree."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
