"""The names of everything in a store: the list in code of what FORMAT.md describes.

Each name is a template. `StoreLayout` fills templates in, for all that read and write; `pattern` makes regular
expressions of the same templates, by which `granary verify` tells the store's names from others.
"""

import re
from dataclasses import dataclass

from storage.backends.place import Place
from storage.format.units import UNIT_NAME, number_of

GROUP = "zarr.json"
"""The metadata of a Zarr group or array, in its folder; the root group's holds the root record."""
REPORT = "report.html"
CLAIM = "creating.json"
"""Written first and removed last while a store is made where nothing can be renamed."""

TABLE = "corpus"
"""The folder of the table of rows that a store is made with; one that has grown says in its root record where it is."""
DOCUMENTS = "documents"
DOCUMENTS_FILE = "documents/part-{part}.parquet"
"""In the table's folder, as the tokenizer's."""
TOKENIZER = "tokenizer"
GROWTH = "growths/{generation}.json"

ARRAY = "{kind}/{model}/{site}"
"""An array of activations, norms or scales. Its metadata and those of the groups that it is in are GROUP."""
CHUNK = "c/{chunk}"
HARVEST = "commits/{harvest}/harvest.json"
BITMAP = "commits/{harvest}/committed.json"
DRIVER = "commits/{harvest}/drivers/{driver}.json"
COMMIT = "commits/{harvest}/{block}/{unit}.json"
MOMENTS = "moments/{harvest}/{unit}.parquet"
FAILURE = "failures/{harvest}/{unit}.json"

ANCHORS = "anchors"
ANCHOR_RECORD = "anchors/{anchors}/anchors.json"
ANCHOR_ARRAY = "anchors/{anchors}/{site}"
RUNS = "runs"
RUN = "runs/{run}"
RUN_FILES = {
    "run": "run.json",
    "curve": "curve.json",
    "checkpoint": "checkpoint.safetensors",
    "dictionary": "dictionary.json",
    "weights": "dictionary.safetensors",
    "normalisation": "normalisation.safetensors",
    "evaluation": "evaluation.json",
}
"""What may be in a run's folder."""

UNITS_PER_BLOCK = 1024
"""Commits of so many units are in one folder, a block."""
BLOCK_DIGITS = 6
"""Digits of a block in names, so that names sort as numbers."""
PART_DIGITS = 5
GENERATION_DIGITS = 8

_PATTERNS = {
    "block": rf"\d{{{BLOCK_DIGITS}}}",
    "unit": UNIT_NAME,
    "chunk": r"\d+(?:/0)?",
    "generation": rf"\d{{{GENERATION_DIGITS}}}",
}
_NAME = r"[^/]+"


def pattern(template: str, **patterns: str) -> str:
    """A regular expression of the names that a template gives. `patterns`: those of its fields that are known here."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(
        f"(?:{patterns.get(piece) or _PATTERNS.get(piece, _NAME)})" if number % 2 else re.escape(piece)
        for number, piece in enumerate(pieces)
    )


def documents_file(part: int) -> str:
    """The name, in the table's folder, of a file of documents."""
    return DOCUMENTS_FILE.format(part=f"{part:0{PART_DIGITS}d}")


@dataclass(frozen=True)
class StoreLayout:
    """The places of a store's objects, below its root."""

    root: Place

    @property
    def root_record(self) -> Place:
        return self.root / GROUP

    @property
    def claim(self) -> Place:
        return self.root / CLAIM

    @property
    def report(self) -> Place:
        return self.root / REPORT

    def growth(self, generation: int) -> Place:
        """The record that says which table became the store's `generation`-th."""
        return self.root / GROWTH.format(generation=f"{generation:0{GENERATION_DIGITS}d}")

    def _folder(self, template: str, **fields: str) -> Place:
        """The folder of the names that a template gives."""
        return self.root / template.rpartition("/")[0].format(**fields)

    # ---- harvests

    def group(self, kind: str, model: str | None = None) -> Place:
        """The group of all arrays of a kind, or of those of one model."""
        return self.root / (kind if model is None else f"{kind}/{model}")

    def array(self, kind: str, model: str, site: str) -> Place:
        return self.root / ARRAY.format(kind=kind, model=model, site=site)

    @property
    def harvests(self) -> Place:
        """The folder with a folder of commits for each harvest."""
        return self.root / HARVEST.partition("/")[0]

    def commits(self, harvest: str) -> Place:
        """The folder of a harvest's commits: its record, the bitmap, drivers, and a folder for each block of units."""
        return self._folder(HARVEST, harvest=harvest)

    def harvest(self, harvest: str) -> Place:
        return self.root / HARVEST.format(harvest=harvest)

    def bitmap(self, harvest: str) -> Place:
        return self.root / BITMAP.format(harvest=harvest)

    def block(self, harvest: str, block: int) -> Place:
        """The folder with the commits of units `block * UNITS_PER_BLOCK` and on."""
        return self._folder(COMMIT, harvest=harvest, block=f"{block:0{BLOCK_DIGITS}d}")

    def commit(self, harvest: str, unit: str) -> Place:
        """`unit`, here and below: its name, which `UnitRanges.name` gives."""
        return self.block(harvest, number_of(unit) // UNITS_PER_BLOCK) / f"{unit}.json"

    def drivers(self, harvest: str) -> Place:
        return self._folder(DRIVER, harvest=harvest)

    def driver(self, harvest: str, driver: str) -> Place:
        return self.root / DRIVER.format(harvest=harvest, driver=driver)

    def all_moments(self, harvest: str) -> Place:
        return self._folder(MOMENTS, harvest=harvest)

    def moments(self, harvest: str, unit: str) -> Place:
        return self.root / MOMENTS.format(harvest=harvest, unit=unit)

    def failures(self, harvest: str) -> Place:
        return self._folder(FAILURE, harvest=harvest)

    def failure(self, harvest: str, unit: str) -> Place:
        return self.root / FAILURE.format(harvest=harvest, unit=unit)

    # ---- results

    @property
    def all_anchors(self) -> Place:
        return self.root / ANCHORS

    def anchors(self, name: str) -> Place:
        return self._folder(ANCHOR_RECORD, anchors=name)

    def anchor_record(self, name: str) -> Place:
        return self.root / ANCHOR_RECORD.format(anchors=name)

    def anchor_array(self, name: str, site: str) -> Place:
        return self.root / ANCHOR_ARRAY.format(anchors=name, site=site)

    @property
    def runs(self) -> Place:
        return self.root / RUNS

    def run(self, name: str) -> Place:
        return self.root / RUN.format(run=name)
