"""Timing a subject and its limits in turn, so that each ratio is of the same minute; medians over the rounds."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 3
MOST_S = 6.0
"""No round is begun after so long: a slow case must not use up the time of the cases after it."""

Timed = Callable[[int], float]
"""Repeats a piece of work a given number of times, and returns the seconds that took."""


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(work: Callable[[], object], device: torch.device) -> Timed:
    """Return a clock for `work`, from when the device is idle to when it is idle again."""

    def timed(times: int) -> float:
        synchronise(device)
        started = time.perf_counter()
        for _ in range(times):
            work()
        synchronise(device)
        return time.perf_counter() - started

    return timed


def in_turn(all_timed: Mapping[str, Timed], round_s: float) -> dict[str, list[float]]:
    """Return the seconds of one repetition, for each and in each round.

    Each is run once before the rounds, to find how many repetitions fill one. What a very first run would make (code,
    memory that is mapped) is to be there before.
    """
    times = {name: max(1, round(round_s / max(1e-6, timed(1)))) for name, timed in all_timed.items()}
    taken: dict[str, list[float]] = {name: [] for name in all_timed}
    started = time.perf_counter()
    for number in range(ROUNDS):
        if number and time.perf_counter() - started > MOST_S:
            break
        for name, timed in all_timed.items():
            taken[name].append(timed(times[name]) / times[name])
    return taken


def ratio(seconds: list[float], of: list[float]) -> float:
    """Return the median over the rounds of how many times `of` fits into `seconds`."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))
