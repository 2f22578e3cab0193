"""The root record: what a store says of its table of rows."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from storage.backends.place import Place
from storage.errors import NotAStore, StorageError
from storage.format.layout import GROUP, TABLE
from storage.format.records import Record, read_record
from storage.format.units import UnitRanges, UnitSet

FORMAT = 1
ROW_COLUMNS = {"token": "int32", "position": "int32", "document": "int64", "context": "int64"}
"""The row columns under corpus/ and their data types."""
ROLE_COLUMN = {"role": "int8"}
"""The row column that corpora of chats have besides: a number, named in the root record."""
LABEL_TYPE = "int16"
"""The type of the row columns of labels of spans or tokens: a number, named in the root record, or -1."""
CONTEXT_COLUMNS = {"context_token": "int32", "context_start": "int64"}
"""The other arrays under corpus/: the tokens of the contexts, and where each begins."""


@dataclass(frozen=True)
class CorpusInfo:
    """What the root group says of the table of rows: its size and everything that determined it."""

    num_rows: int
    num_contexts: int
    num_context_tokens: int
    """Tokens of all contexts, rows or not: what is run when every context is run once."""
    num_documents: int
    rows_per_unit: int
    context: int
    """Tokens a context has at most, BOS included."""
    skip_first: int
    """Positions at the start of every context that are no rows."""
    held_out_start: int
    """Rows from here on (whole units) are never trained on; equals num_rows when nothing is held out."""
    labels: list[str]
    roles: list[str]
    """The names of the values of the row column `role`; empty where the corpus is not chat, and has no such column."""
    corpus_digest: str
    tokenizer_digest: str
    plan: Record
    """What determines the table: columns, context policy, seed, source fingerprints."""
    skipped: Record
    """Source records that gave no rows, counted by reason, with the keys of the first few."""
    made_with: Record
    files: Record = field(default_factory=dict)
    """The sha256 of each file under corpus/ that somebody else's format determines: documents and tokenizer."""
    folder: str = TABLE
    """Where the table is: a store that has grown has it in another folder (docs/decisions/0012-growing.md)."""
    segments: list[Record] = field(default_factory=list)
    """What each entry of corpus.path gave: rows, documents, and what its files amount to."""
    grown_from: list[Record] = field(default_factory=list)
    """The tables the store had before, oldest first: corpus_digest, num_rows and folder of each."""
    row_labels: list[Record] = field(default_factory=list)
    """The labels of rows, from spans or tokens: `label`, and `values` in the order of their numbers. The n-th has the
    row column `label.n`. The record of a store without any does not have this field."""

    @property
    def generation(self) -> int:
        """1, and one more each time the store has grown."""
        return 1 + len(self.grown_from)

    @property
    def first_table(self) -> Record:
        """corpus_digest and num_rows of the table that the store was made with: the same however it grows."""
        if self.grown_from:
            return {name: self.grown_from[0][name] for name in ("corpus_digest", "num_rows")}
        return {"corpus_digest": self.corpus_digest, "num_rows": self.num_rows}

    def since(self, identity: Record) -> str | None:
        """What the store was when something with this identity was made, if it has grown since; else None."""
        for table in self.grown_from:
            if table["corpus_digest"] == identity.get("corpus_digest") != self.corpus_digest:
                return f"the {table['num_rows']:,} rows that the store had before it grew to {self.num_rows:,}"
        return None

    @property
    def seams(self) -> frozenset[int]:
        """The units in which a table that the store had before ended: their chunks have been written shorter."""
        rows = (table["num_rows"] for table in self.grown_from if table["num_rows"] < self.num_rows)
        return frozenset(n // self.rows_per_unit for n in rows if n % self.rows_per_unit)

    @property
    def row_columns(self) -> dict[str, str]:
        """The row columns of this store: name -> data type."""
        return row_columns(bool(self.roles), self.values_of_rows)

    @property
    def values_of_rows(self) -> dict[str, list[str]]:
        """The labels of rows, in order: name -> values."""
        return {entry["label"]: entry["values"] for entry in self.row_labels}

    @property
    def all_labels(self) -> list[str]:
        """The labels of documents, then those of rows: all that name subpopulations."""
        return [*self.labels, *self.values_of_rows]

    @property
    def units(self) -> UnitRanges:
        return UnitRanges(self.num_rows, self.rows_per_unit)

    @property
    def num_units(self) -> int:
        return self.units.total

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """The half-open row range of a unit."""
        return self.units.rows(unit)

    def rows_in(self, units: UnitSet) -> int:
        """How many rows some units have."""
        short = self.num_units * self.rows_per_unit - self.num_rows  # what the last unit lacks
        return len(units) * self.rows_per_unit - (short if self.num_units - 1 in units else 0)

    def to_record(self) -> Record:
        record = {"format": FORMAT, **asdict(self)}
        if not self.row_labels:  # as it was before there were such labels
            del record["row_labels"]
        return record

    @classmethod
    def of(cls, record: Record) -> "CorpusInfo":
        """From what `to_record` gave. Raises TypeError."""
        return cls(**{name: value for name, value in record.items() if name != "format"})


def row_columns(has_roles: bool, row_labels: Iterable[str] = ()) -> dict[str, str]:
    """The row columns of a store, name -> data type. `row_labels`: the names of its labels of rows."""
    return ROW_COLUMNS | (ROLE_COLUMN if has_roles else {}) | dict.fromkeys(label_columns(row_labels), LABEL_TYPE)


def label_columns(row_labels: Iterable[str]) -> dict[str, str]:
    """The row columns of labels of rows: name of the column -> that of the label, which may be any text."""
    return {f"label.{number}": label for number, label in enumerate(row_labels)}


def read_root(path: Place) -> CorpusInfo:
    """The root record of the store at a place. Raises NotAStore."""
    try:
        attributes = read_record(path / GROUP)["attributes"].get("granary", {})
    except (FileNotFoundError, NotADirectoryError):
        raise NotAStore(f"no store at {path}: `granary harvest SPEC` makes one") from None
    except StorageError:
        if _is_foreign(path):
            raise NotAStore(f"{path} is a Zarr group but not a Granary store") from None
        raise
    if "format" not in attributes:
        raise NotAStore(f"{path} is a Zarr group but not a Granary store")
    if attributes["format"] != FORMAT:
        raise NotAStore(
            f"the store at {path} has format {attributes['format']!r}; this version of Granary reads format {FORMAT}"
        )
    try:
        return CorpusInfo.of(attributes)
    except TypeError as error:
        raise NotAStore(f"the root record of {path} is damaged: {error}") from None


def _is_foreign(path: Place) -> bool:
    """Return whether the zarr.json that failed as a record is somebody else's group: sound JSON without a word of
    ours."""
    try:
        content = (path / GROUP).read()
        return b"checksum" not in content and "granary" not in json.loads(content).get("attributes", {})
    except (ValueError, AttributeError, TypeError):
        return False
