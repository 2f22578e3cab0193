"""The names of a store's objects: as FORMAT.md says, made and recognised by the same templates."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import storage
from storage.backends.place import Place, open_place
from storage.format import layout
from storage.format.layout import RUN_FILES, StoreLayout, pattern

FORMAT = (Path(storage.__file__).parent / "FORMAT.md").read_text()
TEMPLATES = {n: v for n, v in vars(layout).items() if n[0].isupper() and n.isupper() and isinstance(v, str)}
IN_WORDS = {"UNIT_NAME", "ARRAY", "CHUNK", "DOCUMENTS", "DOCUMENTS_FILE", "RUN"}
"""Those that FORMAT.md writes out by kind, or apart from the list."""
PLACES: dict[str, Callable[[StoreLayout], Place]] = {
    "GROWTH": lambda it: it.growth(3),
    "ARRAY": lambda it: it.array("norms", "tiny", "resid_post.1@int8"),
    "HARVEST": lambda it: it.harvest("abc"),
    "BITMAP": lambda it: it.bitmap("abc"),
    "DRIVER": lambda it: it.driver("abc", "host-1-ff"),
    "COMMIT": lambda it: it.commit("abc", "00001024-37"),
    "MOMENTS": lambda it: it.moments("abc", "00000012"),
    "FAILURE": lambda it: it.failure("abc", "00000012-3217"),
    "ANCHOR_RECORD": lambda it: it.anchor_record("langs"),
    "ANCHOR_ARRAY": lambda it: it.anchor_array("langs", "mlp_in.0"),
    "RUN": lambda it: it.run("sae"),
}


def in_words(template: str) -> str:
    """A template as FORMAT.md writes it: <unit> for {unit}, with any name between the angle brackets."""
    return "".join(r"<\w+>" if n % 2 else re.escape(piece) for n, piece in enumerate(re.split(r"\{(\w+)\}", template)))


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - IN_WORDS))
def test_the_format_names_it(name: str) -> None:
    assert re.search(rf"(?<![\w/]){in_words(TEMPLATES[name])}", FORMAT), TEMPLATES[name]


@pytest.mark.parametrize("file", sorted(RUN_FILES.values()))
def test_the_format_names_the_files_of_a_run(file: str) -> None:
    assert re.search(rf"(?<![\w.]){re.escape(file.partition('.')[0])}\b", FORMAT)


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_place_is_recognised_by_its_own_pattern_and_by_no_other(name: str, tmp_path: Path) -> None:
    root = open_place(tmp_path)
    key = str(PLACES[name](StoreLayout(root))).removeprefix(f"{root}/")
    matching = [n for n in PLACES.keys() - {"ARRAY", "RUN"} if re.fullmatch(pattern(TEMPLATES[n]), key)]
    if name in ("ARRAY", "RUN"):  # whose kinds are filled in by who looks for them
        assert re.fullmatch(pattern(TEMPLATES[name]), key)
    else:
        # The record of anchors lies among their arrays, and a site has no such name.
        assert set(matching) - {"ANCHOR_ARRAY"} | ({name} & {"ANCHOR_ARRAY"}) == {name}


def test_a_commit_lies_in_the_block_of_its_unit(tmp_path: Path) -> None:
    root = open_place(tmp_path)
    assert str(StoreLayout(root).commit("abc", "00002050-7")).endswith("commits/abc/000002/00002050-7.json")


def test_a_known_field_stands_for_itself_alone() -> None:
    known = pattern(layout.COMMIT, harvest="abc")
    assert re.fullmatch(known, "commits/abc/000000/00000001.json")
    assert not re.fullmatch(known, "commits/abd/000000/00000001.json")
    assert not re.fullmatch(known, "commits/abc/000000/1.json")
