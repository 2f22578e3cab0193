"""Where the rows of a table come from: the corpus and the tokenizer that a spec names, and what they determine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import chain, islice
from typing import Any

from pipeline.capture.contexts import ContextPolicy
from pipeline.checkpoints.hub import is_commit, local_folder
from pipeline.checkpoints.repository_names import check_dataset_address
from pipeline.corpus.chats.encode import ChatEncoder, needs_day
from pipeline.corpus.chats.messages import WithTools
from pipeline.corpus.encode import Encoder, TextEncoder, TokensEncoder, check_token_lists
from pipeline.corpus.formats.json_lines import PIECE_BYTES, JsonLines
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.open import Corpus, check_label_names, open_corpora
from pipeline.corpus.formats.records import Columns, Piece
from pipeline.corpus.recipe import Recipe
from pipeline.corpus.round_trip import check_round_trip, sample_texts
from pipeline.corpus.sources.files import fingerprint
from pipeline.errors import InputError
from pipeline.tokens.tokenizer import (
    check_chat_template,
    context_token,
    load_tokenizer,
    pin_tokenizer,
    tokenizer_digest,
    vocabulary_token,
)
from storage.format.records import Record
from storage.store import Store
from workers.cluster.tasks import Here, OnRay, Tasks
from workers.plan.match import table_settings
from workers.plan.stored_tokenizer import check_tokenizer
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

FIRST_RECORDS = 1000
"""Records that are looked at before all are read. Where corpus.tools names a column, one of them must have tools."""
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
    tokenizer_place: tuple[str, str] = ("the spec", "main")
    """The folder or repository that the tokenizer was found in, and its revision there."""
    known_as: str | None = None
    """The digest under which a store knows the tokenizer; its own, if not given."""

    @property
    def is_small(self) -> bool:
        num_bytes = sum(corpus.num_bytes for corpus in self.corpora if isinstance(corpus, Corpus))
        is_streamed = any(isinstance(corpus, NamedDataset) for corpus in self.corpora)
        return num_bytes < SMALL_BYTES and not (is_streamed and (self.settings.rows or 0) >= SMALL_ROWS)

    @cached_property
    def identity(self) -> Record:
        """What determines the table of rows: settings and sources, not places. Reads files for what tells them."""
        return {
            **self.settings_identity,
            "source": [
                fingerprint(corpus.files) if isinstance(corpus, Corpus) else corpus.identity for corpus in self.corpora
            ],
        }

    @cached_property
    def settings_identity(self) -> Record:
        """What determines the table of rows beside its sources: settings as they were resolved, and the tokenizer."""
        return {
            **table_settings(self.settings),
            "bos": self.bos,
            "tokenizer": self.known_as or tokenizer_digest(self.tokenizer),
            **self._tokens_as(),
            **self._chat_template(),
            **({} if self.day is None else {"chat_date": self.day}),
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
        known_as = check_tokenizer(store, self.tokenizer, self.tokenizer_place[0])
        keeps_day = self.day is None or self.settings.chat_date is not None
        return replace(self, known_as=known_as, day=self.day if keeps_day else store.info.plan.get("chat_date"))

    def token_string(self, token: int) -> str | None:
        """The string of a token, as the vocabulary spells it."""
        string: str | None = self.tokenizer.backend_tokenizer.id_to_token(token)
        return string

    @property
    def made_with(self) -> Record:
        """What the store records of a tokenizer on the hub."""
        name, revision = self.tokenizer_place
        return {"tokenizer": name, "tokenizer_revision": revision} if is_commit(revision) else {}

    def check_first_records(self) -> None:
        """Raise InputError for what the first records show: a column of tokens that holds none, a tokenizer that does
        not give their texts back, tools that no chat has."""
        kind, column = self.settings.content
        first = islice(chain.from_iterable(self._contents()), FIRST_RECORDS)
        if kind == "tokens":
            check_token_lists(first, column)
            return
        tools_seen: list[bool] = []  # of each record that was read
        records = _noting_tools(first, tools_seen)
        check_round_trip(self.tokenizer, sample_texts([records], kind), self.tokenizer_place[0])
        if self.settings.tools is None or any(tools_seen):
            return
        for _ in records:
            if tools_seen[-1]:
                return
        if tools_seen:
            raise InputError(
                f"corpus.tools: none of the first {len(tools_seen):,} chats has {self.settings.tools!r}; mend the "
                "name, or leave the key out"
            )

    def _contents(self) -> Iterator[Sequence[Any]]:
        """The contents of records, from the first on. Of a large file only the beginning is looked for."""
        for corpus in self.corpora:
            if isinstance(corpus, NamedDataset):
                yield from (chunk.contents for chunk in corpus.chunks())
                continue
            for number, file in enumerate(corpus.files):
                is_large = isinstance(corpus.format, JsonLines) and file.num_bytes > PIECE_BYTES
                head = [Piece(number, 0, PIECE_BYTES, 1, PIECE_BYTES)]  # cutting it into pieces reads all of it
                for piece in head if is_large else corpus.format.pieces(number, file):
                    try:
                        yield from (chunk.contents for chunk in corpus.chunks(piece))
                    except InputError:
                        if not is_large:
                            raise

    def recipe(self) -> Recipe:
        """How records become documents. Raises InputError."""
        if self.bos is not None and self.bos >= self.vocabulary:
            raise InputError(
                f"the tokenizer's BOS is token {self.bos} and the model has an embedding of {self.vocabulary}: they do "
                "not belong together; give model.tokenizer the model's own"
            )
        settings = self.settings
        policy = ContextPolicy(settings.context, settings.skip_first, self.bos, self.excluded)
        return Recipe(
            self._encoder(), policy, settings.seed, settings.roles, self.vocabulary, settings.labels, settings.columns
        )

    def _encoder(self) -> Encoder:
        """What makes tokens of records. Raises InputError for chats where the tokenizer has no template."""
        settings = self.settings
        kind, _ = settings.content
        if kind == "text":
            return TextEncoder(self.tokenizer, self.bos, settings.specials)
        if kind == "tokens":
            return TokensEncoder(self.vocabulary, self.bos, self.separator)
        return ChatEncoder(
            self.tokenizer,
            self.bos,
            settings.specials,
            markers=settings.markers,
            day=self.day,
            names_day=settings.chat_date is not None,
            arguments=settings.template_arguments,
            roles_asked=bool(settings.roles),
        )

    def tasks(self, connect: Callable[[], None] | None) -> Tasks:
        """Where to plan: here what is small, or where Ray cannot be had; else on Ray, which `connect` brings up."""
        if connect is None or self.is_small:
            return Here()
        connect()
        return OnRay("planning")


def _noting_tools(records: Iterable[Any], found: list[bool]) -> Iterator[Any]:
    """The records; of each that was taken `found` has whether there are tools beside it."""
    for record in records:
        found.append(isinstance(record, WithTools) and record.tools is not None)
        yield record


def columns_of(settings: CorpusSettings) -> Columns:
    kind, column = settings.content
    return Columns(column, kind, settings.labels, settings.columns, settings.tools)


def open_source(settings: CorpusSettings, model: ModelSettings, vocabulary: int, commit: str) -> Source:
    """Find the corpus and load the tokenizer. `vocabulary`: tokens of the model's embedding. `commit`: the model's, as
    `describe_model` resolved it for this run. Raises InputError."""
    columns = columns_of(settings)
    corpora: Sequence[Corpus | NamedDataset]
    for path in settings.path:
        check_dataset_address(path, is_named=settings.format == "datasets")
    if settings.format == "datasets":
        check_label_names(columns)
        corpora = [NamedDataset(settings.path[0], settings.subset, settings.split, columns)]
    else:
        corpora = open_corpora(settings.path, columns, settings.format)
    check_revisions(model)
    name, revision = model.tokenizer_place(commit)
    revision = pin_tokenizer(name, revision)
    tokenizer = load_tokenizer(name, revision)
    if settings.messages is not None:
        check_chat_template(tokenizer, name)
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
        tokenizer_place=(name, revision),
    )


def check_revisions(model: ModelSettings) -> None:
    """Raise InputError for a revision of a folder, of which there is what is in it and nothing else."""
    named = [
        ("model.revision", model.revision, model.id, "main"),
        ("model.tokenizer_revision", model.tokenizer_revision, model.tokenizer, None),
    ]
    for key, revision, name, default in named:
        if revision == default or name is None or (folder := local_folder(name)) is None:
            continue
        raise InputError(
            f"{key}: {revision} has no effect, as {folder} is a folder, which is taken as it is; leave the key out, "
            "and give the folder that has what is wanted, or a name on the hub"
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
