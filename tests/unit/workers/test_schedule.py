"""Which worker gets which unit, and who is to blame. No Ray."""

import time
import tracemalloc
from dataclasses import dataclass, field
from itertools import count

import pytest

from storage.format.units import UnitSet
from workers.harvest.schedule import ATTEMPTS, UNITS_IN_FLIGHT, Schedule
from workers.harvest.todo import ToDo


def schedule_of(units: int) -> Schedule:
    return Schedule(ToDo(UnitSet(units, range(units))))


def fill(schedule: Schedule, worker: int) -> list[int]:
    """Give a worker all that it gets now."""
    given = []
    while (unit := schedule.give(worker)) is not None:
        given.append(unit)
    return given


def test_units_come_in_order_and_each_once() -> None:
    schedule = schedule_of(5)
    assert [fill(schedule, worker) for worker in range(4)] == [[0, 1], [2, 3], [4], []]
    schedule.finished(0, 1)
    assert not schedule.is_done
    for worker, unit in ((0, 0), (1, 2), (1, 3), (2, 4)):
        schedule.finished(worker, unit)
    assert schedule.is_done
    assert schedule.set_aside == {}


def test_units_of_a_lost_node_go_to_others_first() -> None:
    schedule = schedule_of(10)
    assert fill(schedule, 0) == [0, 1]
    assert schedule.lost(0, "its node has died", "w0", by_itself=False) == []
    assert fill(schedule, 1) == [0, 1]
    assert fill(schedule, 2) == [2, 3]


@dataclass
class Simulation:
    """Workers, each good or broken, replaced as the supervisor replaces them. A good one takes `ticks` a unit."""

    schedule: Schedule
    poison: frozenset[int]
    ticks: int = 20
    done: set[int] = field(default_factory=set)
    replaced: int = 0

    def run(self, broken: list[bool]) -> None:
        numbers = count()
        workers = {next(numbers): is_broken for is_broken in broken}
        clock = 0
        while not self.schedule.is_done:
            clock += 1
            assert clock < 100_000, "it does not end"
            for worker, is_broken in list(workers.items()):
                if worker not in self.schedule.in_flight:
                    fill(self.schedule, worker)
                if not (units := self.schedule.in_flight.get(worker)) or (clock % self.ticks and not is_broken):
                    continue
                if is_broken or units[0] in self.poison:
                    self.schedule.failed(worker, units[0], "error", f"w{worker}")
                else:
                    self.done.add(units[0])
                    self.schedule.finished(worker, units[0])
                if self.schedule.is_useless(worker):
                    self._replace(workers, worker, next(numbers))
            if self.schedule.waits_for_another_worker and not any(fill(self.schedule, w) for w in workers):
                self._replace(workers, next(iter(workers)), next(numbers))

    def _replace(self, workers: dict[int, bool], old: int, new: int) -> None:
        """By a process on the same machine."""
        self.schedule.lost(old, "replaced", "", by_itself=False)
        workers[new] = workers.pop(old)
        self.replaced += 1


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("poison", [[0], [7], [199], [0, 1], [3, 4, 5, 150, 198, 199]])
def test_units_that_raise_are_set_aside_after_three_workers_and_the_rest_goes_on(
    workers: int, poison: list[int]
) -> None:
    run = Simulation(schedule_of(200), frozenset(poison))
    run.run([False] * workers)
    assert sorted(run.schedule.set_aside) == poison
    assert run.done == set(range(200)) - set(poison)
    for failure in run.schedule.set_aside.values():
        assert failure.errors == ["error"] * ATTEMPTS
        assert len(set(failure.writers)) == ATTEMPTS  # never twice the same


@pytest.mark.parametrize("broken", [1, 3])
def test_a_broken_worker_sets_nothing_aside(broken: int) -> None:
    """It fails at once at whatever it gets, and so do the processes that replace it."""
    run = Simulation(schedule_of(200), frozenset())
    run.run([False, *[True] * broken])
    assert run.done == set(range(200))
    assert run.schedule.set_aside == {}


