"""Threads for input and output: a pool of each size, shared by all of a process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Sequence[T], threads: int = 4) -> list[R]:
    """Map in the I/O threads; every call has ended when this returns or raises the first error."""
    if len(items) == 1:
        return [function(items[0])]
    futures = [_pool(threads).submit(function, item) for item in items]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="granary-io")
