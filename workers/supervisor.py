"""Handing out units to harvesters until all are committed, whatever happens to the harvesters.

A unit is in one of three places: still to do, in flight in one actor, or committed in the store. When an actor dies,
its units go back to the front of the queue and another actor takes its place; nothing that it may have half written is
readable, and computing a unit again gives the same bytes. The store, not this process, knows what is done: a run that
is started again reads the commits and goes on.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.errors import InputError
from storage.errors import StorageError
from workers.harvester import UNITS_IN_FLIGHT, HarvesterActor, HarvesterSetup, UnitResult

FAILURES_PER_UNIT = 3
"""Times a unit may fail by its own error before the run gives up and names it."""
DEATHS_IN_A_ROW = 5
"""Actors that may die one after the other, with no unit done in between, before the run gives up."""
SILENCE_S = 60
"""Seconds without any event after which a run that has no worker yet says what it is waiting for."""


class HarvestFailed(RuntimeError):
    """The harvest cannot go on. What is committed stays."""


class Supervisor:
    """One run over the units of one harvest. `run` returns when all units are committed; `close` ends the actors."""

    def __init__(self, setup: HarvesterSetup, units: Iterable[int], *, workers: int, gpus_per_worker: int):
        self.to_do = deque(units)
        self.workers = workers
        self.setup = setup
        self.resources = {"num_cpus": setup.threads, "num_gpus": gpus_per_worker}
        self.actors: list[Any] = []
        self.starting: dict[Any, Any] = {}  # reference of __ray_ready__ -> actor
        self.in_flight: dict[Any, tuple[Any, int]] = {}  # reference of harvest_unit -> (actor, unit)
        self.failures: Counter[int] = Counter()
        self.deaths = 0

    def run(self, on_unit: Callable[[UnitResult], None]) -> None:
        """Call `on_unit` for each unit as it is done. Raises HarvestFailed, StorageError or InputError."""
        while self.to_do or self.in_flight:
            self._start_actors()
            self._hand_out()
            done, _ = ray.wait([*self.in_flight, *self.starting], num_returns=1, timeout=SILENCE_S)
            for reference in done:
                if reference in self.starting:
                    self._settle_start(reference)
                else:
                    self._settle_unit(reference, on_unit)
            if not done and not self.actors:
                print(f"waiting for the cluster to have room for a worker ({self.resources})", file=sys.stderr)

    def close(self) -> None:
        for actor in [*self.actors, *self.starting.values()]:
            ray.kill(actor)

    def _start_actors(self) -> None:
        useful = len(self.to_do) + len({id(actor) for actor, _ in self.in_flight.values()})
        while len(self.actors) + len(self.starting) < min(self.workers, useful):
            actor = HarvesterActor.options(**self.resources).remote(self.setup)
            self.starting[actor.__ray_ready__.remote()] = actor

    def _hand_out(self) -> None:
        """Give every actor one unit before any gets its second."""
        for load in range(UNITS_IN_FLIGHT):
            for actor in self.actors:
                if self.to_do and sum(a is actor for a, _ in self.in_flight.values()) <= load:
                    unit = self.to_do.popleft()
                    self.in_flight[actor.harvest_unit.remote(unit)] = (actor, unit)

    def _settle_start(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
        except RayActorError as error:
            self._count_death(error)
        else:
            self.actors.append(actor)

    def _settle_unit(self, reference: Any, on_unit: Callable[[UnitResult], None]) -> None:
        actor, unit = self.in_flight.pop(reference)
        try:
            result: UnitResult = ray.get(reference)
        except RayActorError as error:
            self.to_do.appendleft(unit)
            if actor in self.actors:  # its other unit may have told us already
                self.actors.remove(actor)
                ray.kill(actor)  # an actor that is only unreachable must not come back
                self._count_death(error)
        except (StorageError, InputError):
            raise  # a full disk or a missing file fails every unit alike
        except RayTaskError as error:
            self.failures[unit] += 1
            if self.failures[unit] >= FAILURES_PER_UNIT:
                raise HarvestFailed(
                    f"unit {unit} failed {FAILURES_PER_UNIT} times; the last: {error.cause!r}"
                ) from error
            self.to_do.append(unit)
        else:
            self.deaths = 0
            on_unit(result)

    def _count_death(self, error: RayActorError) -> None:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if any(name in str(error) for name in (InputError.__name__, StorageError.__name__)):
            raise HarvestFailed(f"a harvester could not begin: {reason[-1].partition('Error: ')[2] or reason[-1]}")
        self.deaths += 1
        if self.deaths >= DEATHS_IN_A_ROW:
            raise HarvestFailed(
                f"{self.deaths} harvesters died one after the other without finishing a unit (out of memory?); the "
                f"last: {reason[0]}. Committed units are safe; start again to go on"
            )
        print(f"a harvester died and is replaced; its units go to another ({reason[0]})", file=sys.stderr)
