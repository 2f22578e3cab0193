"""SIGTERM and SIGINT while Ray works for a stage: the first asks to stop, the second does not wait.

A handler that raises would raise in the middle of Ray's own code, which swallows the exception or ends the process with
a dump of C++. So within `stop_requests` a signal only leaves a request, and whoever waits for Ray looks at it between
two short waits. `results` does that for a stage that has nothing to save; harvest and train finish what they are at.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

POLL_S = 0.5
"""Seconds between two looks at whether a stop was asked for."""
GOES_ON = "what is committed stays, and the same command goes on from there"


class Stopped(Exception):
    """A stage was asked to stop, and has. What is committed stays."""

    def __init__(self, signum: int, message: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}{message}")
        self.exit_status = 128 + signum


class StopRequest:
    signum: int | None = None
    """The first signal."""
    at_once: bool = False
    """There was a second one."""

    def check(self, doing: str) -> None:
        """Raise Stopped if a stop was asked for. `doing`: what is cut off, as 'planning'."""
        if self.signum is not None:
            raise Stopped(self.signum, f" while {doing}; {GOES_ON}")


@contextmanager
def stop_requests(first: str = "") -> Iterator[StopRequest]:
    """Within the block signals set the request it gives; a third one has its usual effect, whatever the state.

    `first`: what is said, after the signal's name, at the first one; nothing, if not given."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are the main thread's
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if request.signum is None:
            request.signum = signum
            if first:
                say(f"{name}: {first}")
        elif not request.at_once:
            request.at_once = True
            say(f"{name}: stopping at once")
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def results(references: Sequence[Any], doing: str) -> list[Any]:
    """Wait for Ray's references and return their values. Raises what a task raised, and Stopped at a signal, which also
    cancels the tasks."""
    with stop_requests() as stop:
        while True:
            try:
                return list(ray.get(list(references), timeout=POLL_S))
            except GetTimeoutError:
                check_stop(stop, doing, references)


def values_of(stream: Any, doing: str) -> Iterator[Any]:
    """Yield the references that a streaming task gives, as they come. Raises Stopped at a signal, which also cancels
    the task."""
    while True:
        with stop_requests() as stop:
            while not ray.wait([stream], timeout=POLL_S)[0]:
                check_stop(stop, doing, [stream])
        try:
            reference = next(stream)
        except StopIteration:
            return
        yield reference


def check_stop(stop: StopRequest, doing: str, tasks: Sequence[Any]) -> None:
    """Cancel tasks and raise Stopped, if a stop was asked for: else they would go on until the driver ends."""
    if stop.signum is not None:
        for task in tasks:
            ray.cancel(task, force=True)
    stop.check(doing)


def say(event: str) -> None:
    """One line on stderr for one event."""
    print(event, file=sys.stderr, flush=True)
