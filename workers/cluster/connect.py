"""Connecting to Ray: our own for one run on this machine, or a cluster that is there."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.errors import InputError
from workers.cluster.environment import values_of
from workers.cluster.stopping import GOES_ON, Stopped

CONNECT_S = 10
DASHBOARD = ("http://", "https://")
"""What the address of a dashboard begins with, unlike that of a cluster."""


@contextmanager
def connected(address: str, *, cpus: int = 0, env: Sequence[str] = ()) -> Iterator[None]:
    """Within the block Ray is up. `local` starts it on this machine with at least `cpus` CPUs and ends it afterwards.
    `env`: variables of this process's environment that workers elsewhere get too.

    Inside a Ray job, whose cluster is in RAY_ADDRESS, `local` means that cluster: the same spec runs in both places.
    A RAY_ADDRESS that is a dashboard's, http://head:8265, is for submitting jobs and says nothing of a cluster to join.
    Raises InputError when there is no cluster at `address` or a variable is not set, and Stopped when SIGTERM comes
    meanwhile.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    joined = _joined()
    if address.startswith(DASHBOARD) or (address == "auto" and not joined and "RAY_ADDRESS" in os.environ):
        given = address if address != "auto" else f"auto, which is RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise InputError(
            f"cluster.address: expected the address of a Ray cluster, as head:6379, auto or local, and found {given}: "
            "that is a dashboard, to which `granary submit` sends jobs"
        )
    if is_started_here(address):
        # RAY_ENABLE_UV_RUN_RUNTIME_ENV etc. stay as they are; the dashboard costs seconds and is not used here.
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False, "address": "local"}
        # Ray's workers are at niceness 15, where anything else on the machine starves them; this run is waited for.
        options["_system_config"] = {"worker_niceness": 0}
    else:
        options["address"] = "auto" if address == "local" else address
        if env and not is_in_job():
            options["runtime_env"] = {"env_vars": values_of(env)}
    if ":" in str(options["address"]):  # Ray itself would try for minutes, and print warnings of its own meanwhile
        host, _, port = options["address"].rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise InputError(f"cluster.address: no Ray cluster at {address!r}: {error}") from None
    # Of errors that several workers raise one is told, in a sentence; Ray would print the others with their traces.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        _init(options)
    except ConnectionError as error:
        raise InputError(f"cluster.address: no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def is_started_here(address: str) -> bool:
    """Return whether a run with this cluster.address starts Ray itself, so that its workers are on this machine."""
    return address == "local" and not _joined()


def is_in_job() -> bool:
    """Return whether this process is the driver of a submitted job, whose environment its workers are given by Ray."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _joined() -> str:
    """The cluster in RAY_ADDRESS; empty where there is none, or a dashboard's address, which is no cluster's."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address.startswith(DASHBOARD) else address


def _init(options: dict[str, Any]) -> None:
    """Start or join Ray, and leave SIGTERM to whoever had it.

    Ray puts in a handler that calls sys.exit, and where that comes up inside a wait for Ray the process aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise Stopped(signal.SIGTERM, f" while Ray was started; {GOES_ON}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def require_gpus(gpus: int, what: str) -> None:
    """Raise InputError when Ray was started on this machine alone and has fewer GPUs: waiting would be for ever.

    Every stage that takes GPUs asks here before it starts a worker. `what`: the key of the spec that asks for them."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < gpus and len(ray.nodes()) == 1:
        raise InputError(
            f"{what} asks for {gpus} GPU(s) and this Ray cluster of one machine has {found}; set it to 0 for CPU"
        )


def room_for(threads: int, gpus_per_worker: int) -> int:
    """How many workers the cluster has room for now; at least one."""
    total = ray.cluster_resources()
    by_cpu = int(total.get("CPU", 0)) // threads
    return max(1, min(by_cpu, int(total.get("GPU", 0)) // gpus_per_worker) if gpus_per_worker else by_cpu)
