"""The process that measures. It is apart from the one that keeps the results, so that a fault, a hang or a card that
answers nothing any more costs the measurement it happened in and no other.
"""

import multiprocessing
import os
import platform
import shutil
import subprocess
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.plan import Case, CopyCase, HarvestCase, StepCase

START_S = 120.0
"""Most seconds until the process answers: importing torch and transformers, and waking the card."""
END_S = 10.0
"""Seconds for it to end by itself."""
COMPILERS = ("cc", "gcc", "clang", "g++", "c++")


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement."""

    status: str
    """measured, failed, or not run."""
    figures: dict[str, Any]
    reason: str = ""
    """Why there are no figures."""
    details: str = ""
    """The traceback, where there is one."""


class Worker:
    """The measuring process, as the process that keeps the results sees it. Started when needed, and again after a
    failure."""

    def __init__(self, threads: int, round_s: float):
        """`round_s`: see `rounds.in_turn`."""
        self._settings = (threads, round_s)
        self._process: Any = None
        self._connection: Any = None
        self.machine: dict[str, Any] = {}

    def start(self, seconds: float = START_S) -> Outcome | None:
        """Start the process, and learn what it runs on. Returns an outcome if it does not answer in time."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self._settings))
        self._process.start()
        theirs.close()
        answer = self._answer(min(seconds, START_S))
        if isinstance(answer, Outcome):
            return answer
        self.machine = answer
        return None

    def measure(self, case: Case, seconds: float) -> Outcome:
        """Measure within `seconds`, the start of a process included, or give up."""
        ends = time.monotonic() + seconds
        if self._process is None and (failed := self.start(seconds)) is not None:
            return failed
        self._connection.send(case)
        outcome = self._answer(max(0.0, ends - time.monotonic()))
        assert isinstance(outcome, Outcome)
        if outcome.status == "failed":
            self.close()  # what it left on the card, or of the card, is not to be trusted
        return outcome

    def close(self) -> None:
        """End the process: by itself when it hears that the connection ends, if it still listens."""
        if self._process is not None:
            self._connection.close()
            self._process.join(END_S)
            self._process.kill()
            self._process.join()
            self._process = None

    def _answer(self, seconds: float) -> Any:
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            reason = f"no answer within {seconds:.0f} s"
        except EOFError:
            self._process.join()
            reason = f"the measuring process ended with exit status {self._process.exitcode}"
        self._process.kill()
        self.close()
        return Outcome("failed", {}, reason)


# ---- in the measuring process


def serve(connection: Connection, threads: int, round_s: float) -> None:
    """Say what this machine is, then measure one case after another, until the connection ends."""
    import torch

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measurer = Measurer(device, round_s)
    connection.send(machine(device))
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        connection.send(measurer.outcome(case))


class Measurer:
    """Measures cases on a device; keeps the model that the last one had."""

    def __init__(self, device: Any, round_s: float):
        self.device = device
        self.round_s = round_s
        self._model: tuple[Any, Any] = (None, None)

    def outcome(self, case: Case) -> Outcome:
        """Measure a case. Whatever goes wrong is an outcome, with its reason."""
        import torch

        from benchmarks.gpu.copies import NotHere

        started = time.perf_counter()
        try:
            figures = self.measure(case)
        except NotHere as error:
            return Outcome("not run", {}, str(error))
        except torch.OutOfMemoryError as error:
            return Outcome("failed", {}, f"out of memory: {_first_line(error)}", traceback.format_exc())
        except Exception as error:  # noqa: BLE001 - the reason is the result, and the other cases are still to come
            return Outcome("failed", {}, f"{type(error).__name__}: {_first_line(error)}", traceback.format_exc())
        return Outcome("measured", {**figures, "took_s": time.perf_counter() - started})

    def measure(self, case: Case) -> dict[str, Any]:
        """Return the figures of a case. Raises NotHere where this machine lacks what it takes."""
        from benchmarks.gpu.copies import NotHere, measure_copy
        from benchmarks.gpu.harvesting import measure_harvest
        from benchmarks.gpu.steps import measure_step

        if isinstance(case, HarvestCase):
            if case.compiled:
                if not any(map(shutil.which, COMPILERS)):
                    raise NotHere(f"no C compiler here ({', '.join(COMPILERS)}), which compiled layers need")
                import torch._dynamo

                torch._dynamo.reset()  # the code of the cases before would be tried first for every layer
            return measure_harvest(case, self._model_of(case), self.device, self.round_s)
        self._model = (None, None)
        if isinstance(case, StepCase):
            return measure_step(case, self.device, self.round_s)
        assert isinstance(case, CopyCase)
        return measure_copy(case, self.device, self.round_s)

    def _model_of(self, case: HarvestCase) -> Any:
        from benchmarks.gpu.llama import random_llama

        if self._model[0] != case.shape:
            self._model = (None, None)  # before the next one: two may not fit
            self._model = (case.shape, random_llama(case.shape, self.device))
        return self._model[1]


def machine(device: Any) -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "card": None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "card_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return found


def processor() -> str:
    """Return the processor's name, as the kernel has it."""
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123 - a file of the kernel's
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def driver() -> str | None:
    """Return the version of the card's driver, from nvidia-smi; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip().splitlines()[0] if said.strip() else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
