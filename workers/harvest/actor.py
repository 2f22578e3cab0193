"""The actor around a harvester. It is there, and answers, before it imports or loads anything large."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from workers.harvest.liveness import Phase, Pulse
from workers.harvest.schedule import UNITS_IN_FLIGHT

if TYPE_CHECKING:
    from workers.harvest.harvester import HarvesterSetup, UnitResult


@dataclass(frozen=True)
class Identity:
    """Which process an actor is."""

    node: str
    """Ray's id of its node."""
    pid: int
    started: str
    """When the process began, in the words of its system: a pid alone may be another's by now."""


class HarvesterProcess:
    """Holds a `Harvester`. Two units at once, and the pulse beside them in a thread of its own."""

    def __init__(self) -> None:
        self._phase: Phase = "loading"
        self._steps = 0
        self._counting = threading.Lock()
        self._waiting_for: str | None = None

    def identity(self) -> Identity:
        return Identity(ray.get_runtime_context().get_node_id(), os.getpid(), process_started(os.getpid()))

    def load(self, setup: "HarvesterSetup") -> str:
        """Load the model; return the writer's id. Raises InputError or StorageError."""
        from workers.harvest.harvester import Harvester  # torch: seconds, during which the pulse is to be answered

        self._harvester = Harvester(setup, on_step=self._step, waiting=self._wait)
        self._phase = "first unit"
        return self._harvester.writer

    def harvest_unit(self, unit: int) -> "UnitResult":
        result = self._harvester.harvest_unit(unit)
        self._phase = "working"
        return result

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Pulse:
        if self._waiting_for is not None:  # a store that is down is no hang of the worker
            self._step()
        return Pulse(self._phase, self._steps, self._waiting_for)

    def _wait(self, what: str | None) -> None:
        self._waiting_for = what

    def _step(self) -> None:
        with self._counting:
            self._steps += 1


HarvesterActor = ray.remote(max_restarts=0, max_concurrency=UNITS_IN_FLIGHT, concurrency_groups={"pulse": 1})(
    HarvesterProcess
)


@ray.remote(num_cpus=0, max_retries=0)
def kill_process(identity: Identity) -> None:
    """SIGKILL a process of the node that this runs on: Ray's own kill is a request, which a stopped process does not
    hear."""
    if process_started(identity.pid) == identity.started:
        os.kill(identity.pid, 9)


def process_started(pid: int) -> str:
    """A word that tells this process from an earlier one with its pid; "" if it is not there or nothing tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
