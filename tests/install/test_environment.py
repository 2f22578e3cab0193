"""`make` on the machines that people have: infra/environment.sh, with real Pythons, venv and pip, and no network.

The project it installs here is one of nothing, with the real script and Makefile, in a folder with a space in its name.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
TOOLS = "make sh cat cksum date dirname find flock grep head ls mkdir rm sleep tail tee touch"
ANEW = ".venv was interrupted or moved, or has another Python: making it anew"
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "nothing"
version = "1"
[project.optional-dependencies]
dev = []
readers = []
s3 = []
"""
BACKEND = """
import os, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    if os.path.exists("slow"):
        os.mkdir("building")
        time.sleep(60)
    if os.path.exists("broken"):
        raise SystemExit("it cannot be built")
    with zipfile.ZipFile(os.path.join(folder, "nothing-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("nothing.py", "")
        about = "nothing-1.dist-info/"
        extras = "".join(f"Provides-Extra: {name}\\n" for name in ("dev", "readers", "s3"))
        wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\\nName: nothing\\nVersion: 1\\n" + extras)
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(about + "RECORD", "")
    return "nothing-1-py3-none-any.whl"

build_wheel = build_editable
"""


class Machine:
    """A checkout in `folder`, and a PATH with the tools of this machine and the Pythons that a test puts there."""

    def __init__(self, folder: Path):
        self.folder = folder / "a checkout"
        self.bin = folder / "bin"
        for made in (self.folder / "infra", self.bin):
            made.mkdir(parents=True)
        for name in ("Makefile", "infra/environment.sh"):
            shutil.copy(ROOT / name, self.folder / name)
        for name, text in {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "infra/constraints.txt": ""}.items():
            (self.folder / name).write_text(text)
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def python(self, name: str, script: str = 'exec "$REAL" "$@"') -> Path:
        """Put a Python on the PATH: the real one, behind a script."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\nREAL='{BASE}'\n{script}\n")
        path.chmod(0o755)
        return path

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Start `make environment`, in a process group of its own."""
        return subprocess.Popen(
            ["make", "environment", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, *words: str) -> str:
        """Run `make environment`, which succeeds; return what it printed."""
        process = self.start(*words)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        return out

    def refused(self, *words: str) -> str:
        """Run `make environment`, which fails with one sentence, the last line before make's own; return it."""
        process = self.start(*words)
        out, _ = process.communicate(timeout=600)
        assert process.returncode != 0, out
        *_, sentence, _ = out.splitlines()
        assert sentence.startswith("granary: ")
        return sentence

    def interrupted(self, sign: Path) -> str:
        """Kill `make environment` and what it started as soon as there is a file `sign`; return what it printed."""
        process = self.start()
        while not sign.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]

    def interrupted_making_venv(self) -> str:
        """Kill `make environment` when the virtual environment is there, without pip; return what it printed."""
        sign = self.folder / "sign"
        sign.unlink(missing_ok=True)
        self.python(
            "python3.11",
            'case "$2" in *_base_executable*) echo "$0"; exit;; esac\n'
            f'case "$1$2" in -mvenv) "$REAL" -m venv --without-pip "$3"; touch "{sign}"; exec sleep 60;; esac\n'
            'exec "$REAL" "$@"',
        )
        return self.interrupted(sign)

    def check_sound(self) -> None:
        """Check that everything is installed, and that the next `make` has nothing to do."""
        subprocess.run([self.venv / "bin" / "pip", "show", "-q", "nothing"], check=True)
        subprocess.run([self.venv / "bin" / "python", "-c", "import nothing"], check=True)
        assert self.make() == ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---- which Python


def test_no_python_at_all(machine: Machine) -> None:
    sentence = machine.refused()
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        assert f"{name} is not installed" in sentence
    assert "apt-get install python3 python3-venv" in sentence
    assert not machine.venv.exists()


