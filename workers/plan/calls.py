"""The calls that make a table of rows: each reads a part of a corpus, or orders a bucket of it.

They are functions of their arguments and may be run anywhere (`workers.cluster.tasks`); `table_plan` says which there
are and puts what they give together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.documents import (
    Documents,
    Sizes,
    first_rows,
    in_order,
    joined,
    split,
)
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.open import Corpus
from pipeline.corpus.formats.records import Chunk, Piece, no_value
from pipeline.corpus.recipe import Recipe
from pipeline.corpus.skipped import Skipped
from pipeline.corpus.sources.files import CorpusFile
from pipeline.corpus.token_labels import MOST_VALUES, LabelValues
from pipeline.errors import InputError

LABEL_VALUES = MOST_VALUES
"""A label has at most this many values: means are kept for each at every site, and a column of urls, of which every
document has its own, would take more than the activations."""

MOST_UNTOLD = 16_384
"""So many records of a stream may come, without any value of a label, before it is refused. Spans of the records that
have some may come later, and a record without gives no rows."""


@dataclass(frozen=True)
class Cuts:
    """How the work is cut. Has no part in the result."""

    task_bytes: int = 32 * 2**20
    """Content of the corpus that a call reads before it gives away what it has."""
    bucket_bytes: int = 64 * 2**20
    """Content of a bucket, about."""
    task_pieces: int = 4096


@dataclass
class Forms:
    """What records show of the labels of tokens, whatever their values are."""

    told: set[str] = field(default_factory=set)
    """Labels that are of tokens."""
    untold: dict[str, str] = field(default_factory=dict)
    """Labels without a value in any record of some chunk, which may be of documents, and the first such record."""
    plain: set[str] = field(default_factory=set)
    """Labels that are of documents."""

    def note(self, chunk: Chunk, file: CorpusFile) -> None:
        """Raise InputError for a label of documents that these records, or some before, have no value of."""
        self.told |= {*chunk.aligned}.difference(chunk.untold)
        self.plain |= {*chunk.labels}
        for label in chunk.untold:
            self.untold.setdefault(label, f"{file.url}:{chunk.numbers[0]}")
        self._check()

    def add(self, others: "Forms") -> None:
        """Raise InputError as `note` does."""
        self.told |= others.told
        self.plain |= others.plain
        self.untold = {**others.untold, **self.untold}
        self._check()

    def _check(self) -> None:
        for label, where in self.untold.items():
            if label in self.plain and label not in self.told:
                raise no_value(label, where)

    def check_told(self, read: int, name: str) -> None:
        """Raise InputError for a label that nothing is known of after `read` records of a stream, which has no end that
        one could wait for."""
        for label in self.untold:
            if read >= MOST_UNTOLD and label not in self.told:
                raise InputError(
                    f"corpus.labels: {label!r} has no value in the first {read:,} records of {name}; mend the name, "
                    "leave the label out, or name a part of the dataset that has values (corpus.split)"
                )


@dataclass(frozen=True)
class Found:
    """What a call read, in short."""

    rows: int
    role_names: tuple[str, ...]
    schema: pa.Schema
    label_values: dict[str, set[Any]]
    """The values of each label, of which no more than LABEL_VALUES and one."""
    label_names: LabelValues
    """The values of each label of tokens."""
    forms: Forms
    """Of all records that the call has read so far."""


def read_pieces(
    recipe: Recipe, corpus: Corpus, pieces: Sequence[Piece], bounds: Sequence[int], cuts: Cuts
) -> Iterator[object]:
    """Read pieces; yield, again and again, a `Found` and the documents for each bucket."""
    forms = Forms()

    def chunks() -> Iterator[Documents]:
        for piece in pieces:
            file = corpus.files[piece.file]
            for chunk in corpus.chunks(piece):
                forms.note(chunk, file)
                yield recipe.documents(chunk, piece.file, file, bounds[0], bounds[-1])

    yield from _parted(chunks(), bounds, cuts, recipe.labels, forms)


def read_stream(
    recipe: Recipe, dataset: NamedDataset, rows: int, bounds: Sequence[int], cuts: Cuts
) -> Iterator[object]:
    """Read a stream until it has given at least `rows` rows; yield as `read_pieces` does."""
    forms = Forms()

    def enough() -> Iterator[Documents]:
        found = read = 0
        for chunk in dataset.chunks():
            forms.note(chunk, dataset.file)
            read += len(chunk.numbers) + len(chunk.broken)
            forms.check_told(read, dataset.summary)
            documents = recipe.documents(chunk, 0, dataset.file, bounds[0], bounds[-1])
            yield documents
            found += documents.sizes.rows
            if found >= rows:
                return

    yield from _parted(enough(), bounds, cuts, recipe.labels, forms)


def _parted(
    chunks: Iterator[Documents], bounds: Sequence[int], cuts: Cuts, labels: Sequence[str], forms: Forms
) -> Iterator[object]:
    """`forms`: of the labels in all chunks that were taken so far."""
    held: list[Documents] = []
    num_bytes = 0
    for documents in chunks:
        held.append(documents)
        num_bytes += documents.about.nbytes + documents.left_out.nbytes
        num_bytes += 4 * len(documents.tokens)  # tokens take about as much as their text
        if num_bytes >= cuts.task_bytes:
            yield from _give(held, bounds, labels, forms)
            held, num_bytes = [], 0
    if held:
        yield from _give(held, bounds, labels, forms)


def _give(held: Sequence[Documents], bounds: Sequence[int], labels: Sequence[str], forms: Forms) -> Iterator[object]:
    schema = unified([d.about.schema for d in held])
    together = joined(held, sorted({name for d in held for name in d.role_names}))
    of_documents = [label for label in labels if label in together.about.column_names]
    values = {
        label: set(pc.unique(together.about.column(label))[: LABEL_VALUES + 1].to_pylist()) for label in of_documents
    }
    found = Found(together.sizes.rows, together.role_names, schema, values, together.labels.names, forms)
    parts = split(together, bounds)
    yield found
    for part in parts:  # noqa: UP028 one by one: Ray sends to the generator, which a list has no use for
        yield part


def order_bucket(role_names: Sequence[str], *parts: Documents) -> tuple[Documents, Sizes, Skipped, LabelValues]:
    return _described(in_order(parts, role_names))


def cut_bucket(rows: int, documents: Documents) -> tuple[Documents, Sizes, Skipped, LabelValues]:
    return _described(first_rows(documents, rows))


def _described(documents: Documents) -> tuple[Documents, Sizes, Skipped, LabelValues]:
    return documents, documents.sizes, Skipped.of(documents.left_out), documents.labels.used(documents.is_row)


def unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"corpus.labels, corpus.columns: the files do not agree on a column's type: {error}; give it one type in "
            "all of them, as by writing its values as texts"
        ) from None
