"""Corpora for tests: read through a format, or planned with a tokenizer whose tokens are easy to foretell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpora.open import open_corpus
from pipeline.corpora.records import Columns
from storage.create import TableSizes
from storage.store import Store
from workers.corpus_settings import CorpusSettings
from workers.planning import plan_rows, write_plan
from workers.settings import ModelSettings
from workers.source import open_source
from workers.table_calls import Cuts
from workers.tabling import TablePlan
from workers.tasks import Here

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
            found.contents.extend(c.tolist() if isinstance(c, np.ndarray) else c for c in chunk.contents)
            for label, values in chunk.labels.items():
                found.labels[label].extend(values.to_pylist())
            found.broken.extend((corpus.files[piece.file].name, number, reason) for number, reason in chunk.broken)
    return found


def plan(path: Any, model: Path, cuts: Cuts | None = None, **settings: Any) -> TablePlan:
    """Plan a corpus in this process."""
    source = open_source(CorpusSettings(path=str(path), **settings), ModelSettings(id=str(model)), VOCABULARY)
    return plan_rows(source, lambda done, total: None, Here(), cuts)


def store_of(place: Path, path: Any, model: Path, cuts: Cuts | None = None, **settings: Any) -> Store:
    """Plan a corpus in this process and write it."""
    from storage.places import open_place

    source = open_source(CorpusSettings(path=str(path), **settings), ModelSettings(id=str(model)), VOCABULARY)
    table = plan_rows(source, lambda done, total: None, Here(), cuts)
    assert isinstance(table.table_sizes, TableSizes)
    return write_plan(open_place(place), source, table, Here())
