"""`granary query`: SQL over a store, printed, as JSON lines, or as the activations of the rows that it finds."""

import argparse
import atexit
import json
import os
import sys
from typing import Any

from jobs.ending import REFUSED

JSON_ROWS = 2048
"""Rows that are Python objects at a time while they are printed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `granary query` takes beside the store."""
    parser.add_argument("sql", help="a SELECT")
    parser.add_argument("--site", help="fetch this site's activations of the rows found (column `row`)")
    parser.add_argument("--out", help="where to write them: .npy, .safetensors or .parquet")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, all rows")
    limits: dict[str, Any] = {"type": _above_zero}
    parser.add_argument("--timeout", metavar="SECONDS", default=30.0, help="end it after (default: 30)", **limits)
    parser.add_argument("--memory", metavar="GIB", default=1.0, help="what it may take (default: 1)", **limits)
    parser.add_argument(
        "--allow-files",
        action="store_true",
        help="let the query read (never write) any file of this machine that you can read, as for a join with your own "
        "Parquet: ... join 'labels.parquet' using (row); without it the store alone is read",
    )


def run_query(store: Any, arguments: argparse.Namespace) -> int:
    """Answer a query. Raises StorageError."""
    from storage.backends.place import home_expanded
    from storage.errors import StorageError
    from storage.sql.bounded import StepLeftBehind
    from storage.sql.query import check_output, fetch

    if (arguments.site is None) != (arguments.out is None):
        raise StorageError("--site and --out go together: the site whose activations to fetch, and the file for them")
    if arguments.site is not None:
        out = home_expanded(arguments.out)
        check_output(out)
        store.array(arguments.site)  # raises for a site that is not there
    try:
        table = _asked(store, arguments)
    except StepLeftBehind:
        atexit.register(_leave_at_once)
        raise
    if table is None:
        return 0
    if arguments.site is not None:
        shape = fetch(store, table, arguments.site, out)
        print(f"wrote {out}: {arguments.site} of {shape[0]:,} rows, {shape[1]} wide")
        return 0
    for batch in table.to_batches(max_chunksize=JSON_ROWS):
        for line in batch.to_pylist():
            print(json.dumps(line, default=str))
    return 0


def _asked(store: Any, arguments: argparse.Namespace) -> Any:
    """The whole answer, or None where its first rows were printed."""
    answer = store.sql(
        arguments.sql,
        timeout_s=arguments.timeout,
        memory_bytes=int(arguments.memory * 2**30),
        allow_files=arguments.allow_files,
    )
    if arguments.site is None and not arguments.json:
        print(answer)
        return None
    return answer.to_arrow_table()


def _leave_at_once() -> None:
    """End the process while a step of a query goes on: Python would tear DuckDB down around it, and print what it finds
    there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(REFUSED)


def _above_zero(text: str) -> float:
    """An argument that is an amount."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
