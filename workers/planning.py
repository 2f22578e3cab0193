"""The plan: from a spec's corpus to the store's table of rows.

Small corpora are planned in this process, large ones as Ray tasks: by the same functions (`workers.tabling`), with the
same result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.corpora.chat import needs_day
from pipeline.corpora.files import fingerprint
from pipeline.corpora.named import NamedDataset
from pipeline.corpora.open import Corpus, check_label_names, open_corpora
from pipeline.corpora.patience import Unread
from pipeline.corpora.recipe import ChatOptions, Recipe, make_encoder
from pipeline.corpora.records import Columns
from pipeline.errors import InputError
from pipeline.models import (
    ModelInfo,
    context_token,
    describe_model,
    load_tokenizer,
    pin_tokenizer,
    tokenizer_digest,
    vocabulary_token,
)
from pipeline.round_trip import check_round_trip, sample_texts
from pipeline.rows import ContextPolicy
from pipeline.token_labels import Names
from storage.create import TableFiles, corpus_digest, new_store, refuse_if_taken
from storage.growth import grown_table, settle
from storage.places import Place, open_place
from storage.records import Record
from storage.root import CorpusInfo
from storage.store import Store, open_store
from workers.matching import growth_of, refuse_growth, source_words, table_settings
from workers.settings import CorpusSettings, ModelSettings
from workers.stored_tokenizer import check_tokenizer
from workers.table_writing import write_table
from workers.tabling import Cuts, Progress, TablePlan, plan_table, planning_ended
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
    """Tokens that the model has embeddings for."""
    bos: int | None
    """The token that contexts begin with."""
    excluded: tuple[int, ...]
    separator: int | None
    day: str | None = None
    """YYYY-MM-DD, for chat templates that ask for the day; None for a store that was made before its day was kept."""
    made_with: Record = field(default_factory=dict)
    """Where the tokenizer was found."""
    known_as: str | None = None
    """The digest under which a store knows the tokenizer; its own, if not given."""

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
            "bos": self.bos,
            "tokenizer": self.known_as or tokenizer_digest(self.tokenizer),
            **self._tokens_as(),
            **self._chat_template(),
            **({} if self.day is None else {"chat_date": self.day}),
            "source": [
                fingerprint(corpus.files) if isinstance(corpus, Corpus) else corpus.identity for corpus in self.corpora
            ],
        }

    def _tokens_as(self) -> Record:
        """How tokens are read, where that is not the only way. A store from before there was a choice has none of
        these keys: its texts were read with their control strings as tokens."""
        return {
            **({"specials": "text"} if self.settings.specials == "text" and self.settings.tokens is None else {}),
            **({"exclude_tokens": list(self.excluded)} if self.excluded else {}),
            **({} if self.separator is None else {"separator": self.separator}),
        }

    def identity_beside(self, stored: Record) -> Record:
        """The identity, to be compared with the plan of a store. Those made before files at URLs were told by their
        versions hold samples of the content, which then have to be fetched (docs/decisions/0019)."""
        pairs = zip(self.identity["source"], stored["source"], strict=False)
        if stored == self.identity or not any("versions" in new and "sha256" in old for new, old in pairs):
            return self.identity
        source = list(self.identity["source"])
        for number, (corpus, old) in enumerate(zip(self.corpora, stored["source"], strict=False)):
            if isinstance(corpus, Corpus) and "sha256" in old:
                source[number] = fingerprint(corpus.files, by_content=True)
        return {**self.identity, "source": source}

    def _chat_template(self) -> Record:
        return {"chat_template": self.tokenizer.chat_template} if self.settings.messages else {}

    def as_in(self, store: Store) -> "Source":
        """The same with the tokenizer as a store knows it, and on the day on which it was planned unless the spec names
        one. Raises InputError if the store was planned with another tokenizer."""
        known_as = check_tokenizer(store, self.tokenizer, self._tokenizer_name)
        keeps_day = self.day is None or self.settings.chat_date is not None
        return replace(self, known_as=known_as, day=self.day if keeps_day else store.info.plan.get("chat_date"))

    @property
    def _tokenizer_name(self) -> str:
        return str(self.made_with.get("tokenizer", "the spec"))

    def check_round_trip(self) -> None:
        """Raise InputError for a tokenizer that does not give the corpus' own texts back. Reads the first of them."""
        kind, _ = self.settings.content
        if kind != "tokens":
            check_round_trip(self.tokenizer, sample_texts(self._contents(), kind), self._tokenizer_name)

    def _contents(self) -> Iterator[Sequence[Any]]:
        for corpus in self.corpora:
            if isinstance(corpus, NamedDataset):
                yield from (chunk.contents for chunk in corpus.chunks())
                continue
            for number, file in enumerate(corpus.files):
                for piece in corpus.format.pieces(number, file):
                    yield from (chunk.contents for chunk in corpus.chunks(piece))

    def recipe(self) -> Recipe:
        """How records become documents. Raises InputError."""
        if self.bos is not None and self.bos >= self.vocabulary:
            raise InputError(
                f"the tokenizer's BOS is token {self.bos} and the model has an embedding of {self.vocabulary}: they do "
                "not belong together; give model.tokenizer the model's own"
            )
        settings = self.settings
        kind, _ = settings.content
        chat = ChatOptions(
            markers=settings.markers,
            day=self.day,
            names_day=settings.chat_date is not None,
            arguments=settings.template_arguments,
            roles_asked=bool(settings.roles),
        )
        encoder = make_encoder(kind, self.tokenizer, self.vocabulary, self.bos, settings.specials, self.separator, chat)
        policy = ContextPolicy(settings.context, settings.skip_first, self.bos, self.excluded)
        return Recipe(encoder, policy, settings.seed, settings.roles, self.vocabulary, settings.labels)

    def tasks(self, connect: Callable[[], None] | None) -> Tasks:
        """Where to plan: here what is small, or where Ray cannot be had; else on Ray, which `connect` brings up."""
        if connect is None or self.is_small:
            return Here()
        connect()
        return OnRay("planning")


