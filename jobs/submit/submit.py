"""Jobs on a running Ray cluster: submit a spec, follow it, list, read and stop jobs.

A job carries the code that submitted it, as its working directory, and the spec with its paths made absolute and its
variables replaced; so the
cluster needs Granary's dependencies but not Granary, and runs the very version that submitted. Of this machine's
environment nothing goes along but the variables that `cluster.env` names, in Ray's runtime environment: the spec and
the job's metadata hold their names alone. A job dies with its cluster and knows nothing of its progress, which is in
the store: the same spec submitted again goes on from there.

The driver runs on the head node, where it plans (tokenises), makes anchors and hands out work: the head must see the
store, the corpus and the model, as every worker must.
"""

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from jobs.ending import status_of
from jobs.spec.variables import escaped
from jobs.submit.addresses import ADDRESS_VARIABLE, ClusterError, dashboard_address
from storage.format.records import Record
from workers.cluster.environment import values_of
from workers.versions import versions

if TYPE_CHECKING:
    from jobs.spec.spec import Spec

SOURCE = Path(__file__).parents[2]
PACKAGES = ("pipeline", "storage", "workers", "jobs")
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Ray puts ids into URLs and file names."""
STOP_WAIT_S = 15
"""Ray gives a job 3 s (RAY_JOB_STOP_WAIT_TIME_S) between SIGTERM and SIGKILL; then its status has to arrive."""
POLL_S = 0.25


def submit(spec: "Spec", *, stage: str, job_id: str | None, address: str | None, grow: bool = False) -> str:
    """Submit one stage of a spec (or `run`, all of them) and return the job's id. Raises ClusterError, and InputError
    for a variable of `cluster.env` that is not set here."""
    if grow and stage not in ("harvest", "run"):
        raise ClusterError(f"--grow belongs to the stages harvest and run, not to {stage}")
    job = job_id or _new_id(spec.store)
    if not JOB_ID.fullmatch(job):
        raise ClusterError(f"a job's id is made of letters, digits and _.- after a first letter or digit, not {job!r}")
    variables = values_of(spec.cluster.env)
    with TemporaryDirectory(prefix="granary-job-") as folder, _job_server(address) as (client, url):
        _write_working_dir(Path(folder), spec)
        try:
            client.submit_job(
                entrypoint=f"python -m jobs.cli {stage} spec.yaml{' --grow' if grow else ''}",
                submission_id=job,
                runtime_env={"working_dir": folder, **({"env_vars": variables} if variables else {})},
                metadata={"granary": versions()["granary-activations"], "stage": stage, "store": spec.store},
                # The driver mostly waits. If it held a CPU, a cluster of one CPU would have no room for a worker.
                entrypoint_num_cpus=0,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            raise ClusterError(
                f"the job id {job} is taken on the cluster at {url}, and Ray never gives one out twice: "
                "choose another with --id, or leave it out"
            ) from None
    return job


def follow(job_id: str, address: str | None) -> int:
    """Print a job's log until the job ends; return 0 if it succeeded, else 1. Raises ClusterError."""
    from aiohttp import ClientError

    with _job_server(address) as (client, url):
        _details(client, url, job_id)
        try:
            asyncio.run(_print_log(client, job_id))
        except KeyboardInterrupt as interrupt:
            print(f"\n{job_id} goes on without this terminal; end it with: granary stop {job_id}", file=sys.stderr)
            return status_of(interrupt)
        except (RuntimeError, ClientError):
            pass  # the connection broke; whether that means anything for the job, the next request tells
        details = _details(client, url, job_id)
    if not details.status.is_terminal():
        raise ClusterError(
            f"the log of {job_id} broke off, the job is {details.status}; go on with: granary logs {job_id} --follow"
        )
    if details.status == "SUCCEEDED":
        return 0
    reason = (details.message or "").partition("\n")[0].partition(", last available logs")[0]
    print(f"granary: {job_id} ended as {details.status}: {reason or 'Ray gives no reason'}", file=sys.stderr)
    return 1


def logs(job_id: str, address: str | None) -> str:
    """What a job has printed so far. Raises ClusterError."""
    with _job_server(address) as (client, url):
        _details(client, url, job_id)
        return str(client.get_job_logs(job_id))


