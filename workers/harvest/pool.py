"""The actors of a run: starting them, listening to them, and getting rid of those that are taken for dead.

Every call to an actor is remembered under Ray's reference to its answer, so that one `ray.wait` hears them all.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.backends.retry import Outage
from workers.harvest.actor import HarvesterActor, Identity, kill_process
from workers.harvest.harvester import HarvesterSetup
from workers.harvest.liveness import HangLimits, ListeningClock, PulseWatch

Question = Literal["identity", "load", "pulse", "unit"]
PULSE_S = 1.0
EXTERNAL_DEATH = re.compile(r"SIGTERM|node has died|node was (terminated|drained|preempted)|preemption", re.IGNORECASE)
"""Deaths that Ray explains by something outside the actor."""


@dataclass(eq=False)
class Worker:
    """An actor, as the supervisor knows it."""

    number: int
    actor: Any
    identity: Identity | None = None
    """None until it has a place."""
    writer: str = "?"
    is_ready: bool = False
    """It holds the model."""
    watch: PulseWatch | None = None
    asked_at: float = 0.0
    answered: bool = True


@dataclass(frozen=True)
class Answer:
    """Something to be heard: `reference` holds the value, or the error, of what a worker was asked."""

    worker: Worker
    question: Question
    unit: int
    reference: Any


@dataclass
class WorkerPool:
    """The workers of one run."""

    setup: HarvesterSetup
    resources: dict[str, float]
    limits: HangLimits
    workers: dict[int, Worker] = field(default_factory=dict)
    clock: ListeningClock = field(default_factory=ListeningClock)
    outage: Outage = field(default_factory=Outage)
    longest_still_s: float = 0.0
    """The longest that a counter stood still in this run, and then moved."""
    _asked: dict[Any, tuple[Worker, Question, int]] = field(default_factory=dict)
    _kills: list[Any] = field(default_factory=list)
    _started: int = 0

    @property
    def placed(self) -> int:
        """Workers that have a place in the cluster."""
        return sum(worker.identity is not None for worker in self.workers.values())

    def start(self) -> None:
        actor = HarvesterActor.options(**self.resources).remote()
        worker = Worker(self._started, actor)
        self._started += 1
        self.workers[worker.number] = worker
        self._ask(actor.identity.remote(), worker, "identity")

    def harvest(self, worker: Worker, unit: int, *, was_idle: bool) -> None:
        if was_idle and worker.watch is not None:
            worker.watch.given_work(self.clock.now)
        self._ask(worker.actor.harvest_unit.remote(unit), worker, "unit", unit)

    def listen(self, timeout_s: float) -> Iterator[Answer]:
        """What has come by now; waits for the first of it."""
        references = list(self._asked)
        if not references:  # of nothing, ray.wait does not wait
            time.sleep(timeout_s)
            self.clock.tick()
            return
        done, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if done:  # all that is there, so that the cost of asking is shared
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            if reference in self._asked:  # its worker may have been given up over an earlier one
                yield Answer(*self._asked.pop(reference), reference)
        self.clock.tick()

    def on_scheduled(self, worker: Worker, identity: Identity) -> None:
        """It runs: let it load the model, and listen to its pulse."""
        worker.identity = identity
        worker.watch = PulseWatch(self.clock.now)
        self._ask(worker.actor.load.remote(self.setup), worker, "load")

    def ask_pulses(self) -> None:
        for worker in self.workers.values():
            if worker.watch is not None and worker.answered and self.clock.now - worker.asked_at >= PULSE_S:
                worker.asked_at, worker.answered = self.clock.now, False
                self._ask(worker.actor.pulse.remote(), worker, "pulse")

    def on_pulse(self, worker: Worker, pulse: Any, *, busy: bool) -> None:
        worker.answered = True
        self.outage.heard(f"worker {worker.number}", pulse.waiting_for)
        assert worker.watch is not None
        self.longest_still_s = max(self.longest_still_s, worker.watch.heard(pulse, self.clock.now, busy=busy))

    def hung(self, is_busy: Any) -> list[tuple[Worker, str]]:
        """Workers that are taken for hung, and why. `is_busy(worker)`: whether it has a unit."""
        found = []
        for worker in self.workers.values():
            if worker.watch is not None:
                why = worker.watch.hang(self.clock.now, self.limits, self.longest_still_s, busy=bool(is_busy(worker)))
                if why is not None:
                    found.append((worker, why))
        return found

    def give_up(self, worker: Worker) -> None:
        """Forget a worker, and end it if it is there after all."""
        del self.workers[worker.number]
        self.outage.heard(f"worker {worker.number}", None)
        self._asked = {reference: asked for reference, asked in self._asked.items() if asked[0] is not worker}
        ray.kill(worker.actor)
        if worker.identity is not None:
            here = NodeAffinitySchedulingStrategy(worker.identity.node, soft=False)
            self._kills.append(kill_process.options(scheduling_strategy=here).remote(worker.identity))
        if self._kills:
            _, self._kills = ray.wait(self._kills, num_returns=len(self._kills), timeout=0)

    def close(self) -> None:
        for worker in self.workers.values():
            ray.kill(worker.actor)
        self.workers.clear()
        self._asked.clear()

    def _ask(self, reference: Any, worker: Worker, question: Question, unit: int = -1) -> None:
        self._asked[reference] = (worker, question, unit)


def died_by_itself(error: RayActorError, worker: Worker) -> bool:
    """Return whether nothing outside explains a worker's death, as far as Ray tells.

    A worker that is only cut off may have taken its machine down with its unit; while it loads that is nobody's fault.
    """
    if isinstance(error, ActorUnavailableError) and not worker.is_ready:
        return False
    return EXTERNAL_DEATH.search(str(error)) is None


def reason_of(error: BaseException) -> str:
    """Why an actor died, in a line: the last thing that Ray says, without its advice."""
    text = " ".join(str(error).split())
    for mark in ("Worker exit detail: ", "The actor is dead because ", "reason: "):
        if mark in text:
            text = text.rpartition(mark)[2]
            break
    return text.partition(" Some common causes")[0].partition(" There are some")[0][:200] or type(error).__name__
