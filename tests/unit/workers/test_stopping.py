"""Signals without a process of their own: what is left as it was around Ray, and how an interrupt gets its status."""

import os
import signal
import sys
from typing import Any

import pytest

from jobs.ending import INTERRUPTED, TERMINATED, Terminated, status_of, terminable
from workers.cluster import connect as cluster
from workers.cluster.connect import connected
from workers.cluster.stopping import Stopped, stop_requests


def exit_as_ray_does(signum: int, frame: object) -> None:
    sys.exit(signum)


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ray's start is replaced by one that puts in Ray's handler; the signals of the list come meanwhile."""
    signals: list[int] = []

    def init(**options: Any) -> None:
        signal.signal(signal.SIGTERM, exit_as_ray_does)
        for signum in signals:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return signals


def test_sigterm_stays_with_the_command(starting: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connected("local"):
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_ray_starts(starting: list[int]) -> None:
    starting.append(signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM while Ray was started; ") as stopped, connected("local"):
        pass
    assert stopped.value.exit_status == TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_that_ray_raises_for_sigterm_is_sigterms() -> None:
    """Ray raises KeyboardInterrupt for whatever a handler raises inside its own waits."""

    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Terminated) as terminated, terminable():
        wait()
    assert status_of(terminated.value) == TERMINATED
    assert status_of(KeyboardInterrupt()) == INTERRUPTED


def test_requests(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with stop_requests("it ends soon") as stop:
        stop.check("waiting")  # nothing was asked for
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signum, stop.at_once) == (signal.SIGINT, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.signum, stop.at_once) == (signal.SIGINT, True)
        with pytest.raises(Stopped, match=r"^stopped by SIGINT while waiting; what is committed stays") as stopped:
            stop.check("waiting")
    assert stopped.value.exit_status == INTERRUPTED
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
    assert capsys.readouterr().err == "SIGINT: it ends soon\nSIGTERM: stopping at once\n"
