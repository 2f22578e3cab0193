"""The plan: from a spec's corpus to the store's table of rows.

Small corpora are planned in this process, large ones as Ray tasks: by the same functions (`workers.tabling`), with the
same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.corpora.files import fingerprint
from pipeline.corpora.named import NamedDataset
from pipeline.corpora.open import Corpus, check_label_names, open_corpora
from pipeline.corpora.recipe import Recipe, make_recipe
from pipeline.corpora.records import Columns
from pipeline.errors import InputError
from pipeline.models import describe_model, load_tokenizer, tokenizer_digest
from pipeline.rows import ContextPolicy
from storage.create import TableFiles, corpus_digest, new_store, refuse_if_taken
from storage.growth import grown_table, settle
from storage.places import Place, open_place
from storage.records import Record
from storage.root import CorpusInfo
from storage.store import Store, open_store
from workers.matching import growth_of, refuse_growth, source_words, table_settings
from workers.settings import CorpusSettings, ModelSettings, check_tokenizer
from workers.table_writing import write_table
from workers.tabling import Cuts, Progress, TablePlan, plan_table
from workers.tasks import Here, OnRay, Tasks
from workers.versions import versions

SMALL_BYTES = 64 * 2**20
"""Corpora below this are planned in the process itself, with the tokenizer's own threads: no Ray has to be started."""
SMALL_ROWS = 2**24
"""The same for datasets that are streamed."""


@dataclass(frozen=True)
class Source:
    """Where rows come from, checked as far as that goes without reading records."""

    settings: CorpusSettings
    corpora: Sequence[Corpus | NamedDataset]
    """One for each entry of corpus.path."""
    tokenizer: Any
    vocabulary: int

    @property
    def is_small(self) -> bool:
        num_bytes = sum(corpus.num_bytes for corpus in self.corpora if isinstance(corpus, Corpus))
        is_streamed = any(isinstance(corpus, NamedDataset) for corpus in self.corpora)
        return num_bytes < SMALL_BYTES and not (is_streamed and (self.settings.rows or 0) >= SMALL_ROWS)

    @cached_property
    def identity(self) -> Record:
        """What determines the table of rows: settings and sources, not places."""
        return {
            **table_settings(self.settings),
            "bos": self.tokenizer.bos_token_id,
            "tokenizer": tokenizer_digest(self.tokenizer),
            **self._chat_template(),
            "source": [
                fingerprint(corpus.files) if isinstance(corpus, Corpus) else corpus.identity for corpus in self.corpora
            ],
        }

    def identity_beside(self, stored: Record) -> Record:
        """The identity, to be compared with the plan of a store. Those made before files at URLs were told by their
        versions hold samples of the content, which then have to be fetched (docs/decisions/0019)."""
        told: list[Record] = []
        for number, (corpus, source) in enumerate(zip(self.corpora, self.identity["source"], strict=True)):
            had = stored["source"][number] if number < len(stored["source"]) else {}
            if isinstance(corpus, Corpus) and "versions" in source and "sha256" in had:
                source = fingerprint(corpus.files, by_content=True)
            told.append(source)
        return {**self.identity, "source": told}

    def _chat_template(self) -> Record:
        return {"chat_template": self.tokenizer.chat_template} if self.settings.messages else {}

    def recipe(self) -> Recipe:
        """How records become documents. Raises InputError."""
        if len(self.tokenizer) > self.vocabulary:
            raise InputError(
                f"the tokenizer has {len(self.tokenizer)} tokens and the model an embedding of {self.vocabulary}: "
                "they do not belong together; give model.tokenizer the model's own"
            )
        settings = self.settings
        policy = ContextPolicy(settings.context, settings.skip_first, self.tokenizer.bos_token_id)
        kind, _ = settings.content
        return make_recipe(kind, self.tokenizer, self.vocabulary, policy, settings.seed, settings.roles)

    def tasks(self, connect: Callable[[], None] | None) -> Tasks:
        """Where to plan: here what is small, or where Ray cannot be had; else on Ray, which `connect` brings up."""
        if connect is None or self.is_small:
            return Here()
        connect()
        return OnRay("planning")


def open_source(settings: CorpusSettings, model: ModelSettings, vocabulary: int) -> Source:
    """Find the corpus and load the tokenizer. `vocabulary`: tokens of the model's embedding. Raises InputError."""
    kind, column = settings.content
    columns = Columns(column, kind, settings.labels)
    corpora: Sequence[Corpus | NamedDataset]
    if settings.format == "datasets":
        check_label_names(columns)
        corpora = [NamedDataset(settings.path[0], settings.subset, settings.split, columns)]
    else:
        corpora = open_corpora(settings.path, columns, settings.format)
    tokenizer = load_tokenizer(model.tokenizer or model.id, model.revision)
    return Source(settings, corpora, tokenizer, vocabulary)


