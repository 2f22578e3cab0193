"""Putting the contexts of a unit into batches: few shapes, and little of them padding.

A batch has one context a line, padded on the right, so that nothing attends across documents on any implementation of
attention and no mask is needed. The batches are a function of the contexts, in any order, and the settings alone.

Each new shape costs a matrix library its preparation and the memory for it (oneDNN kept 40 MB a unit of real text), and
a compiler half a minute. So shapes come from a menu of at most `MENU` of them, made from the settings, and what is
chosen from it is the cheapest way to run the contexts (docs/decisions/0005-table-of-contexts.md has the measurements).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pipeline.rows import ContextRows, Int64

SHORTEST = 32
"""Contexts are padded to at least this length."""
MENU = 48
"""Most shapes there may be."""
LENGTHS_PER_DOUBLING = (8, 6, 4, 3, 2, 1)
"""Lengths between one power of two and the next: the first of these that keeps the menu within its size."""
BATCH_COST = 256
"""What a batch costs besides its positions, in positions: two half-full batches take longer than one full one."""

Shape = tuple[int, int]
"""Length and number of contexts."""


@dataclass(frozen=True)
class Batch:
    """Contexts that run together, padded to one length; lines without a context are blank."""

    contexts: list[ContextRows]
    length: int
    lines: int

    @property
    def positions(self) -> int:
        return self.length * self.lines

    @property
    def padding(self) -> int:
        """Positions that are run for nothing."""
        return self.positions - sum(len(context.tokens) for context in self.contexts)

    def tokens(self) -> Int64:
        """int64 [lines, length]. Padding (token 0) stands on the right, where causal attention keeps it from every
        row, so that no attention mask is needed."""
        tokens = np.zeros((self.lines, self.length), dtype=np.int64)
        for line, context in zip(tokens, self.contexts, strict=False):
            line[: len(context.tokens)] = context.tokens
        return tokens


def batches_of(contexts: Sequence[ContextRows], batch_tokens: int, context: int) -> list[Batch]:
    """Group contexts of at most `context` tokens into batches of at most `batch_tokens` positions (or one context).

    The contexts are taken by falling length, so a batch is a run of them and a shape from the menu; of all ways to cut
    the list into runs the one with the fewest positions is found by going through it from its end (`BATCH_COST` counted
    in). The longest batches come first: what does not fit into memory is known at once.
    """
    by_length = sorted(contexts, key=lambda member: -len(member.tokens))
    menu = shapes(batch_tokens, context)
    lengths, lines = (np.array(column) for column in zip(*menu, strict=True))
    costs = lengths * lines + BATCH_COST
    fits = np.searchsorted(lengths, [len(member.tokens) for member in by_length])  # the first shape that is long enough
    number = len(by_length)
    cheapest = np.zeros(number + 1, dtype=np.int64)  # cost of all contexts from this one on
    chosen = np.zeros(number, dtype=np.int64)
    for first in range(number - 1, -1, -1):
        after = np.minimum(first + lines[fits[first] :], number)
        ways = costs[fits[first] :] + cheapest[after]
        best = int(ways.argmin())
        cheapest[first], chosen[first] = ways[best], fits[first] + best
    batches = []
    first = 0
    while first < number:
        length, size = menu[chosen[first]]
        batches.append(Batch(by_length[first : first + size], length, size))
        first += size
    return batches


@cache
def shapes(batch_tokens: int, context: int) -> list[Shape]:
    """The menu: for each length the full batch, for some also a quarter of it, and one line of the longest; by length.

    Lengths are multiples of 8 that grow by about an eighth and end in `context`.
    """
    for per_doubling in LENGTHS_PER_DOUBLING:
        full = {(length, batch_size(batch_tokens, length)) for length in _lengths(context, per_doubling)}
        part = {(length, max(1, batch_size(batch_tokens, length) // 4)) for length in _lengths(context, 2)}
        if len(menu := full | part | {(context, 1)}) <= MENU:
            break
    return sorted(menu)


def _lengths(context: int, per_doubling: int) -> list[int]:
    lengths = []
    length = SHORTEST
    while length < context:
        lengths.append(length)
        length += max(8, _power_of_two(length) // per_doubling // 8 * 8)
    return [*lengths, context]


def batch_size(batch_tokens: int, length: int) -> int:
    """How many contexts of a length make a full batch: a power of two."""
    return _power_of_two(max(1, batch_tokens // length))


def _power_of_two(number: int) -> int:
    """The largest power of two that is not more than a positive number."""
    return 1 << (number.bit_length() - 1)
