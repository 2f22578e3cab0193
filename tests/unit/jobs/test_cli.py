"""The command line: help with examples, JSON for scripts, progress on a terminal only, exit statuses."""

import argparse
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from lab import Lab, snapshot
from ray.exceptions import RayTaskError

from jobs.cli.main import build_parser, main
from jobs.ending import INTERRUPTED, REFUSED, TERMINATED, Terminated, refusal
from jobs.progress import ProgressLine, counted, duration, size
from jobs.spec.spec import SpecError
from storage.errors import StorageError
from storage.store import Store

ROOT = Path(__file__).parents[3]
(VERBS,) = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))


# ---- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert f"\nexample:\n  granary {verb}" in out
    example = out.rpartition("example:\n  ")[2].strip()
    for action in VERBS[verb]._actions:
        assert action.help
        if not action.option_strings:  # each positional argument has a word in the example
            assert len(example.split()) > 2


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for verb in VERBS:
        assert f"\n    {verb} " in out
    assert "start with: granary demo" in out


def test_without_a_command_it_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert alone == capsys.readouterr()
    assert alone.err == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"granary {version('granary-activations')}\n"


@pytest.mark.parametrize("command", [["harvst", "spec.yaml"], ["harvest"], ["status", "a", "b"]])
def test_a_command_that_is_not_one(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "usage: granary" in err
    assert ": error: " in err


def without(modules: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that cannot import the modules."""
    blocked = "import sys\n" + "".join(f"sys.modules[{m!r}] = None\n" for m in modules)
    command = [sys.executable, "-c", blocked + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_store_can_be_asked_without_torch_and_ray(harvested: Store) -> None:
    """Its refusals too: a machine to read stores on has neither."""
    commands = [
        (0, ["status", str(harvested.path)]),
        (0, ["query", str(harvested.path), "select count(*) from rows"]),
        (1, ["query", str(harvested.path), "selec"]),
        (1, ["status", "/nowhere"]),
    ]
    code = f"from jobs.cli.main import main\nprint([main(c) for _, c in {commands!r}] == {[s for s, _ in commands]!r})"
    done = without(("torch", "transformers", "ray"), code)
    assert done.stdout.endswith("True\n"), done.stderr
    assert done.stderr.count("granary: ") == 2
    assert "Traceback" not in done.stderr


# ---- JSON


def test_status_json(harvested: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(harvested.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out)
    assert record["store"] == str(harvested.path)
    assert (record["rows"], record["units"], record["held_out_rows"]) == (harvested.num_rows, 4, 0)
    assert record["labels"] == ["language", "year"]
    assert (record["anchors"], record["runs"], record["left_out"]) == ({}, [], {})
    (harvest,) = record["harvests"]
    assert (harvest["sites"], harvest["units_committed"], harvest["units"]) == (harvested.sites, 4, 4)


def test_plan_json_and_plan_writes_nothing(lab: Lab) -> None:
    spec = lab.spec()
    before = snapshot(lab.folder)
    record = json.loads(lab.run("plan", spec, "--json"))
    assert snapshot(lab.folder) == before
    assert record["exists"] is False
    assert (record["rows"], record["units"], record["documents"], record["contexts"]) == (3733, 4, 48, 85)
    assert set(record["sites"]) == {"resid_post.1", "mlp_in.0", "mlp_out.0"}
    assert (record["layers_run"], record["layers_of_model"]) == (2, 3)
    text = lab.run("plan", spec)
    assert "3,733 in 85 contexts, 4 units" in text
    assert "mlp_in.0: bfloat16 x 32" in text
    assert snapshot(lab.folder) == before


def test_plan_foretells_the_harvest(stored: Lab) -> None:
    record = json.loads(stored.run("plan", stored.spec(), "--json"))
    assert record["exists"] is True
    status = json.loads(stored.run("status", stored.store, "--json"))
    for key in ("rows", "units", "documents", "contexts", "left_out"):
        assert record[key] == status[key]


def test_query_json_is_one_object_a_line(harvested: Store, capsys: pytest.CaptureFixture[str]) -> None:
    query = "select language, count(*) as n, max(row_stop) as last from documents group by 1 order by 1"
    assert main(["query", str(harvested.path), query, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["language"] for line in lines] == ["de", "en", "fr"]
    assert sum(line["n"] for line in lines) == 48
    assert main(["query", str(harvested.path), "select date '2026-01-31' as day, null as nothing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"day": "2026-01-31", "nothing": None}


# ---- refusals


def test_what_is_a_refusal_and_what_is_a_bug() -> None:
    assert refusal(SpecError("no")) == "no"
    assert refusal(StorageError("gone")) == "gone"
    assert refusal(ValueError("ours")) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "ours too", "x")) is None
    full = refusal(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert full is not None
    assert full.startswith("No space left on device (/data/x): ")
    assert refusal(RayTaskError("train", "Traceback ...", StorageError("gone"))) == "gone"
    assert refusal(RayTaskError("train", "Traceback ...", ValueError("ours"))) is None


def raising(error: BaseException) -> argparse.ArgumentParser:
    def verb(arguments: argparse.Namespace) -> int:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(verb=verb)
    return parser


def test_exit_statuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, status, told in [
        (StorageError("gone"), REFUSED, "granary: gone\n"),
        (KeyboardInterrupt(), INTERRUPTED, "\ninterrupted; what is committed stays, and the same command goes on"),
        (Terminated(), TERMINATED, "\ninterrupted; what is committed stays, and the same command goes on"),
        (BrokenPipeError(), REFUSED, ""),
    ]:
        monkeypatch.setattr("jobs.cli.main.build_parser", lambda error=error: raising(error))
        assert main([]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(told)
        assert bool(err) == bool(told)
    monkeypatch.setattr("jobs.cli.main.build_parser", lambda: raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):  # with its traceback
        main([])


def test_sigterm_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(_: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    parser = argparse.ArgumentParser()
    parser.set_defaults(verb=verb)
    monkeypatch.setattr("jobs.cli.main.build_parser", lambda: parser)
    before = signal.getsignal(signal.SIGTERM)
    assert main([]) == TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """What the line says now."""
        return self.getvalue().rpartition("\r\x1b[K")[2]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("jobs.progress.time.monotonic", clock)
    return clock


def test_progress_shows_rate_and_time_left(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine("harvesting", "rows", 10_000, stream=terminal) as line:
        clock.now += 30  # before the first word of progress: starting, not working
        line.update(4000)
        assert terminal.shown() == "harvesting  4,000 of 10,000 rows"
        clock.now += 10
        line.update(5000)
        assert terminal.shown() == "harvesting  5,000 of 10,000 rows  100 rows/s  50 s left"
        clock.now += 10
        line.update(6000, note="sae FVU 0.300")
        assert terminal.shown() == "harvesting  6,000 of 10,000 rows  100 rows/s  40 s left  sae FVU 0.300"
    assert terminal.shown() == ""  # nothing of it stays


def test_progress_of_unknown_length(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine("planning", "rows", stream=terminal) as line:
        line.update(0, 0)
        clock.now += 2
        line.update(500, 0)
        assert terminal.shown() == "planning  500 rows  250 rows/s"


@pytest.mark.parametrize("total", [0, 10**6])
def test_progress_is_not_shown_more_often_than_it_can_be_read(clock: Clock, total: int) -> None:
    terminal = Terminal()
    with ProgressLine("planning", "rows", total, stream=terminal) as line:
        for done in range(10_000):
            clock.now += 0.001
            line.update(done)
    assert 10 <= terminal.getvalue().count("planning") <= 60


def test_the_last_update_is_shown(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine("training", "steps", 10, stream=terminal) as line:
        for done in range(11):
            clock.now += 0.01
            line.update(done)
        assert terminal.shown().startswith("training  10 of 10 steps")


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(clock: Clock) -> None:
    file = io.StringIO()
    with ProgressLine("harvesting", "rows", 100, stream=file) as line:
        for done in range(0, 101, 2):
            clock.now += 3
            line.update(done)
    assert file.getvalue() == (
        "harvesting  38 of 100 rows  1 rows/s  1 min 33 s left\nharvesting  78 of 100 rows  1 rows/s  33 s left\n"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "under a second"),
        (0.99, "under a second"),
        (1, "1 s"),
        (8.4, "8 s"),
        (59.6, "1 min 00 s"),
        (130, "2 min 10 s"),
        (3900, "1 h 05 min"),
        (9e4, "25 h 00 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (5000 * 2**40, "5000.0 TiB")],
)
def test_sizes(num_bytes: float, words: str) -> None:
    assert size(num_bytes) == words


def test_counts() -> None:
    assert [counted(n, "document") for n in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]
