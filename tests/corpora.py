"""Corpora for tests: read through a format, or planned with a tokenizer whose tokens are easy to foretell."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from pipeline.corpus.chats.messages import messages_of
from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns
from pipeline.model.describe import describe_model
from pipeline.tokens.tokenizer import load_tokenizer
from storage.make.create import TableSizes
from storage.store import Store
from workers.cluster.tasks import Here
from workers.plan.calls import Cuts
from workers.plan.source import open_source
from workers.plan.stage import ensure_store, plan_rows, write_plan
from workers.plan.table_plan import TablePlan
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

VOCABULARY = 400
"""More than the test tokenizer's."""


@dataclass(frozen=True)
class Records:
    """All that a corpus gives, read piece by piece."""

    numbers: list[tuple[int, int]]
    """File and number in it."""
    contents: list[Any]
    labels: dict[str, list[Any]]
    broken: list[tuple[str, int, str]]


def read_corpus(
    path: Any, content: str = "text", labels: Sequence[str] = (), *, kind: str = "text", format: str = "auto"
) -> Records:
    corpus = open_corpus(str(path), Columns(content, kind, tuple(labels)), format)
    found = Records([], [], {label: [] for label in labels}, [])
    for piece in corpus.pieces():
        for chunk in corpus.chunks(piece):
            found.numbers.extend((piece.file, int(n)) for n in chunk.numbers)
            found.contents.extend(_plain(content, kind) for content in chunk.contents)
            for label, values in chunk.labels.items():
                found.labels[label].extend(values.to_pylist())
            found.broken.extend((corpus.files[piece.file].name, number, reason) for number, reason in chunk.broken)
    return found


def _plain(content: Any, kind: str) -> Any:
    if kind == "messages":
        return messages_of(content)
    return content.tolist() if isinstance(content, np.ndarray) else content


def plan(path: Any, model: Path, cuts: Cuts | None = None, **settings: Any) -> TablePlan:
    """Plan a corpus in this process."""
    source = open_source(CorpusSettings(path=str(path), **settings), ModelSettings(id=str(model)), VOCABULARY, "main")
    return plan_rows(source, lambda done, total: None, Here(), cuts)


def store_of(place: Path, path: Any, model: Path, cuts: Cuts | None = None, **settings: Any) -> Store:
    """Plan a corpus in this process and write it."""
    from storage.backends.place import open_place

    source = open_source(CorpusSettings(path=str(path), **settings), ModelSettings(id=str(model)), VOCABULARY, "main")
    table = plan_rows(source, lambda done, total: None, Here(), cuts)
    assert isinstance(table.table_sizes, TableSizes)
    return write_plan(open_place(place), source, table, Here())


def ensure_rows(place: Path, corpus: CorpusSettings, model: ModelSettings, **options: Any) -> tuple[Store, bool]:
    """Make a store in this process, or open or grow the one that is there, as `granary harvest` does."""
    info = describe_model(model.id, model.revision)
    return ensure_store(place, corpus, model, info, lambda done, total: None, **options)


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_chats(path: Path, chats: Sequence[Any]) -> Path:
    return write(path, [{"messages": chat} for chat in chats])


def with_tokenizer(folder: Path, llama: Path, change: Callable[[Any], None]) -> Path:
    """A folder with the test model's tokenizer, changed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def contexts_of(store: Store) -> list[list[int]]:
    return [tokens.tolist() for tokens in store.context_tokens(0, store.info.num_contexts - 1)]


def ids(model: Path, text: str) -> list[int]:
    return load_tokenizer(str(model)).backend_tokenizer.encode(text, add_special_tokens=False).ids


def values_of(store: Store, label: str) -> list[tuple[int, str | None]]:
    return store.sql(f"select token, {label} from rows order by row").fetchall()
