"""A compiler that is missing where layers are to be compiled is said before any work, and only there."""

import os
from pathlib import Path

import pytest
from lab import Lab, RayStarted

from jobs.cli.main import main
from pipeline.capture.compilers import check_compiler
from pipeline.errors import InputError

NO_COMPILER = (
    "harvest.compile: compiling the layers needs a C++ compiler, and this machine has no g++: install one (Debian and "
    "Ubuntu: apt-get install g++), or set harvest.compile: false"
)


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with nothing on it."""
    for name in ("CC", "CXX", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.usefixtures("no_ray", "no_compiler")
@pytest.mark.parametrize("given", [True, "auto"])
def test_it_is_said_before_a_plan_is_written_and_before_ray_starts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, given: bool | str
) -> None:
    monkeypatch.setattr(
        "workers.settings.experiment.COMPILE_FROM_FLOPS", {"cpu": 0, "cuda": 0}
    )  # so that auto compiles
    spec = lab.spec({"harvest.compile": given})
    assert NO_COMPILER in lab.refused("harvest", spec)
    assert not lab.store.exists()
    with pytest.raises(RayStarted):
        main(["harvest", str(lab.spec({"harvest.compile": False}))])  # plans the store
    assert NO_COMPILER in lab.refused("harvest", lab.spec({"harvest.compile": given}))


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", r"C\+\+ compiler.* no g\+\+"), ("cuda", "C compiler.* gcc or clang")]
)
def test_each_device_has_its_own_compiler(device: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_compiler(device)


@pytest.mark.usefixtures("no_compiler")
def test_the_compiler_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-g++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"no .*Python\.h: install them \(Debian and Ubuntu: apt-get install python3"):
        check_compiler("cpu")
    (tmp_path / "Python.h").write_text("")
    check_compiler("cpu")
    monkeypatch.setenv("CXX", "gone-" + os.fspath(compiler.name))
    with pytest.raises(InputError, match="no gone-my-g"):
        check_compiler("cpu")
