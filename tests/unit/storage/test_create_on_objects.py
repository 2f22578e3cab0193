"""Making a store where nothing can be renamed: a claim first, the root record last.

Processes are killed between any two requests, meet each other, and fail: there is a whole store afterwards, or none."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import corpus_info, plan_table, save_no_tokenizer

from storage.backends.backend import PROBE
from storage.backends.place import Place, open_place
from storage.errors import StorageError
from storage.make.create import CLAIM, Table, create_store, new_store
from storage.store import Store, open_store
from storage.table.root import CorpusInfo

WRITING = ("stage", "create", "remove")


def table(seed: int = 0) -> Table:
    return plan_table(500, num_documents=9, seed=seed)


def info_of(made: Table, plan: str) -> Callable[[str], CorpusInfo]:
    info = corpus_info(made, 64)
    return lambda digest: replace(info(digest), plan={"which": plan})


def make(url: str | Place, seed: int = 0) -> Store:
    """A store of one of several tables, each with a plan of its own."""
    return create_store(url, table(seed), info_of(table(seed), f"plan {seed}"), save_no_tokenizer)


def contents(place: Place) -> dict[str, bytes]:
    """Every object below, with what it holds."""
    found = {}
    for name in place.names():
        below = contents(place / name)
        found |= {f"{name}/{key}": value for key, value in below.items()} if below else {name: (place / name).read()}
    return found


@pytest.fixture
def whole(tmp_path: Path, bucket: str) -> dict[str, bytes]:
    """The objects of a store that was made undisturbed."""
    make(f"{bucket}/undisturbed")
    found = contents(open_place(f"{bucket}/undisturbed"))
    assert CLAIM not in found
    assert "zarr.json" in found
    return found


def dying(place: Place, at: int) -> Place:
    """The place for a process that dies just before its write number `at`, and after which it counts as one."""
    backend: Any = place.backend
    writes = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal writes
            if writes == at:
                os.kill(os.getpid(), signal.SIGKILL)
            writes += 1
            return operation(*arguments)

        return call

    for name in WRITING:
        backend.__dict__[name] = counted(getattr(backend, name))
    return place


def fork_for_each_line() -> None:
    """For each line "url at" of stdin: make a store in a fork that dies at that write, and print its exit status. The
    imports are done once; obstore's threads, which do not survive a fork, are first started in the forks."""
    for line in sys.stdin:
        url, at = line.split()
        child = os.fork()
        if child == 0:
            make(dying(open_place(url), int(at)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture
def make_and_die(bucket: str) -> Iterator[Callable[[str, int], int]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)
    with process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(url: str, at: int) -> int:
            stdin.write(f"{url} {at}\n")
            stdin.flush()
            return int(stdout.readline())

        yield run
        stdin.close()


@pytest.mark.parametrize("at", [3, 14])
def test_a_process_that_is_killed(
    bucket: str, whole: dict[str, bytes], make_and_die: Callable[[str, int], int], at: int
) -> None:
    """At two of its steps: while it claims the place, and while it writes the table."""
    url = f"{bucket}/once-{at}"
    assert make_and_die(url, at) == -signal.SIGKILL
    assert "zarr.json" not in contents(open_place(url))
    make(url)
    assert {k: v for k, v in contents(open_place(url)).items() if not k.startswith(PROBE)} == whole


@pytest.mark.slow  # at every step; the test before is two of them
def test_a_process_that_is_killed_between_any_two_steps(
    bucket: str, whole: dict[str, bytes], make_and_die: Callable[[str, int], int]
) -> None:
    """The same command again makes the whole store from whatever is there; another table is told who is in its way."""
    at, status, states = 0, -signal.SIGKILL, set()
    while status == -signal.SIGKILL:
        url = f"{bucket}/{at}"
        status = make_and_die(url, at)
        there = set(contents(open_place(url)))
        if "zarr.json" in there:
            states.add("store")
            assert open_store(url).num_rows == 500
            assert there - {CLAIM} == whole.keys()
        elif there - {name for name in there if name.startswith(PROBE)}:
            states.add("claimed")
            with pytest.raises(StorageError, match=r"a store of another table is being made at .*, by .*-"):
                make(url, seed=1)
            make(url)
            assert {k: v for k, v in contents(open_place(url)).items() if not k.startswith(PROBE)} == whole
        else:
            states.add("nothing")
            make(url, seed=1)
        at += 3 if 8 < at < 20 else 1  # the objects of the table, of which each is like the next
    assert status == 0
    assert states == {"nothing", "claimed", "store"}
    assert at > 20


def test_twins_make_one_store(bucket: str, whole: dict[str, bytes]) -> None:
    """Each believes in the same table, so each may finish; what they write is the same."""
    url, made, errors = f"{bucket}/twins", [], []

    def run() -> None:
        try:
            made.append(make(open_place(url)))
        except StorageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made
    assert all("there is a store at" in error for error in errors), errors  # it came when all was done
    assert contents(open_place(url)) == whole


def test_of_two_tables_the_second_is_told_who_holds_the_place(bucket: str, whole: dict[str, bytes]) -> None:
    url = f"{bucket}/contested"
    first = table()
    with new_store(url, {"which": "plan 0"}) as draft:
        files = draft.begin_table(first.sizes)
        with pytest.raises(StorageError, match=f"is being made at {url}, by .*; if that process is dead remove"):
            make(url, seed=1)
        assert (open_place(url) / CLAIM).exists()
        files.write_chunks("token", 0, first.columns["token"])
        twin = make(url)
        assert twin.num_rows == 500
        info = info_of(first, "plan 0")
        draft.finish(info(twin.info.corpus_digest))
    assert contents(open_place(url)) == whole


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("a broken line"), Interrupted(), MemoryError(), OSError("no such file")])
def test_an_error_in_the_middle_leaves_nothing(bucket: str, error: BaseException) -> None:
    url = f"{bucket}/left"

    def fail(folder: Path) -> None:
        raise error

    made = table()
    with pytest.raises(type(error)):
        create_store(url, made, info_of(made, "plan 0"), fail)
    assert open_place(bucket).names() == []
    assert make(url, seed=1).num_rows == 500


