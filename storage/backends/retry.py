"""Waiting for a store that does not answer, or no longer lets us in.

A request that fails in a way that may pass (the network, a 5xx, credentials that have expired and will be renewed) is
made again with growing pauses, up to `PATIENCE_S` in all; then it ends in one Unreachable. What a request writes is
whole and always the same, so making it again is safe; `create` reads back what is there (see `storage.backends.place`).

What has never worked is a mistake in the URL or the environment, for which nobody should wait: it ends after
`FIRST_PATIENCE_S`, or at once where we are not let in.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from storage.errors import Unreachable

T = TypeVar("T")

PATIENCE_S = 600.0
"""Longer than a busy partition's SlowDown or the renewal of a role's credentials; shorter than a night.
GRANARY_PATIENCE_S in the environment changes it."""
FIRST_PATIENCE_S = 6.0
"""Until something has worked. Six attempts, or two that nobody answers."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 20.0
SAID_AFTER_S = 5.0

Verb = Literal["read", "write"]
Waiting = Callable[[str | None], None]
"""Told what is being waited for, once, and None when the store answers again. Called from any thread."""


class Passing(Exception):
    """A failure that may pass. Carries the sentence for people; never a header or a key."""


class Denied(Passing):
    """We are not allowed to do this; it may pass only where we were allowed to before."""


def patience_s() -> float:
    return float(os.environ.get("GRANARY_PATIENCE_S", PATIENCE_S))


def announce(failure: str | None) -> None:
    """The `Waiting` of a process whose stderr a person sees."""
    text = "going on: the store answers again" if failure is None else f"waiting: {failure}"
    print(text, file=sys.stderr, flush=True)


class Outage:
    """A store that does not answer, as the processes and threads of one run see it: said when the first of them waits,
    and once more when none does any longer. Who waits says so after `SAID_AFTER_S`, and is heard later still: word that
    comes so soon after the end is of the outage that is over."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}
        self._is_said = False
        self._over = float("-inf")
        self._lock = threading.Lock()

    def heard(self, who: str, failure: str | None) -> None:
        """`who` waits because of `failure`, or (None) does not wait."""
        with self._lock:
            if failure is None:
                self._waiting.pop(who, None)
            else:
                self._waiting[who] = failure
            if self._waiting and not self._is_said and time.monotonic() - self._over > SAID_AFTER_S:
                self._is_said = True
                announce(next(iter(self._waiting.values())))
            elif not self._waiting and self._is_said:
                self._is_said, self._over = False, time.monotonic()
                announce(None)


class Patience:
    """How long one backend of this process waits for what, given what has worked so far. Safe to use from threads."""

    def __init__(self, waiting: Waiting | None = None):
        """`waiting`: who is told instead of stderr. A process that gives one has been started for a store that was
        found in order, so it waits from its first request on."""
        self._waiting = waiting
        self._worked: set[Verb] = set()
        self._waits: set[Verb] = set()
        self._lock = threading.Lock()

    @property
    def has_worked(self) -> bool:
        """Return whether waiting makes sense: the store has answered this process, or the one that started it."""
        return bool(self._worked) or self._waiting is not None

    def call(self, request: Callable[[], T], verb: Verb) -> T:
        """Call `request` until it does not raise Passing. Raises Unreachable when patience is over."""
        started, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                answer = request()
            except FileNotFoundError:
                self._answered("read")
                raise
            except Passing as failure:
                waited, limit = time.monotonic() - started, self._limit(failure, verb)
                if waited + pause > limit:
                    again = (
                        f"; tried again for {waited:.0f} s. What is committed stays: put that right and run the same "
                        "command again"
                    )
                    raise Unreachable(f"{failure}{again if limit and self.has_worked else ''}") from failure.__cause__
                if waited > SAID_AFTER_S and self.has_worked:
                    self._waits_for(verb, str(failure))
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._answered(verb)
                return answer

    def _limit(self, failure: Passing, verb: Verb) -> float:
        if isinstance(failure, Denied) and verb not in self._worked and self._waiting is None:
            return 0
        return patience_s() if self.has_worked else min(FIRST_PATIENCE_S, patience_s())

    def _answered(self, verb: Verb) -> None:
        self._worked.add(verb)
        if verb in self._waits:
            self._waits_for(verb, None)

    def _waits_for(self, verb: Verb, failure: str | None) -> None:
        """Tell who waits that it begins or ends; one outage is told once, by whichever thread sees it first."""
        with self._lock:
            before = bool(self._waits)
            (self._waits.discard if failure is None else self._waits.add)(verb)
            if bool(self._waits) == before:
                return
        (self._waiting or announce)(failure)
