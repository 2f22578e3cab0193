"""Computing one unit after another, while the units before it are summarised and written.

The forward passes run in one thread with a fixed number of torch threads; whoever asks for a unit waits for it and then
owns its rows until done. The memory is the model and the rows of the units in flight, made once, whatever the corpus.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

import torch

from pipeline.capture.contexts import ContextRows
from pipeline.capture.unit import Activations, Buffers, UnitRunner

P = ParamSpec("P")
T = TypeVar("T")


class UnitComputer:
    """A `UnitRunner` with the threads that run it and the buffers of the units in flight."""

    def __init__(self, load: Callable[[], UnitRunner], *, rows: int, units: int, threads: int):
        """`load` is called in the computing thread. `rows`: most rows of a unit. `units`: units in flight, each of
        which is asked for by a thread of its own. `threads`: torch threads of the computing thread."""
        self._compute = _one_thread("compute", threads)
        self.runner = self._compute.submit(load).result()
        # A GPU runs the next unit meanwhile. On CPU that would be two computations on the same cores, each slower.
        on_gpu = self.runner.device.type != "cpu"
        self._summaries = _one_thread("summaries", threads) if on_gpu else None
        self._free: SimpleQueue[Buffers] = SimpleQueue()
        for _ in range(units):
            self._free.put(self.runner.buffers(rows))

    @contextmanager
    def computing(
        self, contexts: Sequence[ContextRows], rows: int, summarise: Callable[[Activations], T]
    ) -> Iterator[tuple[Activations, T]]:
        """Compute a unit of `rows` rows and its summary. Within the block its rows belong to the caller."""
        buffers = self._free.get()
        try:
            yield self._run(contexts, rows, summarise, buffers)
        finally:
            self._free.put(buffers)

    def in_compute_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` between two units, with the threads that units are computed with."""
        return self._compute.submit(work, *args, **kwargs).result()

    def close(self) -> None:
        """End the threads. Buffers are freed with the last reference to this object."""
        for pool in (self._compute, self._summaries):
            if pool is not None:
                pool.shutdown()

    def _run(
        self, contexts: Sequence[ContextRows], rows: int, summarise: Callable[[Activations], T], buffers: Buffers
    ) -> tuple[Activations, T]:
        if self._summaries is not None:
            computed = self._compute.submit(self.runner.run, contexts, rows, buffers).result()
            return computed, self._summaries.submit(summarise, computed).result()

        def run_and_summarise() -> tuple[Activations, T]:
            computed = self.runner.run(contexts, rows, buffers)
            return computed, summarise(computed)

        return self._compute.submit(run_and_summarise).result()


def _one_thread(name: str, torch_threads: int) -> ThreadPoolExecutor:
    # OpenMP counts threads per caller, so the number is set in the thread itself.
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(torch_threads,))
