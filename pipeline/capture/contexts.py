"""What a context is, and from a unit's rows back to the contexts to run.

A context is BOS, where the tokenizer has one, and then tokens of one document, at most `context` in all. `position`
counts from 0 at the context's first token. Rows may be any of a context's positions: the first `skip_first` are run but
are no rows. So the table keeps the tokens of whole contexts beside the rows, up to the last row of each: attention is
causal, and what follows it is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContextPolicy:
    """How documents are cut into contexts."""

    context: int
    """Most tokens of a context, BOS included."""
    skip_first: int
    """Leading positions that are no rows (1: BOS, whose activations are an attention sink of 100 times the norm)."""
    bos: int | None
    """The token that every context begins with, or None where contexts begin with their text."""
    excluded: tuple[int, ...] = ()
    """Tokens that are run and are no rows, ascending."""

    def __post_init__(self) -> None:
        if self.context <= max(self.skip_first, int(self.bos is not None)):
            raise InputError(f"corpus.context {self.context} leaves no rows after skip_first {self.skip_first}")


@dataclass(frozen=True)
class ContextRows:
    """A context to run for a unit: its tokens, and which of them are rows of the unit."""

    tokens: Int32
    """From position 0 to the last position the unit needs."""
    positions: Int64
    """The positions that are rows of the unit, ascending."""
    first_row: int
    """The first of them, counted from the unit's first row; the others follow it without a gap."""

    @property
    def num_rows(self) -> int:
        return len(self.positions)


def contexts_of_rows(position: Int32, context: Int64, tokens: Sequence[Int32]) -> list[ContextRows]:
    """Put together the contexts of a row range from its columns `position` and `context`.

    `tokens` holds the tokens of the contexts context[0] ... context[-1]. A context is cut behind its last row in the
    range: attention is causal, so what follows cannot change the rows before it.
    """
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(context)) + 1, [len(context)]]).tolist()
    return [
        ContextRows(
            tokens=tokens[int(context[start]) - int(context[0])][: int(position[stop - 1]) + 1],
            positions=position[start:stop].astype(np.int64),
            first_row=start,
        )
        for start, stop in pairwise(bounds)
    ]
