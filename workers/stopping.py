"""SIGTERM and SIGINT while a harvest runs: the first asks to stop, the second does not wait."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class HarvestStopped(Exception):
    """The run was asked to stop. What is committed stays."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + signum


class StopRequest:
    signum: int | None = None
    """The first signal."""
    at_once: bool = False
    """There was a second one."""


@contextmanager
def stop_requests(grace_s: float) -> Iterator[StopRequest]:
    """Within the block signals set the request it gives; a third one has its usual effect, whatever the state."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are the main thread's
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name  # nothing is raised here: it would come up in the middle of Ray's own code
        if request.signum is None:
            request.signum = signum
            say(f"{name}: no more units are handed out; those in flight have {grace_s:g} s (once more: at once)")
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


def say(event: str) -> None:
    """One line on stderr for one event."""
    print(event, file=sys.stderr, flush=True)
