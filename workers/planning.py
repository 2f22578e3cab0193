"""The plan: from corpus files to the store's table of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.documents import find_files, fingerprint, read_documents
from pipeline.errors import InputError
from pipeline.models import describe_model, encode_texts, load_tokenizer, tokenizer_digest
from pipeline.rows import ContextPolicy, RowTable, build_rows
from storage.create import Table, create_store, refuse_if_taken
from storage.errors import StoreMismatch
from storage.records import Record, differences, digest
from storage.store import CorpusInfo, Store, open_store
from workers.settings import CorpusSettings, ModelSettings, check_tokenizer
from workers.versions import versions

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """Where rows come from, checked as far as that goes without reading texts."""

    corpus: CorpusSettings
    files: list[Path]
    tokenizer: Any
    bos: int | None

    @property
    def identity(self) -> Record:
        """What determines the table of rows: settings and sources, not places."""
        return {
            **_table_settings(self.corpus),
            "bos": self.bos,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "files": fingerprint(self.files),
        }


def _table_settings(corpus: CorpusSettings) -> Record:
    names = ("text", "context", "rows", "seed", "skip_first", "rows_per_unit", "holdout")
    return {**{name: getattr(corpus, name) for name in names}, "labels": list(corpus.labels)}


def check_settings(store: Store, corpus: CorpusSettings) -> None:
    """Raise StoreMismatch if the store's table was planned with other settings. Does not look at the corpus files."""
    expected = _table_settings(corpus)
    stored = {name: store.info.plan.get(name) for name in expected}
    if stored != expected:
        raise _mismatch(store.path, differences(stored, expected, "corpus."))


def _mismatch(place: Path, found: list[str]) -> StoreMismatch:
    return StoreMismatch(
        f"the spec contradicts the store at {place}: {'; '.join(found)}. "
        "Give the spec the stored values, or name another store"
    )


def open_source(corpus: CorpusSettings, model: ModelSettings) -> Source:
    """Find the corpus files and load the tokenizer. Raises InputError."""
    files = find_files(corpus.path)
    tokenizer = load_tokenizer(model.tokenizer or model.id, model.revision)
    return Source(corpus, files, tokenizer, tokenizer.bos_token_id)


def plan_rows(source: Source, vocabulary: int, progress: Progress) -> RowTable:
    """Read, tokenise and lay out the corpus. Raises InputError."""
    corpus = source.corpus
    if len(source.tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer has {len(source.tokenizer)} tokens and the model an embedding of {vocabulary}: "
            "they do not belong together; give model.tokenizer the model's own"
        )
    documents, skipped = read_documents(source.files, corpus.text, corpus.labels)
    return build_rows(
        documents,
        skipped,
        lambda texts: encode_texts(source.tokenizer, texts),
        ContextPolicy(corpus.context, corpus.skip_first, source.bos),
        seed=corpus.seed,
        max_rows=corpus.rows,
        progress=progress,
    )


def ensure_store(
    url: Path,
    corpus: CorpusSettings,
    model: ModelSettings,
    progress: Progress,
    check: Callable[[int], None] = lambda num_rows: None,
) -> tuple[Store, bool]:
    """Open the store at `url` if its table is the one the spec describes, else make it. Return whether it was made.

    Raises StoreMismatch, showing both values, when the store there has another table.
    """
    info = describe_model(model.id, model.revision)
    info.check_context(corpus.context)
    source = open_source(corpus, model)
    if (url / "zarr.json").exists():
        store = open_store(url)
        check_tokenizer(source.identity["tokenizer"], store.info.tokenizer_digest, model.tokenizer or model.id)
        if store.info.plan != source.identity:
            raise _mismatch(url, differences(_settings(store.info.plan), _settings(source.identity), "corpus."))
        return store, False
    refuse_if_taken(url)  # before the corpus is read, which can take hours
    rows = plan_rows(source, info.vocabulary, progress)
    check(rows.num_rows)
    return write_plan(url, source, rows), True


def _settings(identity: Record) -> Record:
    """An identity as a person would tell it: for the source files, what they amount to instead of their hashes."""
    files = identity["files"]
    what = f"{len(files)} file(s) of {sum(f['bytes'] for f in files):,} bytes, {digest(files)[:8]}"
    return {**{k: v for k, v in identity.items() if k != "files"}, "path": what}


def write_plan(url: Path, source: Source, rows: RowTable) -> Store:
    """Write planned rows as a new store."""
    corpus = source.corpus
    unit_size = corpus.unit_size(rows.num_rows)

    def info(corpus_digest: str) -> CorpusInfo:
        return CorpusInfo(
            num_rows=rows.num_rows,
            num_contexts=len(rows.prefix),
            num_documents=rows.documents.num_rows,
            rows_per_unit=unit_size,
            context=corpus.context,
            skip_first=corpus.skip_first,
            held_out_start=held_out_start(rows.num_rows, unit_size, corpus.holdout),
            labels=list(corpus.labels),
            corpus_digest=corpus_digest,
            tokenizer_digest=source.identity["tokenizer"],
            plan=source.identity,
            skipped=rows.skipped.to_record(),
            made_with=versions(),
        )

    table = Table(rows.columns, rows.prefix, rows.documents)
    return create_store(url, table, info, lambda folder: source.tokenizer.save_pretrained(folder))


def held_out_start(num_rows: int, rows_per_unit: int, share: float) -> int:
    """The first held-out row: a unit boundary that leaves at least `share` of the rows behind it (the last unit may be
    short), and at least one unit before it. `num_rows` when nothing is held out, or all rows are in one unit."""
    if share == 0 or num_rows <= rows_per_unit:
        return num_rows
    return max(1, int(num_rows * (1 - share)) // rows_per_unit) * rows_per_unit