def open_source(settings: CorpusSettings, model: ModelSettings, vocabulary: int, commit: str | None = None) -> Source:
    """Find the corpus and load the tokenizer. `vocabulary`: tokens of the model's embedding. `commit`: the model's, if
    it is known already. Raises InputError."""
    kind, column = settings.content
    columns = Columns(column, kind, settings.labels, settings.columns, settings.tools)
    corpora: Sequence[Corpus | NamedDataset]
    if settings.format == "datasets":
        check_label_names(columns)
        corpora = [NamedDataset(settings.path[0], settings.subset, settings.split, columns)]
    else:
        corpora = open_corpora(settings.path, columns, settings.format)
    name, revision = model.tokenizer_place(commit or model.revision)
    revision = pin_tokenizer(name, revision)
    tokenizer = load_tokenizer(name, revision)
    excluded = {vocabulary_token(tokenizer, token, "corpus.exclude_tokens") for token in settings.exclude_tokens}
    separator = settings.separator
    return Source(
        settings,
        corpora,
        tokenizer,
        vocabulary,
        bos=context_token(tokenizer, settings.bos),
        excluded=tuple(sorted(excluded)),
        separator=None if separator is None else vocabulary_token(tokenizer, separator, "corpus.separator"),
        day=_day(settings, tokenizer),
        made_with={"tokenizer": name, "tokenizer_revision": revision},
    )


def _day(settings: CorpusSettings, tokenizer: Any) -> str | None:
    """The day for chats, where their template asks for one."""
    if settings.messages is None or not getattr(tokenizer, "chat_template", None):
        return None
    if not needs_day(tokenizer, settings.template_arguments, settings.chat_date is not None):
        return None
    return settings.chat_date or today()


def today() -> str:
    return date.today().isoformat()


def plan_rows(
    source: Source,
    progress: Progress,
    tasks: Tasks,
    cuts: Cuts | None = None,
    roles: Sequence[str] = (),
    labels: Names | None = None,
) -> TablePlan:
    """Read, tokenise and lay out the corpus; write nothing. `roles`, `labels`: see `plan_table`. Raises InputError."""
    recipe, rows = source.recipe(), source.settings.rows
    try:
        source.check_round_trip()
    except Unread as error:
        raise planning_ended(error, 0, rows) from error
    return plan_table(source.corpora, recipe, rows, tasks, progress, cuts or Cuts(), roles, labels)


def ensure_store(
    url: str | Path,
    corpus: CorpusSettings,
    model: ModelSettings,
    progress: Progress,
    check: Callable[[int], None] = lambda num_rows: None,
    connect: Callable[[], None] | None = None,
    grow: bool = False,
    info: ModelInfo | None = None,
) -> tuple[Store, bool]:
    """Open the store at `url` if its table is the one the spec describes, else make it, or with `grow` append to it
    what is missing. Return whether anything was written.

    `check` is given the number of rows that are new before anything is written; `connect` brings up Ray, for a large
    corpus; `info` is the model's, where it was described already. Raises StoreMismatch, showing both values, when the
    store there has another table.
    """
    info = info or describe_model(model.id, model.revision)
    info.check_context(corpus.context)
    source = open_source(corpus, model, info.vocabulary, info.revision)
    place = open_place(url)
    if (place / "zarr.json").exists():
        if grow:
            settle(place)
        store = open_store(place)
        source = source.as_in(store)
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
    plan = plan_rows(source, progress, tasks, roles=store.info.roles, labels=store.info.values_of_rows)
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
        labels=[label for label in settings.labels if label not in plan.label_names],
        roles=plan.role_names,
        corpus_digest=corpus_digest(digests),
        tokenizer_digest=source.identity["tokenizer"],
        plan=source.identity,
        skipped=plan.skipped.to_record(),
        made_with={**versions(), **source.made_with},
        segments=[
            {"rows": segment.rows, "documents": segment.documents, "of": source_words(of)}
            for segment, of in zip(segments, source.identity["source"], strict=True)
        ],
        row_labels=[{"label": label, "values": list(values)} for label, values in plan.label_names.items()],
    )


def held_out_start(num_rows: int, rows_per_unit: int, share: float) -> int:
    """The first held-out row: a unit boundary that leaves at least `share` of the rows behind it (the last unit may be
    short), and at least one unit before it. `num_rows` when nothing is held out, or all rows are in one unit."""
    if share == 0 or num_rows <= rows_per_unit:
        return num_rows
    return max(1, int(num_rows * (1 - share)) // rows_per_unit) * rows_per_unit
