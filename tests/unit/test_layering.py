"""jobs -> workers -> {pipeline, storage}: who may import whom, also inside each; what importing costs."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "pipeline": {"ray", "zarr", "storage", "workers", "jobs", "duckdb"},
    "storage": {"ray", "torch", "transformers", "pipeline", "workers", "jobs"},
    "workers": {"jobs"},
}


FLOORS = {
    "pipeline": [
        "errors saying precision",
        "sites checks checkpoints",
        "model tokens",
        "capture",
        "corpus.control_strings corpus.skipped corpus.sources corpus.token_labels corpus.extents",
        "corpus.encode",
        "corpus.chats",
        "corpus.formats corpus.round_trip corpus.documents",
        "corpus.table_columns corpus.spans",
        "corpus.recipe",
        "sdl.dictionary",
        "sdl.train",
        "sdl.measure",
        "lrb",
    ],
    "storage": ["errors", "backends", "format", "table", "harvest", "read", "sql results", "store", "make", "verify"],
    "workers": [
        "tensors versions machine cluster",
        "settings",
        "plan harvest anchors train bench",
        "evaluate check",
        "stages",
    ],
    "jobs": [
        "ending progress token_rows spec bench",
        "preflight submit verify",
        "plan",
        "status",
        "report run",
        "demo",
        "cli",
    ],
}
"""The rooms of each package, from the ground up: a folder, or a module that stands alone. A room imports from its own
floor those that come before it, and from lower floors."""
MOST_FILES = 16


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


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    files = [*(file for package in FLOORS for file in (ROOT / package).rglob("*.py")), ROOT / "granary.py"]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(file: Path, known: Collection[str]) -> Iterator[str]:
    """The modules of the project that a file imports, by `from package import module` too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (name := inner if inner in known else node.module) in known:
                    yield str(name)


def room_of(module: str) -> tuple[str, str]:
    """A module's package and the room in it that it belongs to."""
    package, _, inner = module.partition(".")
    rooms = {room for floor in FLOORS[package] for room in floor.split()}
    parts = inner.split(".")
    for length in range(len(parts), 0, -1):
        if (room := ".".join(parts[:length])) in rooms:
            return package, room
    raise AssertionError(f"{module} is in no room of FLOORS: add it where it belongs")


def test_no_import_goes_upward_inside_a_package() -> None:
    known = modules()
    order = {
        (package, room): number for package in FLOORS for number, room in enumerate(" ".join(FLOORS[package]).split())
    }
    wrong = []
    for module, file in known.items():
        if module == "granary" or (file.name == "__init__.py" and not list(imported(file, known))):
            continue
        here = room_of(module)
        for other in imported(file, known):
            there = room_of(other)
            if there[0] == here[0] and order[there] > order[here]:
                wrong.append(f"{module} imports {other}, which is above it")
    assert not wrong


def test_no_import_circle() -> None:
    """Imports inside functions count: a circle that only shows when a function runs is a circle."""
    known = modules()
    graph = {module: set(imported(file, known)) - {module} for module, file in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_folder_is_overfull() -> None:
    folders = Counter(file.parent for top in (*FLOORS, "tests", "benchmarks") for file in (ROOT / top).rglob("*.py"))
    assert {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_FILES} == {}


def test_the_map_names_what_is_there() -> None:
    """Every path in docs/architecture.md, CONTRIBUTING.md and the last decisions that begins with a package."""
    texts = [
        (ROOT / name).read_text()
        for name in ("docs/architecture.md", "CONTRIBUTING.md", "docs/decisions/0022-rooms.md")
    ]
    named = {
        name
        for text in texts
        for name in re.findall(r"`((?:pipeline|storage|workers|jobs|tests|docs)/[\w./-]+)`", text)
    }
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


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
