"""Every Python from 3.11 to 3.13: the code compiles without a warning, and the pinned packages are to be had as wheels.

And beside an existing torch, the package installs without touching it. pip only resolves here: of wheels it reads the
metadata, where the index lets it read a part of a file (`fast-deps`; an old pip would fetch gigabytes all the same).
"""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
# Of torch's build for CUDA, which says itself which it takes.
FROM_TORCH = re.compile("nvidia-.*|cuda-.*|triton")


def find_python(version: str) -> Path:
    """Return a Python of this version, from PATH or pyenv; skip the test where there is none."""
    pyenv = (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}")
    for candidate in (shutil.which(f"python{version}"), *sorted(pyenv)):
        if candidate and subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return Path(candidate)
    pytest.skip(f"there is no Python {version} on this machine")


def pins() -> dict[str, str]:
    """Return the versions of infra/constraints.txt by normal name."""
    lines = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub("[-_.]+", "-", name).lower()


def would_install(python: Path, *words: str) -> dict[str, str]:
    """Return what `pip install` would install, from wheels alone, by normal name, without installing it."""
    report = python.parent / "report.json"
    options = ["--dry-run", "--quiet", "--only-binary=:all:", "--use-feature=fast-deps", f"--report={report}"]
    done = subprocess.run([python, "-m", "pip", "install", *options, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return {normal(package["name"]): package["version"] for package in found}


def make_venv(python: Path, folder: Path) -> Path:
    """Make a virtual environment with the newest pip, whose dry run fetches no wheels; return its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    made = folder / "bin" / "python"
    subprocess.run([made, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True, capture_output=True)
    return made


@pytest.mark.parametrize("version", VERSIONS)
def test_all_files_compile_without_a_warning(version: str, tmp_path: Path) -> None:
    files = [str(path) for path in ROOT.rglob("*.py") if ".venv" not in path.parts and ".bench-venv" not in path.parts]
    script = "import sys; [compile(open(name).read(), name, 'exec') for name in sys.argv[1:]]"
    done = subprocess.run([find_python(version), "-W", "error", "-c", script, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # pip asks the index some hundred times: about half a minute each
@pytest.mark.parametrize("version", VERSIONS)
def test_the_pinned_packages_resolve_and_all_are_pinned(version: str, tmp_path: Path) -> None:
    python = make_venv(find_python(version), tmp_path / "venv")
    found = would_install(python, "--constraint=infra/constraints.txt", ".[dev,readers,s3]")
    assert found.pop("granary-activations")
    left = {name: at for name, at in found.items() if not FROM_TORCH.fullmatch(name)}
    expected = pins()
    assert {name: at.partition("+")[0] for name, at in left.items()} == {name: expected.get(name) for name in left}
    if version == VERSIONS[0]:
        assert set(expected) - set(left) == set(), "pinned and never installed"


@pytest.mark.slow
def test_a_torch_that_is_there_stays_unless_the_pins_are_asked_for(tmp_path: Path) -> None:
    python = make_venv(find_python(VERSIONS[0]), tmp_path / "venv")
    about = "torch-2.11.0+cu128.dist-info"  # the name and version of a build for CUDA, and nothing in it
    with zipfile.ZipFile(tmp_path / "torch-2.11.0+cu128-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", *tmp_path.glob("*.whl")], check=True)
    pinned = (ROOT / "infra" / "constraints.txt").read_text().splitlines(keepends=True)
    without_torch = tmp_path / "pins.txt"
    without_torch.write_text("".join(line for line in pinned if not line.startswith("torch==")))
    found = would_install(python, f"--constraint={without_torch}", ".")
    assert "torch" not in found
    assert found["transformers"] == pins()["transformers"]
    assert would_install(python, "--constraint=infra/constraints.txt", ".")["torch"].startswith(pins()["torch"])
