"""Corpora of texts with spans, for tests: spans of characters, and what each row should then have."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from conftest import WORDS

from storage.store import Store
from storage.verify.findings import Fault
from storage.verify.verify import verify

ENTITIES = ("LOC", "ORG", "PER")
Span = tuple[int, int, str]


def annotated(rng: random.Random, words: int) -> tuple[str, list[Span]]:
    """Return a text of `words` words, a third of which are spans of one to three words."""
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


TEXT = "Ada Lovelace met Körner in London"
SPANS = [(0, 12, "PER"), (17, 23, "PER"), (27, 33, "LOC")]


def table_values(store: Store, label: str) -> dict[str, list[str | None]]:
    """Return the values of each document's rows, by its source."""
    values = np.array(stored_values(store, label), dtype=object)
    document = store.columns(0, store.num_rows, ["document"])["document"]
    sources = store.documents.column("source").to_pylist()
    return {source: values[document == n].tolist() for n, source in enumerate(sources)}


def expected(llama: Path, text: str, given: list[tuple[int, int, str]]) -> list[str | None]:
    """The values of the tokens of a text, character by character: of spans that do not overlap."""
    of_character: dict[int, str] = {at: value for start, stop, value in given for at in range(start, stop)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found: list[str | None] = []
    for start, stop in encoding["offset_mapping"]:
        solid = [at for at in range(start, stop) if not text[at].isspace()] or list(range(start, stop))
        found.append(next((of_character[at] for at in solid if at in of_character), None))
    return found


def faults(store: Store) -> list[Fault]:
    return [finding for finding in verify(store.root) if isinstance(finding, Fault)]


def as_layout(layout: str) -> Any:
    """SPANS as data sets have them."""
    keys = {
        "start end label": ("start", "end", "label"),
        "start stop value": ("start", "stop", "value"),
        "pipeline": ("start", "end", "entity_group"),
        "offsets": ("start_offset", "end_offset", "label"),
    }
    if layout in keys:
        return [dict(zip(keys[layout], span, strict=True)) for span in SPANS]
    if layout == "triples":
        return [list(span) for span in SPANS]
    if layout == "label and value":
        return [{"value": TEXT[a:b], "start": a, "end": b, "label": value} for a, b, value in SPANS]
    if layout == "floats":
        return [{"start": float(a), "end": float(b), "label": value} for a, b, value in SPANS]
    assert layout == "columns"
    starts, ends, values = zip(*SPANS, strict=True)
    return {"start": list(starts), "end": list(ends), "label": list(values), "text": [TEXT[a:b] for a, b, _ in SPANS]}
