"""jobs -> workers -> {pipeline, storage}: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "pipeline": {"ray", "zarr", "storage", "workers", "jobs", "duckdb"},
    "storage": {"ray", "torch", "transformers", "pipeline", "workers", "jobs"},
    "workers": {"jobs"},
}


def imports_of(file: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the layer"
            yield node.module or ""


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_forbidden_import(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports_of(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not found


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


def test_importing_granary_loads_nothing_heavy() -> None:
    assert not {"torch", "ray", "transformers", "duckdb"} & modules_after("import granary")


def test_opening_a_store_needs_neither_torch_nor_ray() -> None:
    assert not {"torch", "ray", "transformers"} & modules_after("import granary; granary.open_store; granary.Store")


def test_pipeline_runs_without_ray_and_zarr() -> None:
    files = (ROOT / "pipeline").rglob("*.py")
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if f.stem != "__init__"]
    assert not {"ray", "zarr", "storage", "workers"} & modules_after("import " + ", ".join(sorted(names)))


def test_every_public_name_loads() -> None:
    import granary

    for name in granary.__all__:
        assert getattr(granary, name) is not None
    with pytest.raises(AttributeError, match="open_store"):
        granary.open_stor  # noqa: B018


def test_packages_are_listed_explicitly() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(f.parent.relative_to(ROOT).parts)
        for p in ("pipeline", "storage", "workers", "jobs")
        for f in (ROOT / p).rglob("__init__.py")
    }
    assert listed == found
