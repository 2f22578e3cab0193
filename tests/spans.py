"""Corpora of texts with spans, for tests: spans of characters, and what each row should then have."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import WORDS

from storage.store import Store

ENTITIES = ("LOC", "ORG", "PER")
Span = tuple[int, int, str]


def annotated(rng: random.Random, words: int) -> tuple[str, list[Span]]:
    """A text of so many words, a third of which are spans of one to three words."""
    text, spans = "", []
    at = 0
    while at < words:
        taken = rng.choice([1, 1, 2, 3])
        part = " ".join(rng.choice(WORDS) for _ in range(taken))
        text += " " if text else ""
        if rng.random() < 1 / 3:
            spans.append((len(text), len(text) + len(part), rng.choice(ENTITIES)))
        text, at = text + part, at + taken
    return text, spans


def records(number: int, words: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Records of text, language and entities, as JSON has them."""
    rng = random.Random(seed)
    found = []
    for n in range(number):
        text, spans = annotated(rng, words)
        entities = [{"start": start, "end": stop, "label": value} for start, stop, value in spans]
        found.append({"text": text, "language": ("de", "en")[n % 2], "entities": entities})
    return found


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def stored_values(store: Store, label: str) -> list[str | None]:
    """The value of each row, from its column."""
    values = store.info.values_of_rows[label]
    (name,) = [f"label.{n}" for n, entry in enumerate(store.info.row_labels) if entry["label"] == label]
    codes = store.columns(0, store.num_rows, [name])[name]
    assert str(codes.dtype) == "int16"
    return [None if code < 0 else values[code] for code in codes.tolist()]