def test_a_unit_that_raised_and_that_others_committed_is_forgotten() -> None:
    schedule = schedule_of(2)
    fill(schedule, 0)
    schedule.finished(0, 1)
    schedule.failed(0, 0, "error", "w0")
    assert schedule.waits_for_another_worker
    assert list(schedule.committed_elsewhere(UnitSet(2, [0]))) == [0]
    assert schedule.is_done


def test_a_poison_unit_is_found_among_those_it_died_with() -> None:
    """Unit 3 kills whoever computes it. It is blamed, and no other, whatever was in the same workers."""
    schedule = schedule_of(8)
    done, worker, deaths = set(), 0, 0
    while not schedule.is_done:
        units = fill(schedule, worker) or schedule.in_flight.get(worker, [])
        assert units, "nothing is handed out"
        if 3 in units:
            deaths += 1
            schedule.lost(worker, "died", f"w{worker}", by_itself=True)
            worker += 1
        else:
            for unit in list(units):
                schedule.finished(worker, unit)
                done.add(unit)
    assert list(schedule.set_aside) == [3]
    assert done == set(range(8)) - {3}
    assert deaths <= 1 + ATTEMPTS  # once in company, then alone


def test_a_suspect_is_given_alone_and_nobody_gets_a_second_unit_before() -> None:
    schedule = schedule_of(9)
    assert fill(schedule, 0) == [0, 1]
    assert fill(schedule, 1) == [2, 3]
    schedule.lost(0, "died", "w0", by_itself=True)
    assert schedule.give(1) is None  # full
    schedule.finished(1, 2)
    assert schedule.give(1) is None  # its place is for a suspect, once it is empty
    assert fill(schedule, 2) == [0]
    schedule.finished(1, 3)
    assert fill(schedule, 1) == [1]
    assert fill(schedule, 3) == [4, 5]  # no suspects are left
    schedule.finished(2, 0)
    assert fill(schedule, 2) == [6, 7]


def test_a_unit_that_others_have_committed_is_not_handed_out_again() -> None:
    schedule = schedule_of(6)
    assert fill(schedule, 0) == [0, 1]
    schedule.lost(0, "died", "w0", by_itself=True)
    assert list(schedule.committed_elsewhere(UnitSet(6, [0, 1, 2]))) == [0, 1, 2]
    assert fill(schedule, 1) == [3, 4]


def test_two_drivers_take_different_units() -> None:
    units = UnitSet(2000, range(2000))
    first, second = ToDo(units, "a"), ToDo(units, "b")
    first.share([])
    second.share([])
    mine = {first.take() for _ in range(100)}
    second.share(unit for unit in mine if unit is not None)
    theirs = {second.take() for _ in range(100)}
    assert len(mine | theirs) == 200


def test_what_others_have_in_flight_is_left_to_them_until_they_are_gone() -> None:
    todo = ToDo(UnitSet(4, range(4)))
    todo.share([1, 3])
    assert {todo.take(), todo.take()} == {0, 2}
    assert todo.take() is None
    assert len(todo) == 2
    todo.share(None)
    assert {todo.take(), todo.take()} == {1, 3}
    assert todo.take() is None


@pytest.mark.parametrize("shared", [False, True])
def test_a_unit_costs_the_same_among_ten_thousand_and_a_million(shared: bool) -> None:
    """Handing out and finishing, with 64 workers: microseconds a unit, a few bytes a unit."""

    def seconds(total: int, handed_out: int = 20_000) -> float:
        schedule = schedule_of(total)
        if shared:
            schedule.share([5, 6])
        flying = {worker: fill(schedule, worker) for worker in range(64)}
        started = time.perf_counter()
        for number in range(handed_out // 2):
            worker = number % 64
            if flying[worker]:
                schedule.finished(worker, flying[worker].pop(0))
                flying[worker] += fill(schedule, worker)
        return time.perf_counter() - started

    small = min(seconds(20_000) for _ in range(3))
    large = min(seconds(1_000_000) for _ in range(3))
    assert large < 2 * small
    tracemalloc.start()
    schedule_of(1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_a_worker_has_at_most_two_units() -> None:
    assert len(fill(schedule_of(10), 0)) == UNITS_IN_FLIGHT == 2
