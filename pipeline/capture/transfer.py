"""Keeping a GPU busy: rows go to the host beside the next forward pass, and the time it still waits is measured.

On CPU the same calls copy at once and measure nothing.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BATCHES_IN_FLIGHT = 2
"""Batches whose rows may be on their way: each holds device memory until it has arrived."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for what the device is doing (a copy from ordinary memory would)."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class RowCopies:
    """Rows on their way to host memory. One thread at a time; memory on the host should be pinned."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._in_flight: deque[list[torch.cuda.Event]] = deque()

    def put(self, rows: Tensor, targets: Sequence[Tensor]) -> None:
        """Copy consecutive parts of `rows` into `targets` (host memory), which together are as long as it.

        `rows` must own its memory: what a forward pass returned may be overwritten by the next one.
        """
        parts = rows.split([len(target) for target in targets])
        if rows.device.type != "cuda":
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
            return
        if rows.device not in self._streams:
            self._streams[rows.device] = torch.cuda.Stream(rows.device)
        stream = self._streams[rows.device]
        stream.wait_stream(torch.cuda.current_stream(rows.device))  # until the rows are computed
        with torch.cuda.stream(stream):
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part, non_blocking=True)
        rows.record_stream(stream)  # or else the allocator would give their memory to the next batch before it is read

    def end_batch(self) -> None:
        """Mark the end of a batch; wait for an earlier one if too many are on their way."""
        events = []
        for stream in self._streams.values():
            event = torch.cuda.Event(blocking=True)  # waits without taking a core from the writing threads
            event.record(stream)
            events.append(event)
        self._in_flight.append(events)
        if len(self._in_flight) > BATCHES_IN_FLIGHT:
            self._wait_for(self._in_flight.popleft())

    def finish(self) -> None:
        """Wait until everything has arrived."""
        while self._in_flight:
            self._wait_for(self._in_flight.popleft())

    def _wait_for(self, events: list[torch.cuda.Event]) -> None:
        for event in events:
            event.synchronize()


class ForwardClock:
    """How much of its time a GPU spends in forward passes, by events on its own time line: reading them costs nothing
    while it works. With several GPUs, the one that gets the tokens, to which the end of a pass returns."""

    def __init__(self, device: torch.device):
        self._device = device
        self._previous_end: torch.cuda.Event | None = None
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within the block a forward pass is queued."""
        if self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(self._device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        yield
        end.record(stream)
        self._passes.append((start, end))

    def idle_share(self) -> float | None:
        """Share of the time outside forward passes, from the end of the last pass before the previous call (the first
        time: from the first pass) to the last pass. None on CPU. To be called when all passes are over."""
        if not self._passes:
            return None
        last_end = self._passes[-1][1]
        last_end.synchronize()
        total = (self._previous_end or self._passes[0][0]).elapsed_time(last_end)
        busy = sum(start.elapsed_time(end) for start, end in self._passes)
        self._previous_end, self._passes = last_end, []
        return max(0.0, 1 - busy / total) if total else 0.0
