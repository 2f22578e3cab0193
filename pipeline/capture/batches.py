"""Putting the contexts of a unit into batches: a few shapes, and little of them padding.

A line holds one context or several, one behind the other. Where it holds several, each begins at position 0 again, and
transformers keeps attention within each of them (`pipeline.capture.taps.model_inputs`). Where every line of a batch
holds one, no mask is needed. The batches are a function of the contexts and the settings alone.

Each shape costs a matrix library its preparation and the memory for it, and a compiler seconds for each layer that
differs. So lines have two lengths, and batches the full number of lines or a power of two below it
(docs/decisions/0005-table-of-contexts.md has the measurements).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pipeline.capture.contexts import ContextRows, Int64

COMPOSITION = "packed, best fit"
"""Names what this module does, in the identity of a harvest: other batches can change the last bits of a row. To be
changed with it."""
SHORT_LINE = 256
"""Length of a line that a context of at most half of this begins: a mask's work grows with the length of the line."""
LONGEST_PACKED = 8192
"""Beyond it the mask of a line (its length squared) is too large, and each context has a line of its own."""
STEPS = 8
"""Lines longer than that are padded to multiples of an eighth of the longest context."""
BATCH_COST = 256
"""What a batch costs besides its positions, in positions: two half-full batches take longer than one full one."""


@dataclass(frozen=True)
class Batch:
    """Contexts that run together: lines of one length, filled from the left; further lines are blank."""

    contents: list[list[ContextRows]]
    length: int
    lines: int

    @property
    def positions(self) -> int:
        return self.length * self.lines

    @property
    def padding(self) -> int:
        """Positions that are run for nothing."""
        return self.positions - sum(len(context.tokens) for _, context in self.places())

    @property
    def is_packed(self) -> bool:
        """Return whether a line has several contexts, so that each must be kept from seeing the others."""
        return any(len(line) > 1 for line in self.contents)

    def places(self) -> Iterator[tuple[int, ContextRows]]:
        """Each context with the place of its first token in [lines * length]."""
        for number, line in enumerate(self.contents):
            place = number * self.length
            for context in line:
                yield place, context
                place += len(context.tokens)

    def tokens(self) -> Int64:
        """int64 [lines, length]; padding is token 0, on the right, where causal attention keeps it from every row."""
        tokens = np.zeros(self.positions, dtype=np.int64)
        for place, context in self.places():
            tokens[place : place + len(context.tokens)] = context.tokens
        return tokens.reshape(self.lines, self.length)

    def position_ids(self) -> Int64 | None:
        """int64 [lines, length]: the position of each token in its context, and from 0 on in what is left of a line.
        None where they are those of every line from its beginning, as models assume."""
        if not self.is_packed:
            return None
        whole = np.arange(self.length)
        ids = np.tile(whole, (self.lines, 1))
        for number, line in enumerate(self.contents):
            lengths = [len(context.tokens) for context in line]
            starts = np.cumsum([0, *lengths])
            ids[number] -= np.repeat(starts, [*lengths, self.length - starts[-1]])
        return ids


def batches_of(contexts: Sequence[ContextRows], batch_tokens: int, context: int) -> list[Batch]:
    """Put contexts of at most `context` tokens into batches of at most `batch_tokens` positions (or one line).

    Lines are filled by best fit, the longest contexts first. Lines with one context come first, for which attention
    needs no mask.
    """
    batches = []
    lines = _lines(contexts, context)
    for length, of_length in groupby(
        sorted(lines, key=lambda line: (-line[0], len(line[1]) > 1)), lambda line: line[0]
    ):
        contents = [line for _, line in of_length]
        for size in _sizes(len(contents), length, batch_size(batch_tokens, length)):
            batches.append(Batch(contents[:size], length, size))
            contents = contents[size:]
    return batches


def full_shapes(batch_tokens: int, context: int) -> set[tuple[int, int]]:
    """(lines, length) of full batches of packed lines, in which nearly all contexts run."""
    lengths = {_line_length(1, context), min(context, LONGEST_PACKED), context}
    return {(batch_size(batch_tokens, length), length) for length in lengths}


def batch_size(batch_tokens: int, length: int) -> int:
    """How many lines of a length make a full batch: a power of two."""
    return _power_of_two(max(1, batch_tokens // length))


def _lines(contexts: Sequence[ContextRows], context: int) -> list[tuple[int, list[ContextRows]]]:
    """Lines, with their length, each of which holds its contexts. Best fit: a context goes where it leaves the least
    room, or begins a line."""
    lines: list[tuple[int, list[ContextRows]]] = []
    room: list[tuple[int, int]] = []  # what is left of a line, and its number; sorted
    for member in sorted(contexts, key=lambda member: -len(member.tokens)):
        size = len(member.tokens)
        found = bisect_left(room, (size, 0))
        if found < len(room):
            free, number = room.pop(found)
        else:
            free, number = _line_length(size, context), len(lines)
            lines.append((free, []))
        lines[number][1].append(member)
        if lines[number][0] <= LONGEST_PACKED and free > size:
            insort(room, (free - size, number))
    return lines


def _line_length(size: int, context: int) -> int:
    """Return the length of a line whose first context has `size` tokens."""
    if size > LONGEST_PACKED:
        step = -(-context // STEPS)
        return min(-(-size // step) * step, context)
    return min(SHORT_LINE if 2 * size <= SHORT_LINE else LONGEST_PACKED, context)


def _sizes(lines: int, length: int, full: int) -> list[int]:
    """The numbers of lines of the batches: full ones, then what is left, of which the last one may have blank lines."""
    return [full] * (lines // full) + _of_rest(lines % full, length)


def _of_rest(lines: int, length: int) -> list[int]:
    """Return the cheapest way to run `lines` lines in powers of two."""
    if lines == 0:
        return []
    below = _power_of_two(lines)
    parts = [below, *_of_rest(lines - below, length)]
    cost = sum(parts) * length + len(parts) * BATCH_COST
    return parts if below == lines or cost <= 2 * below * length + BATCH_COST else [2 * below]


def _power_of_two(number: int) -> int:
    """The largest power of two that is not more than a positive number."""
    return 1 << (number.bit_length() - 1)