def plan_rows(
    source: Source, progress: Progress, tasks: Tasks, cuts: Cuts | None = None, roles: Sequence[str] = ()
) -> TablePlan:
    """Read, tokenise and lay out the corpus; write nothing. `roles`: see `plan_table`. Raises InputError."""
    return plan_table(source.corpora, source.recipe(), source.settings.rows, tasks, progress, cuts or Cuts(), roles)


def ensure_store(
    url: str | Path,
    corpus: CorpusSettings,
    model: ModelSettings,
    progress: Progress,
    check: Callable[[int], None] = lambda num_rows: None,
    connect: Callable[[], None] | None = None,
    grow: bool = False,
) -> tuple[Store, bool]:
    """Open the store at `url` if its table is the one the spec describes, else make it, or with `grow` append to it
    what is missing. Return whether anything was written.

    `check` is given the number of rows that are new before anything is written; `connect` brings up Ray, for a large
    corpus. Raises StoreMismatch, showing both values, when the store there has another table.
    """
    info = describe_model(model.id, model.revision)
    info.check_context(corpus.context)
    source = open_source(corpus, model, info.vocabulary)
    place = open_place(url)
    if (place / "zarr.json").exists():
        if grow:
            settle(place)
        store = open_store(place)
        check_tokenizer(source.identity["tokenizer"], store.info.tokenizer_digest, model.tokenizer or model.id)
        identity = source.identity_beside(store.info.plan)
        growth = growth_of(store, identity)
        if growth is None:
            return store, False
        if not grow:
            raise refuse_growth(store, identity, growth)
        return _grow(store, source, progress, check, source.tasks(connect)), True
    refuse_if_taken(place)  # before the corpus is read, which can take hours
    tasks = source.tasks(connect)
    plan = plan_rows(source, progress, tasks)
    check(plan.sizes.rows)
    return write_plan(place, source, plan, tasks), True


def write_plan(place: Place, source: Source, plan: TablePlan, tasks: Tasks) -> Store:
    """Write planned rows as a new store."""
    unit_size = source.settings.unit_size(plan.sizes.rows)
    with new_store(place, source.identity) as draft:
        return draft.finish(_write(source, plan, draft.begin_table(plan.table_sizes), tasks, unit_size))


def _grow(store: Store, source: Source, progress: Progress, check: Callable[[int], None], tasks: Tasks) -> Store:
    """Plan the whole table again, and put it in place of the store's, of which it must be a continuation."""
    plan = plan_rows(source, progress, tasks, roles=store.info.roles)
    check(plan.sizes.rows - store.num_rows)
    with grown_table(store) as draft:
        files = draft.begin_table(plan.table_sizes)
        return draft.finish(_write(source, plan, files, tasks, store.info.rows_per_unit))


def _write(source: Source, plan: TablePlan, files: TableFiles, tasks: Tasks, unit_size: int) -> CorpusInfo:
    """Write a table; return what the root record is to say of it."""
    settings, sizes = source.settings, plan.sizes
    digests = write_table(plan, files, tasks)
    files.write_tokenizer(lambda folder: source.tokenizer.save_pretrained(folder))
    segments = [plan.segment(number) for number in range(len(source.corpora))]
    return CorpusInfo(
        num_rows=sizes.rows,
        num_contexts=sizes.contexts,
        num_context_tokens=sizes.context_tokens,
        num_documents=sizes.documents,
        rows_per_unit=unit_size,
        context=settings.context,
        skip_first=settings.skip_first,
        held_out_start=held_out_start(sizes.rows, unit_size, settings.holdout),
        labels=list(settings.labels),
        roles=plan.role_names,
        corpus_digest=corpus_digest(digests),
        tokenizer_digest=source.identity["tokenizer"],
        plan=source.identity,
        skipped=plan.skipped.to_record(),
        made_with=versions(),
        segments=[
            {"rows": segment.rows, "documents": segment.documents, "of": source_words(of)}
            for segment, of in zip(segments, source.identity["source"], strict=True)
        ],
    )


def held_out_start(num_rows: int, rows_per_unit: int, share: float) -> int:
    """The first held-out row: a unit boundary that leaves at least `share` of the rows behind it (the last unit may be
    short), and at least one unit before it. `num_rows` when nothing is held out, or all rows are in one unit."""
    if share == 0 or num_rows <= rows_per_unit:
        return num_rows
    return max(1, int(num_rows * (1 - share)) // rows_per_unit) * rows_per_unit
