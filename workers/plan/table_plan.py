"""Making the table of rows from a corpus of any size, in bounded memory.

1. Read: each part of a corpus is read, tokenised and cut into contexts, and parted by ranges of keys (buckets). Of
   several corpora each is a segment of the table: its buckets come after those of the ones before it.
2. Order: what was read of a bucket is put in the order of its keys.
3. The sizes of the buckets say where in the table each begins.
4. Write (`workers.plan.write_table`): each chunk of each array, and each file of documents, by one call.

A call holds a part of the corpus or a bucket, never more. The calls are functions of their arguments and may be run
anywhere (`workers.cluster.tasks`); the table does not depend on how the corpus and the keys are cut
(docs/decisions/0006-planning.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.corpus.documents import (
    NO_ROWS,
    Sizes,
)
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.open import Corpus
from pipeline.corpus.formats.records import Piece, no_value
from pipeline.corpus.recipe import Recipe
from pipeline.corpus.skipped import Skipped
from pipeline.corpus.sources.retry import Unread
from pipeline.corpus.token_labels import LabelValues, all_names, disagreement
from pipeline.errors import InputError
from storage.make.create import TableSizes
from workers.cluster.tasks import Handle, Tasks
from workers.plan.calls import LABEL_VALUES, Cuts, Forms, cut_bucket, order_bucket, read_pieces, read_stream, unified

ALL_KEYS = 2**64
BYTES_PER_ROW = 8
"""Bytes of text for which at least one row is expected: a guess that is rather too large takes a part of the corpus
that is rather too large. What is found says how much more is needed."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bucket:
    segment: int
    """The number of the corpus that it is a part of."""
    documents: Handle
    sizes: Sizes
    skipped: Skipped
    label_names: LabelValues
    """The values that its rows have of each label of tokens."""


@dataclass
class TablePlan:
    """The table of rows, in buckets, before it is written."""

    buckets: list[Bucket] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    role_names: list[str] = field(default_factory=list)
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    label_names: LabelValues = field(default_factory=dict)
    """The values of each label of tokens, in the order of their numbers."""

    @property
    def sizes(self) -> Sizes:
        return sum((bucket.sizes for bucket in self.buckets), Sizes(0, 0, 0, 0))

    def segment(self, number: int) -> Sizes:
        """The sizes of what one of the corpora gave."""
        return sum((bucket.sizes for bucket in self.buckets if bucket.segment == number), Sizes(0, 0, 0, 0))

    @property
    def table_sizes(self) -> TableSizes:
        sizes = self.sizes
        return TableSizes(
            sizes.rows,
            sizes.contexts,
            sizes.context_tokens,
            sizes.documents,
            has_roles=bool(self.role_names),
            row_labels=tuple(self.label_names),
        )


def plan_table(
    corpora: Sequence[Corpus | NamedDataset],
    recipe: Recipe,
    rows: int | None,
    tasks: Tasks,
    progress: Progress,
    cuts: Cuts,
    roles: Sequence[str] = (),
    labels: LabelValues | None = None,
) -> TablePlan:
    """Read, tokenise and order corpora, which follow one another. `roles`, `labels`: those roles, and values of labels
    of tokens, that have numbers already. Raises InputError, also when there are no rows, or fewer than `rows`."""
    reading = _Reading(tasks.share(recipe), rows, tasks, progress)
    try:
        for segment, corpus in enumerate(corpora):
            if rows is None or reading.rows < rows:
                reading.read(corpus, segment, cuts)
    except Unread as error:
        raise planning_ended(error, reading.rows, rows) from error
    plan = reading.ordered(roles, labels or {})
    nothing = {field.name for field in plan.schema if pa.types.is_null(field.type)}
    if absent := [name for name in recipe.kept if name in nothing]:
        names = ", ".join(absent)
        raise InputError(f"corpus.columns: no record has a value for {names}; mend the name, or leave it out")
    found = plan.sizes.rows
    if found == 0:
        where = "; ".join(corpus.summary for corpus in corpora)
        raise InputError(f"the corpus gives no rows: {_why_none(plan, recipe)} ({where})")
    if rows is not None and found < rows:
        raise InputError(
            f"corpus.rows asks for {rows:,} rows and the corpus has {found:,}: ask for at most that many, "
            "or leave corpus.rows out to take them all"
        )
    return plan