def jobs_record(address: str | None) -> list[Record]:
    """The Granary jobs of a cluster, ended ones too, oldest first; times are ISO 8601 in UTC. Raises ClusterError."""
    with _job_server(address) as (client, _):
        found = [details for details in client.list_jobs() if "granary" in (details.metadata or {})]
    return [
        {
            "id": details.submission_id,
            "status": str(details.status),
            "stage": details.metadata.get("stage"),
            "store": details.metadata.get("store"),
            "started": _time(details.start_time),
            "ended": _time(details.end_time),
            "granary": details.metadata["granary"],
        }
        for details in sorted(found, key=lambda details: details.start_time or 0)
    ]


def jobs_text(record: list[Record]) -> str:
    """The jobs as a table."""
    if not record:
        return "no Granary jobs on this cluster"
    columns = ("id", "status", "stage", "started", "ended", "store")
    lines = [columns, *(tuple(str(job[column] or "-") for column in columns) for job in record)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def stop(job_id: str, address: str | None) -> str:
    """End a job, and say in a sentence how that went. Raises ClusterError for a job that is not there."""
    with _job_server(address) as (client, url):
        if _details(client, url, job_id).status.is_terminal() or not client.stop_job(job_id):
            return f"{job_id} had already ended: {_details(client, url, job_id).status}"
        deadline = time.monotonic() + STOP_WAIT_S
        while not (status := _details(client, url, job_id).status).is_terminal():
            if time.monotonic() > deadline:
                return f"asked {job_id} to stop; after {STOP_WAIT_S} s it is still {status}"
            time.sleep(POLL_S)
    if status != "STOPPED":
        return f"{job_id} ended before it could be stopped: {status}"
    return f"stopped {job_id}; what it committed stays, and the same spec submitted again goes on from there"


def _new_id(store: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(store).name).strip("-.") or "store"
    return f"granary-{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


def _write_working_dir(folder: Path, spec: "Spec") -> None:
    """What the job needs besides the dependencies: the packages, granary.py and the spec."""
    left_out = shutil.ignore_patterns("__pycache__", "demo")  # no job runs the demo, whose model is most of the bytes
    for package in PACKAGES:
        shutil.copytree(SOURCE / package, folder / package, ignore=left_out)
    shutil.copy(SOURCE / "granary.py", folder)
    # In a job `auto` is the cluster that runs it. The spec's own address is meant for the machine that it was read on.
    resolved = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"address": "auto"})})
    # The job reads the spec again, in another environment: what is in it now is text.
    text = yaml.safe_dump(escaped(resolved.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    (folder / "spec.yaml").write_text(text, encoding="utf-8")


async def _print_log(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _details(client: Any, url: str, job: str) -> Any:
    """Ray's JobDetails of a Granary job. Others on the cluster are none of our business: they count as not there."""
    details = None
    if JOB_ID.fullmatch(job):
        try:
            details = client.get_job_info(job)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
    if details is None or "granary" not in (details.metadata or {}):
        raise ClusterError(f"the cluster at {url} has no Granary job {job!r}; see those it has with: granary jobs")
    return details


def _time(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


@contextmanager
def _job_server(address: str | None) -> Iterator[tuple[Any, str]]:
    """A client of a cluster's job server, and its address. What fails within the block becomes a ClusterError."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    from requests import RequestException

    url = dashboard_address(address)
    try:
        with _variable(ADDRESS_VARIABLE, url):  # Ray prefers this one, and RAY_ADDRESS, to the address it is given
            client = JobSubmissionClient(url)
        with _quiet():
            yield client, url
    except AuthenticationError:
        raise ClusterError(
            f"the cluster at {url} wants a token and did not get the right one: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN unless the cluster's token is in ~/.ray/auth_token"
        ) from None
    except BrokenPipeError:
        raise  # the reader of our own output went away
    except (ConnectionError, RequestException, ClientError):
        raise ClusterError(
            f"no Ray cluster answers at {url}: start one with `ray start --head`, or say where one is with --address "
            f"or {ADDRESS_VARIABLE}"
        ) from None
    except RuntimeError as error:  # the client's word for every answer that is not a success, often a traceback
        reason = str(error).strip().rpartition("\n")[2].rstrip(".")
        raise ClusterError(f"the job server at {url} could not do that: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's INFO lines about uploads and connections."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
