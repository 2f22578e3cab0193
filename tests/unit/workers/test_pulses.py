"""Which actor hangs, as a function of what was heard of it and when."""

import pytest

from workers.harvest.liveness import LOADING_ANSWER_S, HangLimits, ListeningClock, Pulse, PulseWatch

LIMITS = HangLimits(hang_s=120, load_s=1800)


def watched(*heard: tuple[float, str, int]) -> tuple[PulseWatch, float]:
    """A busy actor of which (time, phase, steps) was heard, and the longest that it stood still."""
    watch, longest = PulseWatch(0.0), 0.0
    for now, phase, steps in heard:
        longest = max(longest, watch.heard(Pulse(phase, steps), now, busy=True))  # type: ignore[arg-type]
    return watch, longest


def test_an_actor_that_answers_and_makes_steps_does_not_hang() -> None:
    watch, longest = watched(*((float(t), "working", t) for t in range(1000)))
    assert watch.hang(1000.0, LIMITS, longest, busy=True) is None


def test_silence_is_a_hang_in_every_phase() -> None:
    working, _ = watched((10, "working", 1))
    assert working.hang(129, LIMITS, 0, busy=True) is None
    assert working.hang(131, LIMITS, 0, busy=True) == "has not answered for 121 s"
    assert working.hang(131, LIMITS, 0, busy=False) == "has not answered for 121 s"  # it will get no unit either
    loading, _ = watched((10, "loading", 0))
    assert loading.hang(131, LIMITS, 0, busy=False) == "has not answered for 121 s"


def test_loading_has_more_patience_where_the_limit_is_short() -> None:
    loading, _ = watched((0, "loading", 0))
    quick = HangLimits(hang_s=4, load_s=1800)
    assert loading.hang(LOADING_ANSWER_S, quick, 0, busy=False) is None
    assert loading.hang(LOADING_ANSWER_S + 1, quick, 0, busy=False) is not None


@pytest.mark.parametrize(
    ("phase", "limit", "doing"),
    [("loading", 1800, "loading"), ("first unit", 1800, "computing its first unit"), ("working", 120, "computing")],
)
def test_a_counter_that_stands_still_while_it_answers(phase: str, limit: float, doing: str) -> None:
    watch, longest = watched(*((float(t), phase, 7) for t in range(int(limit) + 2)))
    assert watch.hang(limit, LIMITS, longest, busy=True) is None
    assert watch.hang(limit + 1, LIMITS, longest, busy=True) == f"has made no step for {limit + 1} s of {doing}"


def test_an_actor_without_work_makes_no_steps() -> None:
    watch = PulseWatch(0.0)
    for now in range(500):
        watch.heard(Pulse("working", 7), now, busy=False)
    assert watch.hang(500, LIMITS, 0, busy=False) is None
    watch.given_work(500)
    watch.heard(Pulse("working", 7), 600, busy=True)
    assert watch.hang(600, LIMITS, 0, busy=True) is None
    watch.heard(Pulse("working", 7), 621, busy=True)
    assert watch.hang(621, LIMITS, 0, busy=True) is not None


def test_a_slow_model_raises_the_limit() -> None:
    """Its batches take 60 s, during which it answers: ten times that may pass."""
    slow = [(float(t), "working", t // 60) for t in range(300)]
    watch, longest = watched(*slow)
    assert longest == 59
    still = [(300.0 + t, "working", 5) for t in range(590)]
    for now, _, steps in still:
        watch.heard(Pulse("working", steps), now, busy=True)
    assert watch.hang(889, LIMITS, longest, busy=True) is None
    watch.heard(Pulse("working", 5), 900, busy=True)
    assert watch.hang(900, LIMITS, longest, busy=True) is not None


def test_a_process_that_was_stopped_and_goes_on_teaches_nothing() -> None:
    _, longest = watched((0, "working", 1), (1, "working", 2), (101, "working", 3), (102, "working", 4))
    assert longest == 0


def test_the_clock_stands_still_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 5000.0, 5001.0])
    monkeypatch.setattr("workers.harvest.liveness.time.monotonic", lambda: next(times))
    clock = ListeningClock()
    assert [clock.tick() for _ in range(3)] == [1.0, 6.0, 7.0]
