"""Running functions here or as Ray tasks, by the same calls.

A handle is what a call will give, or has given: a reference of Ray's, or the value itself.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ray

from workers.cluster.stopping import results, values_of

Handle = Any


class Tasks(Protocol):
    """Where functions are run. Handles among the arguments are given to the function as their values."""

    def share(self, value: Any) -> Handle:
        """A handle of a value that many calls are given: it is sent once."""
        ...

    def call(self, function: Callable[..., Sequence[Any]], *arguments: Any, returns: int) -> list[Handle]:
        """Begin a call of a function that returns `returns` values; a handle for each."""
        ...

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Handle]:
        """Begin a call of a generator function; the handles of its values, as they come."""
        ...

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        """Wait for values. Raises what the function raised."""
        ...


class Here:
    """In this process, one call after the other."""

    def share(self, value: Any) -> Handle:
        return value

    def call(self, function: Callable[..., Sequence[Any]], *arguments: Any, returns: int) -> list[Handle]:
        values = list(function(*arguments))
        assert len(values) == returns
        return values

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Handle]:
        return function(*arguments)

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        return list(handles)


class OnRay:
    """As Ray tasks, each with one CPU. Values are in Ray's object store, which spills to disk what does not fit.

    A signal ends the waiting for them with `Stopped`. `doing`: what it then says was cut off."""

    def __init__(self, doing: str):
        self.doing = doing

    def share(self, value: Any) -> Handle:
        return ray.put(value)

    def call(self, function: Callable[..., Sequence[Any]], *arguments: Any, returns: int) -> list[Handle]:
        remote = ray.remote(num_cpus=1, num_returns=returns)(_single_threaded)
        handles = remote.remote(function, *arguments)
        return handles if returns > 1 else [handles]

    def stream(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Handle]:
        remote = ray.remote(num_cpus=1, num_returns="streaming")(_single_threaded_stream)
        return values_of(remote.remote(function, *arguments), self.doing)

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        return results(handles, self.doing)


def _single_threaded(function: Callable[..., Any], *arguments: Any) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a task on every core already; read at each call
    values = function(*arguments)
    return values if len(values) > 1 else values[0]


def _single_threaded_stream(function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield from function(*arguments)