def test_pythons_that_will_not_do(machine: Machine) -> None:
    machine.python("python3.11", "exit 127")  # as pyenv's stand-ins do for versions that are not chosen
    machine.python("python3.12", 'case "$2" in *ensurepip*) exit 1;; esac; echo 3.12')  # as Debian ships it
    machine.python("python3", "echo 3.10")
    sentence = machine.refused()
    assert "python3.11 does not run, python3.12 has no venv with pip (Debian and Ubuntu: apt-get install " in sentence
    assert "python3.12-venv), python3.13 is not installed, python3 is Python 3.10: " in sentence
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 3.10", "is Python 3.10"),
        ("echo 2.7", "is Python 2.7"),
        ("echo 3.14", "is Python 3.14"),
        ("exit 1", "does not run"),
        ('case "$2" in *ensurepip*) exit 1;; esac; echo 3.13', "has no venv with pip"),
    ],
)
def test_the_python_that_is_asked_for_will_not_do(machine: Machine, script: str, expected: str) -> None:
    machine.python("python3.11")
    mine = machine.python("mine", script)
    sentence = machine.refused(f"PYTHON={mine}")
    assert sentence.startswith(f"granary: PYTHON={mine} {expected}")
    assert sentence.endswith("Granary needs Python 3.11, 3.12 or 3.13 with venv")
    assert "PYTHON=gone is not installed" in machine.refused("PYTHON=gone")
    assert not machine.venv.exists()


# ---- the environment


@pytest.mark.slow
def test_interrupted_twice_then_made_by_two_at_once(machine: Machine) -> None:
    machine.interrupted_making_venv()
    assert (machine.venv / "bin" / "python").exists()

    machine.python("python3.11")
    (machine.folder / "slow").touch()
    machine.interrupted(machine.folder / "building")
    (machine.folder / "slow").unlink()

    both = [machine.start(), machine.start()]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    made, waited = sorted(outputs, key=len, reverse=True)
    phases = [ANEW, "[1/3] making .venv with Python 3.1", "[2/3] fetching", "[3/3] unpacking", "ready after "]
    assert [line for phase in phases for line in made.splitlines() if phase in line] == made.splitlines()
    assert waited in ("", "granary: another make is installing: waiting for it\n")
    machine.check_sound()


@pytest.mark.slow
def test_changed_pins_are_installed_into_it_and_a_broken_one_is_made_anew(machine: Machine) -> None:
    machine.python("python3.11")
    machine.make()
    mine = machine.venv / "mine"
    mine.touch()

    (machine.folder / "infra" / "constraints.txt").write_text("# changed\n")
    (machine.folder / "broken").touch()
    assert "there is no C compiler to build it: install one" in machine.refused()
    (machine.folder / "broken").unlink()
    assert "the pinned packages have changed" in machine.make()
    machine.check_sound()
    assert mine.exists(), "pip had changed nothing when it failed, so the environment was as good as before"

    (machine.venv / ".made-by-make").unlink()  # as an older Makefile left it
    (machine.venv / ".installed").write_text("")
    assert "the pinned packages have changed" in machine.make()
    assert mine.exists()

    installed = (machine.venv / ".installed").read_text()
    machine.folder = machine.folder.rename(machine.folder.with_name("moved"))  # its scripts name the old folder
    assert ANEW in machine.interrupted_making_venv()
    machine.folder = machine.folder.rename(machine.folder.with_name("a checkout"))
    (machine.venv / ".installed").write_text(installed)
    (machine.venv / "bin" / "python").unlink()
    (machine.venv / "bin" / "python").symlink_to("/gone/python3.11")
    assert ANEW in machine.interrupted_making_venv()
    assert not mine.exists()


def test_an_environment_of_the_users_own_is_left_alone(machine: Machine) -> None:
    machine.python("python3.11")
    machine.venv.mkdir()
    (machine.venv / "pyvenv.cfg").write_text("mine")
    assert ".venv was not made by make, and is left alone" in machine.refused()
    assert [path.name for path in machine.venv.iterdir()] == ["pyvenv.cfg"]