def planning_ended(error: Unread, found: int, rows: int | None) -> Unread:
    """What ended the reading of a corpus, and how far planning had come: to `found` of the `rows` asked for."""
    said = getattr(error, "cause", error)  # Ray wraps what a task raised
    of_all = "" if rows is None else f" of {rows:,}"
    return Unread(f"{said}. Planning had found {found:,}{of_all} rows by then; nothing was written")


def _why_none(plan: TablePlan, recipe: Recipe) -> str:
    counts = plan.skipped.counts
    said = {reason: f" (the first: {words})" for reason, (_, words) in plan.skipped.said.items()}
    left_out = [f"{count:,} for {reason!r}{said.get(reason, '')}" for reason, count in counts.items()]
    why = f"its records are left out, {', '.join(left_out)}" if left_out else "it has no records"
    if NO_ROWS not in counts:
        return why
    return (
        f"{why}; corpus.roles asks for {', '.join(recipe.roles)} and its messages are of {', '.join(plan.role_names)}"
    )


class _Reading:
    """What has been read so far: the parts of each bucket, and what they amount to."""

    def __init__(self, recipe: Handle, max_rows: int | None, tasks: Tasks, progress: Progress):
        self.recipe, self.max_rows, self.tasks, self.progress = recipe, max_rows, tasks, progress
        self.rows = 0
        self.parts: list[tuple[int, list[Handle]]] = []  # of each bucket: its segment, and what was read of it
        self.role_names: set[str] = set()
        self.label_names: LabelValues = {}
        self.schemas: list[pa.Schema] = []
        self.label_values: dict[str, set[Any]] = {}
        self.forms = Forms()

    def read(self, corpus: Corpus | NamedDataset, segment: int, cuts: Cuts) -> None:
        """Read as much of a corpus as is needed."""
        shared = self.tasks.share(corpus)
        if isinstance(corpus, NamedDataset):
            assert self.max_rows is not None
            bounds = _buckets(0, ALL_KEYS, self.max_rows * BYTES_PER_ROW, cuts)
            self._take(segment, bounds, [(read_stream, shared, self.max_rows)], cuts)
            return
        pieces = corpus.pieces()
        num_bytes = sum(piece.num_bytes for piece in pieces)
        before, low = self.rows, 0
        wanted = None if self.max_rows is None else self.max_rows - before
        while low < ALL_KEYS and (wanted is None or self.rows - before < wanted):
            high = _next_key(low, self.rows - before, wanted, num_bytes)
            bounds = _buckets(low, high, num_bytes * (high - low) // ALL_KEYS, cuts)
            parts = [(read_pieces, shared, group) for group in _grouped(pieces, cuts)]
            self._take(segment, bounds, parts, cuts)
            low = high

    def _take(
        self,
        segment: int,
        bounds: list[int],
        reads: Sequence[tuple[Callable[..., Iterator[object]], object, object]],
        cuts: Cuts,
    ) -> None:
        """Read one range of keys, cut into buckets at `bounds`, from every part of a corpus."""
        parts: list[list[Handle]] = [[] for _ in bounds[1:]]
        streams = [self.tasks.stream(read, self.recipe, corpus, what, bounds, cuts) for read, corpus, what in reads]
        for stream in streams:
            for handle in stream:
                (found,) = self.tasks.get([handle])
                for bucket in parts:
                    bucket.append(next(stream))
                self.rows += found.rows
                self.role_names.update(found.role_names)
                self._count_labels(found.label_values)
                self.label_names = all_names([self.label_names, found.label_names])
                self.forms.add(found.forms)
                self.schemas = [unified([*self.schemas, found.schema])]
                _check_forms(self.label_names, self.schemas[0])
                self.progress(min(self.rows, self.max_rows or self.rows), self.max_rows or 0)
        self.parts += [(segment, bucket) for bucket in parts if bucket]

    def _count_labels(self, values: dict[str, set[Any]]) -> None:
        for label, found in values.items():
            known = self.label_values.setdefault(label, set())
            known |= found
            if len(known) > LABEL_VALUES:
                examples = ", ".join(repr(value) for value in sorted(known, key=str)[:3])
                raise InputError(
                    f"corpus.labels: {label!r} has more than {LABEL_VALUES:,} values ({examples} ...), and means are "
                    f"kept for each at every site; to keep it beside the documents without, name it in corpus.columns"
                )

    def ordered(self, roles: Sequence[str], labels: LabelValues) -> TablePlan:
        """Put the documents of each bucket in order, as many buckets as are needed. Raises InputError for a label of
        documents that has no value in a part of the corpus."""
        for label, where in self.forms.untold.items():
            if label not in self.forms.told:
                raise no_value(label, where)
        role_names = [*roles, *sorted(self.role_names.difference(roles))]
        plan = TablePlan(role_names=role_names, schema=(self.schemas or [pa.schema([])])[0])
        segments = [segment for segment, _ in self.parts]
        calls = [self.tasks.call(order_bucket, role_names, *bucket, returns=4) for _, bucket in self.parts]
        self.parts.clear()  # Ray keeps what is still to be read, and nothing longer
        missing = self.max_rows
        for segment, (documents, *about) in zip(segments, calls, strict=True):
            bucket = Bucket(segment, documents, *self.tasks.get(about))
            if missing is not None and bucket.sizes.rows >= missing:
                documents, *about = self.tasks.call(cut_bucket, missing, documents, returns=4)
                bucket = Bucket(segment, documents, *self.tasks.get(about))
            plan.buckets.append(bucket)
            if missing is not None:
                missing -= bucket.sizes.rows
                if missing == 0:
                    break
        plan.skipped = Skipped.sum(bucket.skipped for bucket in plan.buckets)
        plan.buckets = [bucket for bucket in plan.buckets if bucket.sizes.rows]
        plan.label_names = all_names([bucket.label_names for bucket in plan.buckets], labels)
        _check_forms(plan.label_names, plan.schema)
        return plan


def _next_key(low: int, found: int, wanted: int | None, num_bytes: int) -> int:
    """Up to which key to read next: all keys, or as many as will hold the rows that are wanted."""
    if wanted is None or num_bytes == 0:
        return ALL_KEYS
    if low == 0:
        return min(ALL_KEYS, max(1, ALL_KEYS * wanted * BYTES_PER_ROW // num_bytes))
    if found == 0:
        return ALL_KEYS
    more = (wanted - found) * low // found
    return min(ALL_KEYS, low + more + more // 10 + low // 20)


def _buckets(low: int, high: int, num_bytes: int, cuts: Cuts) -> list[int]:
    number = max(1, -(-num_bytes // cuts.bucket_bytes))
    return [low + (high - low) * i // number for i in range(number + 1)]


def _grouped(pieces: Sequence[Piece], cuts: Cuts) -> list[list[Piece]]:
    """Pieces in their order, about `task_bytes` together."""
    groups: list[list[Piece]] = []
    size = cuts.task_bytes
    for piece in pieces:
        if size >= cuts.task_bytes or len(groups[-1]) == cuts.task_pieces:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.num_bytes
    return groups


def _check_forms(label_names: LabelValues, schema: pa.Schema) -> None:
    """Raise InputError for a label that some files have as spans or tokens and others as single values."""
    for label in label_names:
        if label in schema.names:
            raise disagreement(label)
