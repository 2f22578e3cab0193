"""Token ids of texts of any length, in time that grows as the text does and memory that does not.

A tokenizer that is given a text whole keeps hundreds of bytes for every character, and some take time that grows faster
than the text. So a long text is encoded in windows that overlap, in the tokenizer's own threads, and the ids are those
that the whole would have.

Two windows are joined where both give the same tokens (ids, places, and beginnings of the pre-tokenizer's pieces) for
`AGREEING` tokens before the join and after it. What comes before cannot depend on what follows the first window, nor
what comes after on what precedes the second:

- A pre-tokenizer goes through a text from left to right. From a common beginning of a piece on, it does the same in
  both.
- Within a piece longer than that, BPE: a boundary that is left at the end is one that no merge crossed, so each side is
  what it is without the other. Whether a merge crosses depends on the tokens beside it alone, and a common token on the
  right is what the whole has there. Unigram: the best path to a place does not depend on what follows, and paths that
  have met go on together, but for ties. (docs/decisions/0019-streams-and-long-texts.md)

Where windows do not agree, as in long runs of a character whose tokens are counted from the beginning of the window,
others are tried that begin a few characters earlier, or further back; then one of twice the length. In the worst case
that is the whole text, as a tokenizer by itself would have it.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.saying import Say, announce

LONG_CHARS = 2**19
"""Texts of more characters are encoded in windows."""
WINDOW_CHARS = 2**17
OVERLAP_CHARS = 2**12
WINDOWS_AT_ONCE = 8
"""Encoded together, in threads."""
AGREEING = 16
"""Tokens on each side of a join that must be the same in both windows."""
SHIFTS = 64
"""Other beginnings of a window that are tried: more than the characters of most tokens."""
LOOKBACKS = (1, 4, 16)
"""A window may also begin this many overlaps before the end of the one before, at the beginning of a token."""
VARIED = 8
"""Different tokens among those that agree, where a tokenizer takes the best of all paths (Unigram): in a run of one
token paths of the same score differ in where they put what is left over."""
MOST_VARIED_CHARS = 8 * WINDOW_CHARS
"""But for longer windows than this, which are runs of one thing: there one of those paths is as good as another."""
SAID_EVERY_S = 20.0

Int64 = npt.NDArray[np.int64]


def encode(tokenizer: Any, texts: Sequence[str], say: Say = announce) -> list[list[int]]:
    """The token ids of each text, without special tokens. `tokenizer`: of the library tokenizers. `say` is told how far
    a text is that takes long."""
    ids: list[list[int]] = [[]] * len(texts)
    short = [number for number, text in enumerate(texts) if len(text) <= LONG_CHARS]
    encodings = tokenizer.encode_batch_fast([texts[number] for number in short], add_special_tokens=False)
    for number, encoding in zip(short, encodings, strict=True):
        ids[number] = encoding.ids
    del encodings
    for number in sorted({*range(len(texts))}.difference(short)):
        ids[number] = encode_long(tokenizer, texts[number], _Progress(len(texts[number]), say))
    return ids


def encode_with_places(tokenizer: Any, texts: Sequence[str], say: Say = announce) -> list[tuple[list[int], Int64]]:
    """Return the token ids of each text, and where in it each token begins and ends: int64 [tokens, 2]."""
    found: list[tuple[list[int], Int64]] = [([], np.empty((0, 2), np.int64))] * len(texts)
    short = [number for number, text in enumerate(texts) if len(text) <= LONG_CHARS]
    encodings = tokenizer.encode_batch([texts[number] for number in short], add_special_tokens=False)
    for number, encoding in zip(short, encodings, strict=True):
        found[number] = encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    del encodings
    for number in sorted({*range(len(texts))}.difference(short)):
        places: list[Int64] = []
        ids = encode_long(tokenizer, texts[number], _Progress(len(texts[number]), say), places)
        found[number] = ids, np.concatenate(places)
    return found


def encode_long(
    tokenizer: Any,
    text: str,
    progress: Callable[[int], None] = lambda chars: None,
    places: list[Int64] | None = None,
) -> list[int]:
    """The token ids of one text. `progress` is told how many characters are done. `places` takes [n, 2], again and
    again: where in the text the next n tokens begin and end."""
    starts = window_starts(text)
    fetched = _fetched(tokenizer, text, starts)
    ids: list[int] = []
    same: dict[int, int] = {}  # one object for each id: a list of millions then is 8 bytes a token instead of 40
    current, at = next(fetched), 0  # what is not among the ids yet begins with its token `at`
    while current.stop < len(text):
        found = _next_window(tokenizer, text, current, at, next(fetched))
        if found is not None:
            following, end, begin = found
            if places is not None:
                places.append(current.places(at, end))
            ids += [same.setdefault(token, token) for token in current.ids[at:end]]
            current, at = following, begin
            progress(current.start)
            continue
        wider = _encoded(tokenizer, text, [(current.start, _wider(text, starts, current))])[0]
        if wider.tokens(0, at) != current.tokens(0, at):
            if places is None:
                return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            (whole,) = _encoded(tokenizer, text, [(0, len(text))])
            places[:] = [whole.places(0, len(whole.ids))]
            return whole.ids
        current = wider
        fetched = _fetched(tokenizer, text, [start for start in starts if start + OVERLAP_CHARS >= current.stop])
    if places is not None:
        places.append(current.places(at, len(current.ids)))
    return ids + current.ids[at:]


@dataclass(frozen=True)
class Window:
    """A part of a text, encoded by itself."""

    start: int
    """In characters of the text."""
    stop: int
    ids: list[int]
    offsets: list[tuple[int, int]]
    """The characters of each token, counted from the beginning of the window."""
    words: list[int | None]
    """The number of each token's piece."""

    def first_from(self, char: int) -> int:
        """The first token that begins at a character of the text or after it."""
        return bisect_left(self.offsets, (char - self.start,))

    def places(self, first: int, last: int) -> Int64:
        """Where in the text tokens begin and end: [n, 2]."""
        return np.array(self.offsets[first:last], dtype=np.int64).reshape(-1, 2) + self.start

    def tokens(self, first: int, last: int) -> list[tuple[int, int, int, bool]]:
        """Return four numbers for each token: where it begins and ends in the text, its id, and whether a piece begins
        with it."""
        return [
            (begin + self.start, end + self.start, self.ids[i], i == 0 or self.words[i] != self.words[i - 1])
            for i, (begin, end) in enumerate(self.offsets[first:last], first)
        ]


