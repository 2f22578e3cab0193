"""Handing out units to harvesters until all are committed, whatever happens to the harvesters.

The store, not this process, knows what is done: a run that is started again reads the commits and goes on, and two runs
on one store share the work. Actors come and go between a minimum and a maximum; what a dead or hung one had goes to
others at once, and nothing that it may have half written, or may yet write, does harm. Every event is one line on
stderr. docs/decisions/0007-commits-and-supervision.md goes through what happens between any two steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.errors import InputError
from storage.backends.place import open_place
from storage.errors import CannotWrite, NotAStore, StorageError, StoreGrown, UnitConflict, Unreachable
from storage.format.units import UnitRanges, UnitSet
from storage.harvest.driver_records import Driver
from storage.harvest.failures import Failure
from storage.harvest.harvest import writer_id
from storage.harvest.log import HarvestLog
from workers.cluster.connect import room_for
from workers.cluster.stopping import GOES_ON, Stopped, StopRequest, say, stop_requests
from workers.harvest.failure_limits import FailureLimits, HarvestFailed
from workers.harvest.harvester import HarvesterSetup, UnitResult
from workers.harvest.heartbeat import Heartbeat, News
from workers.harvest.liveness import HangLimits
from workers.harvest.pool import Answer, Worker, WorkerPool, died_by_itself, reason_of
from workers.harvest.schedule import FAILURES_IN_A_ROW, UNITS_IN_FLIGHT, Schedule
from workers.harvest.todo import ToDo
from workers.settings.experiment import ClusterSettings, WorkerRange
from workers.versions import versions

REVIEW_S = 5.0
"""Seconds between two looks at how many workers there should be."""
SILENCE_S = 60.0
"""Seconds between two words about a cluster that has no room."""
LISTEN_S = 0.5
FATAL_FOR_RUN = (CannotWrite, Unreachable, NotAStore, StoreGrown, UnitConflict)
"""Errors that end the run: every unit would fail in the same way, or the store is inconsistent."""


@dataclass(frozen=True)
class RunResult:
    """What one run did."""

    units: int
    """Finished by its own workers."""
    elsewhere: int
    """Committed by other drivers meanwhile."""
    set_aside: list[Failure]


class Supervisor:
    """One run over the units of one harvest that are not committed."""

    def __init__(
        self,
        setup: HarvesterSetup,
        units: UnitSet,
        ranges: UnitRanges,
        *,
        workers: WorkerRange,
        gpus_per_worker: int,
        cluster: ClusterSettings,
    ):
        self.workers, self.cluster, self.setup = workers, cluster, setup
        self.gpus_per_worker = gpus_per_worker
        self.id = writer_id()
        self.schedule = Schedule(ToDo(units, seed=self.id))
        self.committed = units.complement()
        resources: dict[str, float] = {"num_cpus": setup.threads, "num_gpus": gpus_per_worker}
        self.pool = WorkerPool(setup, resources, HangLimits(cluster.hang_s, cluster.load_s))
        place = open_place(setup.store, waiting=partial(self.pool.outage.heard, "driver"))
        self.log = HarvestLog(place, setup.harvest.digest, ranges)
        self.failed_before = set(self.log.failed())
        self.limits = FailureLimits()
        self.rows = self.units = self.elsewhere = 0
        self._reviewed = self._said_no_room = float("-inf")
        self._short_since: float | None = None
        self._news: News | None = None
        self._lost_commit_race = False

    def run(self, on_unit: Callable[[UnitResult], None], on_elsewhere: Callable[[UnitSet], None]) -> RunResult:
        """Call `on_unit` for each unit as it is done, `on_elsewhere` for units that another driver has done. Returns
        when every unit is committed or set aside. Raises HarvestFailed, Stopped, StorageError or InputError."""
        for unit in [u for u in self.failed_before if u in self.committed]:
            self.log.clear_failure(unit)
        driver = Driver(self.id)
        grace_s = self.cluster.grace_s
        in_flight = f"no more units are handed out; those in flight have {grace_s:g} s (once more: at once)"
        try:
            with (
                stop_requests(in_flight) as stop,
                Heartbeat(self.log, driver, self.committed) as heartbeat,
            ):
                while not self.schedule.is_done and stop.signum is None:
                    self._review()
                    self._hand_out()
                    self._step(on_unit)
                    self._share(heartbeat, on_elsewhere)
                if stop.signum is not None:
                    self._stop(stop, on_unit)
        finally:
            self.pool.close()
        return RunResult(self.units, self.elsewhere, self._left_out())

    def _left_out(self) -> list[Failure]:
        """What was set aside, and not committed by another driver since."""
        if not self.schedule.set_aside:
            return []
        committed = self.log.committed()
        return [failure for unit, failure in sorted(self.schedule.set_aside.items()) if unit not in committed]

    # ---- one round

    def _review(self) -> None:
        """Start the workers that are missing, and see whether there have been too few for too long."""
        now = self.pool.clock.now
        if now - self._reviewed < min(REVIEW_S, self.cluster.wait_s) and self.pool.workers:
            return
        self._reviewed = now
        room = self.workers.maximum or room_for(self.setup.threads, self.gpus_per_worker)
        useful = self.schedule.most_useful_workers
        while len(self.pool.workers) < min(room, useful):
            self.pool.start()
        if self.pool.placed >= min(self.workers.minimum, useful):
            self._short_since = None
            return
        if self._short_since is None:
            self._short_since = self._said_no_room = now
        if now - self._said_no_room > SILENCE_S:
            self._said_no_room = now
            say(f"waiting for the cluster to have room for a worker ({self.pool.resources})")
        if now - self._short_since > self.cluster.wait_s:
            raise HarvestFailed(
                f"for {self.cluster.wait_s:g} s the cluster had room for {self.pool.placed} workers of "
                f"{self.pool.resources}, and harvest.workers asks for at least {self.workers.minimum}; what is "
                "committed stays, start again when there is room (cluster.wait_s says how long to wait)"
            )

    def _hand_out(self) -> None:
        """Give every worker one unit before any gets its second."""
        ready = [worker for worker in self.pool.workers.values() if worker.is_ready]
        for load in range(UNITS_IN_FLIGHT):
            for worker in ready:
                has = len(self.schedule.in_flight.get(worker.number, ()))
                if has == load and (unit := self.schedule.give(worker.number)) is not None:
                    self.pool.harvest(worker, unit, was_idle=has == 0)
        if self.schedule.waits_for_another_worker and ready and len(ready) == len(self.pool.workers):
            self._lose(ready[0], "it has failed at what is left", by_itself=False)  # a new process may do better

    def _step(self, on_unit: Callable[[UnitResult], None]) -> None:
        """Hear what has come, then look for workers that hang."""
        for answer in self.pool.listen(LISTEN_S):
            self._settle(answer, on_unit)
        self.pool.ask_pulses()
        for worker, why in self.pool.hung(self._is_busy):
            say(f"a harvester hangs ({worker.writer} {why}) and is replaced; its units go to others")
            self._lose(worker, f"the worker {why}", by_itself=True)

    def _died(self, worker: Worker, error: RayError, *, by_itself: bool) -> None:
        if worker.number in self.pool.workers:
            say(f"a harvester died and is replaced; its units go to another ({reason_of(error)})")
            self._lose(worker, f"the worker died: {reason_of(error)}", by_itself=by_itself)

    def _is_busy(self, worker: Worker) -> bool:
        return worker.number in self.schedule.in_flight

    def _settle(self, answer: Answer, on_unit: Callable[[UnitResult], None]) -> None:
        worker = answer.worker
        try:
            value: Any = ray.get(answer.reference)
        except RayActorError as error:
            self._died(worker, error, by_itself=died_by_itself(error, worker))
        except (StorageError, InputError, RayTaskError) as error:
            self._raised(answer, error)
        except RayError as error:  # by Ray's memory monitor, among others
            self._died(worker, error, by_itself=True)
        else:
            match answer.question:
                case "identity":
                    self.pool.on_scheduled(worker, value)
                case "load":
                    worker.is_ready, worker.writer = True, value
                    self.limits.reset_loads()
                case "pulse":
                    self.pool.on_pulse(worker, value, busy=self._is_busy(worker))
                case "unit":
                    self._finished(worker, value)
                    on_unit(value)

    def _finished(self, worker: Worker, result: UnitResult) -> None:
        self.schedule.finished(worker.number, result.unit)
        self.committed.add(result.unit)
        self.limits.count_settled_unit(finished=True)
        if result.committed:
            self.units += 1
            self.rows += result.rows
        else:  # another driver's worker was faster: it counts there
            self.elsewhere += 1
            self._lost_commit_race = True
        if result.unit in self.failed_before:
            self.log.clear_failure(result.unit)

    def _raised(self, answer: Answer, error: Exception) -> None:
        """A worker raised: over the model, over something all units meet alike, or over this unit."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if answer.question == "load" and isinstance(cause, (StorageError, InputError)):
            raise HarvestFailed(f"a harvester could not begin: {cause}") from cause
        if isinstance(cause, FATAL_FOR_RUN):
            raise cause
        words = f"{type(cause).__name__}: {cause}".strip()
        if answer.question != "unit":
            failed = {"load": "could not load the model"}.get(answer.question, "does not answer as it should")
            say(f"a harvester {failed} and is replaced ({words})")
            self._lose(answer.worker, words, by_itself=True)
            return
        say(f"unit {answer.unit} failed ({words})")
        failure = self.schedule.failed(answer.worker.number, answer.unit, words, answer.worker.writer)
        if failure is not None:
            self._set_aside(failure)
        if self.schedule.is_useless(answer.worker.number):
            self._replace(answer.worker, words)

    def _replace(self, worker: Worker, error: str) -> None:
        """A worker in which one unit after the other raises: it may be the worker."""
        say(f"a harvester failed at {FAILURES_IN_A_ROW} units one after the other and is replaced ({worker.writer})")
        has_worked = self.schedule.has_worked(worker.number)
        self._lose(worker, error, by_itself=False)
        if not has_worked:
            self.limits.count_useless_worker(error)

    def _lose(self, worker: Worker, why: str, *, by_itself: bool) -> None:
        self.pool.give_up(worker)
        for failure in self.schedule.lost(worker.number, why, worker.writer, by_itself=by_itself):
            self._set_aside(failure)
        self._reviewed = float("-inf")  # its place is free: another may begin at once
        if not worker.is_ready and by_itself:
            self.limits.count_failed_load(why)

    def _set_aside(self, failure: Failure) -> None:
        say(f"unit {failure.unit} is set aside after {len(failure.errors)} attempts; the last: {failure.errors[-1]}")
        self.log.record_failure(replace(failure, made_with=dict(versions())))
        self.limits.count_settled_unit(finished=False)

    # ---- the store's other drivers, and the end

    def _share(self, heartbeat: Heartbeat, on_elsewhere: Callable[[UnitSet], None]) -> None:
        heartbeat.driver = replace(
            heartbeat.driver,
            workers=self.pool.placed,
            units_done=self.units,
            rows_done=self.rows,
            in_flight=sorted(unit for units in self.schedule.in_flight.values() for unit in units),
            set_aside=sorted(self.schedule.set_aside),
        )
        if self._lost_commit_race:
            self._lost_commit_race = False
            heartbeat.refresh_now()
        news = heartbeat.news
        if news is self._news or news is None:
            return
        known = {driver.id for driver in self._news.others} if self._news else set()
        for driver in news.others:
            if driver.id not in known:
                say(f"another driver is at work on this harvest ({driver.id}); the units are shared with it")
        for name in known - {driver.id for driver in news.others}:
            say(f"the other driver ({name}) is not at work any more")
        self._news = news
        self.schedule.share({u for d in news.others for u in d.in_flight} if news.others else None)
        committed = news.committed
        if known and not news.others:  # what it has done since we last looked
            committed = self.log.committed()
        if committed is not None:
            self.committed.update(committed)
            done = self.schedule.committed_elsewhere(committed)
            self.elsewhere += len(done)
            if done:
                on_elsewhere(done)

    def _stop(self, stop: StopRequest, on_unit: Callable[[UnitResult], None]) -> None:
        """Let units in flight finish within the grace period; then raise Stopped."""
        assert stop.signum is not None
        deadline = time.monotonic() + self.cluster.grace_s
        while self.schedule.in_flight and not stop.at_once and time.monotonic() < deadline:
            self._step(on_unit)
        left = sum(len(units) for units in self.schedule.in_flight.values())
        raise Stopped(
            stop.signum,
            f": {self.units} units were finished in this run, {left} in flight are abandoned; {GOES_ON}",
        )
