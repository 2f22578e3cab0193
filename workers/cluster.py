"""Connecting to Ray: our own for one run on this machine, or a cluster that is there."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.errors import InputError

CONNECT_S = 10


@contextmanager
def connected(address: str, *, cpus: int = 0) -> Iterator[None]:
    """Within the block Ray is up. `local` starts it on this machine with at least `cpus` CPUs and ends it afterwards.

    Inside a Ray job, whose cluster is in RAY_ADDRESS, `local` means that cluster: the same spec runs in both places.
    Raises InputError when there is no cluster at `address`.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local" and "RAY_ADDRESS" not in os.environ:
        # RAY_ENABLE_UV_RUN_RUNTIME_ENV etc. stay as they are; the dashboard costs seconds and is not used here.
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False, "address": "local"}
        # Ray's workers are at niceness 15, where anything else on the machine starves them; this run is waited for.
        options["_system_config"] = {"worker_niceness": 0}
    else:
        options["address"] = "auto" if address == "local" else address
    if ":" in str(options["address"]):  # Ray itself would try for minutes, and print warnings of its own meanwhile
        host, _, port = options["address"].rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise InputError(f"cluster.address: no Ray cluster at {address!r}: {error}") from None
    # Of errors that several workers raise one is told, in a sentence; Ray would print the others with their traces.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise InputError(f"cluster.address: no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def require_gpus(gpus: int, what: str) -> None:
    """Raise InputError when Ray was started on this machine alone and has fewer GPUs: waiting would be for ever."""
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