def join(before: Window, after: Window, varied: int = 1) -> tuple[int, int] | None:
    """Where two windows that overlap can be joined: how many tokens of the first, and which of the second is next.
    `varied`: how many different tokens must agree at least."""
    i, j = before.first_from(after.start), 0
    here = before.tokens(i, len(before.ids))
    there = after.tokens(0, after.first_from(before.stop))
    a = b = agreeing = 0
    while a < len(here) and b < len(there):
        if here[a] == there[b]:
            agreeing += 1
            agrees = agreeing >= 2 * AGREEING and _kinds(here, a, varied) >= varied
            if agrees and here[a - AGREEING][0] >= here[a - AGREEING - 1][1]:  # not within a character
                return i + a - AGREEING, j + b - AGREEING
            a, b = a + 1, b + 1
            continue
        agreeing = 0
        step = here[a][0] - there[b][0]
        a, b = a + (step <= 0), b + (step >= 0)
    return None


def _kinds(tokens: list[tuple[int, int, int, bool]], last: int, varied: int) -> int:
    """How many different tokens there are among those that agree, if that is asked for."""
    return len({token[2] for token in tokens[last + 1 - 2 * AGREEING : last + 1]}) if varied > 1 else 1


def window_starts(text: str) -> list[int]:
    """Where windows begin: at a space or the end of a line, if there is one near."""
    starts = [0]
    for end in range(WINDOW_CHARS, len(text) - OVERLAP_CHARS, WINDOW_CHARS):
        near = end - OVERLAP_CHARS // 2
        starts.append(max(text.rfind(" ", near, end), text.rfind("\n", near, end), near))
    return starts


def _fetched(tokenizer: Any, text: str, starts: Sequence[int]) -> Iterator[Window]:
    """The windows that begin at `starts`, each as long as it overlaps the next one."""
    stops = [start + OVERLAP_CHARS for start in starts[1:]] + [len(text)]
    spans = list(zip(starts, stops, strict=True))
    for first in range(0, len(spans), WINDOWS_AT_ONCE):
        yield from _encoded(tokenizer, text, spans[first : first + WINDOWS_AT_ONCE])


def _encoded(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[Window]:
    encodings = tokenizer.encode_batch([text[start:stop] for start, stop in spans], add_special_tokens=False)
    return [
        Window(start, stop, encoding.ids, encoding.offsets, encoding.word_ids)
        for (start, stop), encoding in zip(spans, encodings, strict=True)
    ]


def _next_window(
    tokenizer: Any, text: str, current: Window, at: int, following: Window
) -> tuple[Window, int, int] | None:
    """The window after `current`, how many tokens of `current` come before it, and which of its own is the first: the
    `following` one, or one that begins earlier. `at`: the tokens of `current` that are taken already."""

    is_best_path = type(tokenizer.model).__name__ == "Unigram" and current.stop - current.start < MOST_VARIED_CHARS
    varied = VARIED if is_best_path else 1

    def joined(window: Window) -> tuple[Window, int, int] | None:
        place = join(current, window, varied)
        return (window, *place) if place is not None and place[0] >= at else None

    if (found := joined(following)) is not None:
        return found
    lowest = current.start + current.offsets[at][0] if at < len(current.offsets) else current.stop
    for start in _other_starts(tokenizer, text, current, following, varied):
        if start > lowest:
            (window,) = _encoded(tokenizer, text, [(start, following.stop)])
            if (found := joined(window)) is not None:
                return found
    return None


def _other_starts(tokenizer: Any, text: str, current: Window, following: Window, varied: int) -> Iterator[int]:
    """Where a window may begin instead of where `following` does, the likeliest first."""
    tokens = [current.first_from(current.stop - back * OVERLAP_CHARS) for back in LOOKBACKS]
    at_tokens = [current.start + current.offsets[token][0] for token in tokens if token < len(current.offsets)]
    yield from at_tokens[:1]
    shifted = [start for start in range(following.start - 1, following.start - SHIFTS, -1) if start > current.start]
    probes = _encoded(tokenizer, text, [(start, current.stop) for start in shifted])  # the overlap alone
    yield from (probe.start for probe in probes if join(current, probe, varied) is not None)
    yield from at_tokens[1:]


def _wider(text: str, starts: Sequence[int], current: Window) -> int:
    """Where a window ends that begins as `current` does and is twice as long or more: where the next overlaps it."""
    least = current.start + 2 * (current.stop - current.start)
    return next((start + OVERLAP_CHARS for start in starts if start + OVERLAP_CHARS >= least), len(text))


class _Progress:
    """Says how far a text is, if it takes long."""

    def __init__(self, num_chars: int, say: Say):
        self.num_chars, self.say = num_chars, say
        self.said = time.monotonic()

    def __call__(self, chars: int) -> None:
        if time.monotonic() - self.said > SAID_EVERY_S:
            self.said = time.monotonic()
            self.say(f"tokenising a text of {self.num_chars:,} characters: {100 * chars // self.num_chars} %")
