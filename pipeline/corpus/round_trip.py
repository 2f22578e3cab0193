"""The check that a tokenizer gives texts back: some are encoded and decoded before a corpus is planned.

A tokenizer whose vocabulary, merges or decoder belong to another one runs without an error, and the model is then fed
nonsense. What sound tokenizers do to a text is no fault: what their normalizer does, case, compatible characters
(NFKC), blanks, and tokens for what is unknown, as long as most of the text is not.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from tokenizers.models import Unigram

from pipeline.corpus.chats.messages import WithTools, messages_of
from pipeline.errors import InputError

TEXTS = 100
"""Texts that are tried."""
RECORDS = 1000
"""Records in which they are looked for."""
TEXT_CHARACTERS = 2000
"""Characters of a text that are tried."""
MOST = 0.5
"""A larger share of unknown characters is refused."""
SHOWN = 60
BLANK = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class _Trip:
    """A text that went through the tokenizer, both ends as they are compared."""

    expected: str
    came_back: str
    known: int | None
    """Characters of `expected` that came back; None where something else did."""


def check_round_trip(tokenizer: Any, texts: Iterable[str], name: str) -> None:
    """Raise InputError unless a tokenizer gives the texts back, up to what it is known to change. `name`: where it is
    from, for the message."""
    backend = tokenizer.backend_tokenizer
    unknown = unknown_token(tokenizer)
    advice = "give model.tokenizer the one that the model was trained with, or download its tokenizer.json again"
    characters = known = 0
    first = ""
    for text in texts:
        text = text[:TEXT_CHARACTERS]
        found = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if suffix := getattr(backend.model, "end_of_word_suffix", None):  # CLIP's is taken away by transformers
            found = found.replace(suffix, " ")
        trip = _compared(backend, text, found, unknown)
        if trip.known is None:
            shown, returned = _around_difference(text, found, trip)
            raise InputError(
                f"the tokenizer of {name} is broken, or made for another one's vocabulary: it was given {shown!r}, and "
                f"what it encoded decodes to {returned!r}; {advice}"
            )
        characters += len(_bare(text))
        known += trip.known
        first = first or (text[:SHOWN] if trip.known < len(_bare(text)) else "")
    if known < (1 - MOST) * characters:
        raise InputError(
            f"the tokenizer of {name} does not know {100 * (1 - known / characters):.0f} % of the characters of the "
            f"corpus ({'its token for them is ' + repr(unknown) if unknown else 'it leaves them out'}), for example in "
            f"{first!r}; {advice}"
        )


def unknown_token(tokenizer: Any) -> str | None:
    """The token that stands for whatever a tokenizer does not know."""
    backend = tokenizer.backend_tokenizer
    token: str | None = getattr(backend.model, "unk_token", None)
    if isinstance(backend.model, Unigram):  # which tells it in its file alone
        number = json.loads(backend.to_str())["model"].get("unk_id")
        token = None if number is None else backend.id_to_token(number)
    return token or getattr(tokenizer, "unk_token", None)


def sample_texts(contents: Iterable[Iterable[Any]], kind: str) -> list[str]:
    """The first texts of a corpus, those of chats among them. `contents`: those of its records, some at a time."""
    texts: list[str] = []
    for content in islice(chain.from_iterable(contents), RECORDS):
        texts += [text for text in _texts_of(content, kind) if text.strip()]
        if len(texts) >= TEXTS:
            break
    return texts[:TEXTS]


def _texts_of(content: Any, kind: str) -> list[str]:
    if isinstance(content, WithTools):
        content = content.messages
    try:
        content = messages_of(content) if kind == "messages" else content
    except RecursionError:  # counted where records are read
        return []
    if not isinstance(content, list):
        return [_as_text(content)]
    messages = [message for message in content if isinstance(message, dict)]
    said = [message.get(key) for message in messages for key in ("content", "value")]
    parts = [part for one in said for part in (one if isinstance(one, list) else [one])]
    return [_as_text(part.get("text") if isinstance(part, dict) else part) for part in parts]


def _as_text(content: Any) -> str:
    """What is no text is counted, or refused, where records are read."""
    if isinstance(content, bytes):
        return content[: 4 * TEXT_CHARACTERS].decode("utf-8", "ignore")
    return content.encode("utf-8", "ignore").decode() if isinstance(content, str) else ""


def _compared(backend: Any, text: str, found: str, unknown: str | None) -> _Trip:
    expected, came_back = _canonical(backend, text), _canonical(backend, found)
    if expected == came_back:
        return _Trip(expected, came_back, len(expected))
    parts = came_back.split(_bare(unknown)) if unknown else [came_back]
    known = sum(map(len, parts))
    return _Trip(expected, came_back, known if len(parts) > 1 and _are_in_order(parts, expected) else None)


def _are_in_order(parts: Sequence[str], text: str) -> bool:
    """Return whether a text consists of parts with something between any two of them, or nothing."""
    if not text.startswith(parts[0]):
        return False
    place = len(parts[0])
    for part in parts[1:-1]:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return text.endswith(parts[-1]) and len(text) - len(parts[-1]) >= place


def _canonical(backend: Any, text: str) -> str:
    """A text after the tokenizer's own normalizer, as all are compared."""
    return _bare(backend.normalizer.normalize_str(text) if backend.normalizer is not None else text)


def _bare(text: str) -> str:
    """A text without blanks, case and differences between compatible characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # The decoder of WordPiece joins "do not" too when it cleans up blanks.
    return "".join(c for c in folded if not c.isspace() and c != BLANK).replace("donot", "don't")


def _around_difference(text: str, found: str, trip: _Trip) -> tuple[str, str]:
    """The part of a text, and of what came back, where they begin to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(trip.expected, trip.came_back, strict=False)) if a != b),
        min(len(trip.expected), len(trip.came_back)),
    )
    start = max(0, same - SHOWN // 3)
    if len(text) <= SHOWN and len(found) <= SHOWN:
        return text, found
    return trip.expected[start : start + SHOWN], trip.came_back[start : start + SHOWN]
