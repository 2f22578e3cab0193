"""Telling an actor that hangs from one that is slow: pure functions of what was heard, by the listener's own clock.

An actor answers with its phase and a counter of steps. Two things show a hang: no answer (the process is stopped,
swapped out, or cut off), and a counter that stands still although there is work. How long a counter may stand still is
learned from the run itself. docs/decisions/0007-commits-and-supervision.md says why the limits are what they are.
"""

import time
from dataclasses import dataclass
from typing import Literal

Phase = Literal["loading", "first unit", "working"]

TIMES_THE_LONGEST = 10
"""A counter may stand still this many times as long as any counter of the run has stood still and then moved."""
LOADING_ANSWER_S = 60.0
"""Least patience for an answer of an actor that imports libraries and loads a model, which can keep the interpreter."""
LONGEST_TICK_S = 5.0


@dataclass(frozen=True)
class Pulse:
    """An actor's answer."""

    phase: Phase
    """"first unit": nothing is finished yet, layers may be compiling."""
    steps: int
    """Batches run, objects written, waits for the store: whatever shows that it is alive."""
    waiting_for: str | None = None
    """Why the store does not answer it, if that is so."""


@dataclass(frozen=True)
class HangLimits:
    hang_s: float
    """Least time without an answer, or without a step, before an actor is taken for hung."""
    load_s: float
    """The same for a step while it loads or compiles; it must answer meanwhile."""


class PulseWatch:
    """What was heard of one actor. Times are seconds of the listener's clock."""

    def __init__(self, now: float):
        self.pulse = Pulse("loading", 0)
        self._answered = now
        self._moved = now

    def heard(self, pulse: Pulse, now: float, *, busy: bool) -> float:
        """Take an answer. Return how long the counter was seen standing still before it moved now; 0 if it did not.

        Only the time over which answers came counts: a process that was stopped and goes on teaches nothing."""
        stood_still = 0.0
        if pulse != self.pulse or not busy:
            if busy and self.pulse.phase == pulse.phase == "working":
                stood_still = self._answered - self._moved
            self._moved = now
        self.pulse, self._answered = pulse, now
        return stood_still

    def given_work(self, now: float) -> None:
        """An actor that had nothing to do got a unit: its steps are expected from now on."""
        self._moved = now

    def hang(self, now: float, limits: HangLimits, longest_still_s: float, *, busy: bool) -> str | None:
        """Why the actor is taken for hung, or None."""
        loading = self.pulse.phase == "loading"
        silent = now - self._answered
        if silent > (max(limits.hang_s, LOADING_ANSWER_S) if loading else limits.hang_s):
            return f"has not answered for {silent:.0f} s"
        still = now - self._moved
        may_take = max(limits.hang_s, TIMES_THE_LONGEST * longest_still_s)
        if self.pulse.phase != "working":
            may_take = max(may_take, limits.load_s)
        if (busy or loading) and still > may_take:
            doing = {"loading": "loading", "first unit": "computing its first unit"}.get(self.pulse.phase, "computing")
            return f"has made no step for {still:.0f} s of {doing}"
        return None


class ListeningClock:
    """Seconds during which we listened. Where this process was stopped itself, or slept with its machine, the clock
    stands still: the answers that came meanwhile are heard before anybody is taken for hung."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        current = time.monotonic()
        self.now += min(current - self._last, LONGEST_TICK_S)
        self._last = current
        return self.now