def test_an_error_does_not_take_a_twins_objects(bucket: str, whole: dict[str, bytes]) -> None:
    """The twin that claimed later goes on where the first one failed; one that has finished keeps its store."""
    url = f"{bucket}/twin"
    made = table()
    before: dict[str, bytes] = {}

    def meet_a_twin_and_fail() -> None:
        with new_store(url, {"which": "plan 0"}) as draft:
            draft.begin_table(made.sizes)
            with new_store(url, {"which": "plan 0"}) as twin:
                twin.begin_table(made.sizes)
                before.update(contents(open_place(url)))
            (open_place(url) / CLAIM).write(before[CLAIM])  # the twin is still at it: its claim is there
            raise ValueError("mine alone")

    with pytest.raises(ValueError, match="mine alone"):
        meet_a_twin_and_fail()
    assert contents(open_place(url)) == before
    make(url)
    assert contents(open_place(url)) == whole


def test_a_twin_whose_table_was_removed_makes_no_store(bucket: str) -> None:
    url = f"{bucket}/removed"
    made = table()

    def remove_all(folder: Path) -> None:
        (open_place(url) / CLAIM).remove()
        (open_place(url) / "corpus").remove()

    with pytest.raises(StorageError, match="failed and removed what was written; run the command again"):
        create_store(url, made, info_of(made, "plan 0"), remove_all)
    assert "zarr.json" not in open_place(url).names()


def test_a_place_that_holds_something_is_refused(bucket: str) -> None:
    (open_place(bucket) / "mine" / "thesis.txt").write(b"mine")
    with pytest.raises(StorageError, match=r"is not an empty folder \(it holds thesis.txt\)"):
        make(f"{bucket}/mine")
    with pytest.raises(StorageError, match=r"is not an empty folder \(it holds mine\)"):
        make(bucket)
    assert list(contents(open_place(bucket))) == ["mine/thesis.txt"]


def test_a_probe_that_a_killed_process_left_is_in_nobodys_way(bucket: str) -> None:
    (open_place(bucket) / "acts" / f"{PROBE}0123").write(b"first")
    assert make(f"{bucket}/acts").num_rows == 500


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_places_go_to_other_processes(scheme: str, bucket: str) -> None:
    place = open_place(bucket if scheme == "s3" else "memory://here") / "a"
    place.write(b"x")
    sent = pickle.loads(pickle.dumps(place))
    assert sent == place
    assert sent.read() == b"x"


if __name__ == "__main__":
    fork_for_each_line()
