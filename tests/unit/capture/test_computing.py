"""Units in flight: each has rows of its own, and a unit that fails gives its memory back."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch

from pipeline.capture.contexts import ContextRows
from pipeline.capture.rounding import Rounded
from pipeline.capture.unit import Activations, Buffers, UnitRunner
from pipeline.capture.unit_computer import UnitComputer
from pipeline.sites import Site

SITE, ROWS, THREADS = Site(0, "resid_post"), 4, 1


class NumberedRunner:
    """Stands in for a model: fills the rows of a unit with the number of contexts it was given."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.ran_in: set[str] = set()

    def buffers(self, rows: int) -> Buffers:
        return {SITE: Rounded(torch.zeros(rows, 2))}

    def run(self, contexts: list[ContextRows], rows: int, into: Buffers) -> Activations:
        self.ran_in.add(threading.current_thread().name)
        if not contexts:
            raise ValueError("no contexts")
        into[SITE].values.fill_(len(contexts))
        return Activations({SITE: into[SITE][:rows]}, {}, 0, 0, None)


def computer_of(device: str) -> tuple[UnitComputer, NumberedRunner]:
    runner = NumberedRunner(device)
    return UnitComputer(lambda: cast(UnitRunner, runner), rows=ROWS, units=2, threads=THREADS), runner


def unit(number: int) -> Any:
    return [None] * number


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_units_in_flight_have_rows_of_their_own(device: str) -> None:
    computer, runner = computer_of(device)
    summed_in: set[str] = set()
    together = threading.Barrier(2, timeout=60)

    def summary(computed: Activations) -> float:
        summed_in.add(threading.current_thread().name)
        return float(computed.sites[SITE].values.sum())

    def ask(number: int) -> None:
        with computer.computing(unit(number), ROWS, summary) as (computed, total):
            together.wait()  # both units are computed, and neither is done
            assert total == 2 * ROWS * number
            assert (computed.sites[SITE].values == number).all()

    with ThreadPoolExecutor(2) as callers:
        list(callers.map(ask, range(1, 9)))
    computer.close()
    assert len(runner.ran_in) == len(summed_in) == 1
    assert (runner.ran_in == summed_in) == (device == "cpu")


def test_a_unit_that_fails_gives_its_rows_back() -> None:
    computer, _ = computer_of("cpu")
    for _ in range(3):  # more than there are buffers
        with pytest.raises(ValueError, match="no contexts"), computer.computing(unit(0), ROWS, lambda _: None):
            pass
    with computer.computing(unit(1), 3, lambda _: "summed") as (computed, summary):
        assert (len(computed.sites[SITE]), summary) == (3, "summed")
    assert computer.in_compute_thread(torch.get_num_threads) == THREADS
    computer.close()
