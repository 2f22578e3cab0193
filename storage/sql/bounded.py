"""Running one call of DuckDB's within a time and a growth of memory.

Invariant: when `Bounds.run` returns or raises, the caller goes on within the time it gave, and the process took no
more memory for the call than it gave. DuckDB's own limit of memory knows nothing of strings, lists and Python objects,
so the operating system counts (RLIMIT_DATA, on Linux): what asks for more is refused, and DuckDB says so.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from storage.errors import StorageError

GRACE_S = 1.0
"""How long a call that was interrupted may go on. DuckDB looks for interrupts between steps, and one may be long."""
KNOCK_S = 0.05
OUT_OF_MEMORY = (duckdb.OutOfMemoryException, pa.ArrowMemoryError, MemoryError)


class StepLeftBehind(StorageError):
    """A query did not end in time, and the step it is in goes on in a thread of its own."""


@dataclass(frozen=True)
class Bounds:
    """What one query may take."""

    timeout_s: float = 30.0
    """Seconds of work, not of waiting between two fetches."""
    memory_bytes: int = 2**30
    """By how much the process may grow while the query works; the store's own tables are not counted."""

    def __post_init__(self) -> None:
        for name, value in (("timeout_s", self.timeout_s), ("memory_bytes", self.memory_bytes)):
            if not value > 0:
                raise StorageError(f"a query's {name} must be above 0, not {value}")

    def run(self, call: Callable[[], Any], interrupt: Callable[[], None], spent_s: float = 0.0) -> Any:
        """Return what `call` gives, in a thread of its own. Raises what it raises, or StorageError at a limit.

        `interrupt` asks it to end. `spent_s`: what the query has worked already. A step that cannot be interrupted
        (the distance of two long strings) is left behind: its thread ends when the step does.
        """
        outcome = _Outcome(call)
        with _HEAP.growth(self.memory_bytes):
            thread = threading.Thread(target=outcome.work, name="granary-query", daemon=True)
            thread.start()
            try:
                on_time = outcome.done.wait(max(self.timeout_s - spent_s, 0.0))
            except BaseException:  # Ctrl-C: nobody waits for the result any more
                _knock(outcome, interrupt, GRACE_S)
                raise
            if not on_time:
                _knock(outcome, interrupt, GRACE_S)
        if not outcome.done.is_set():  # nobody waits for it, but it must not go on after the step it is in
            threading.Thread(target=_knock, args=(outcome, interrupt, float("inf")), daemon=True).start()
        if not on_time and (outcome.error is not None or not outcome.done.is_set()):
            raise (StorageError if outcome.done.is_set() else StepLeftBehind)(
                f"the query did not end within {self.timeout_s:g} s: ask for less, or give it more time "
                "(--timeout SECONDS; in Python timeout_s)"
            ) from outcome.error
        if _is_out_of_memory(outcome.error):
            raise StorageError(
                f"the query needs more than {self.memory_bytes / 2**30:.3g} GiB of memory: ask for less, or give it "
                "more (--memory GIB; in Python memory_bytes)"
            ) from outcome.error
        if outcome.error is not None:
            raise outcome.error
        return outcome.value


def _is_out_of_memory(error: BaseException | None) -> bool:
    in_arrow = isinstance(error, OSError) and "Out of Memory Error" in str(
        error
    )  # DuckDB's, out of a reader of batches
    return in_arrow or isinstance(error, OUT_OF_MEMORY)


class _Outcome:
    """What a call gave or raised, once `done` is set."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def work(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
            self.error = error
        self.done.set()


def _knock(outcome: _Outcome, interrupt: Callable[[], None], grace_s: float) -> None:
    """Interrupt until the call has ended or the grace is over: an interrupt between two steps of DuckDB's is lost."""
    end = time.monotonic() + grace_s
    while not outcome.done.is_set() and time.monotonic() < end:
        interrupt()
        outcome.done.wait(KNOCK_S)


class _HeapLimit:
    """The process's limit on its data while queries work. All queries that work at once share what they may take."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._granted: list[int] = []
        self._base = 0
        self._before: tuple[int, int] = (-1, -1)

    @contextmanager
    def growth(self, num_bytes: int) -> Iterator[None]:
        """Within the block the process's data may grow by `num_bytes`. Systems other than Linux have no such limit."""
        if sys.platform != "linux":
            yield
            return
        with self._lock:
            if not self._granted:
                import resource

                self._base, self._before = _data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)
            self._granted.append(num_bytes)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._granted.remove(num_bytes)
                self._set()

    def _set(self) -> None:
        import resource

        soft, hard = self._before
        wanted = self._base + sum(self._granted)
        if self._granted and (soft == resource.RLIM_INFINITY or wanted < soft):
            soft = wanted
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """What the process has in data now, as the kernel compares it with RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmData")


_HEAP = _HeapLimit()
"""One for the process, as the limit is the process's."""
