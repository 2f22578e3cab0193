"""The rows, or the contexts, on which directions are strongest: the best of each call, merged.

A score is the inner product of a row and a direction. Subtracting a mean from the rows would change all scores of a
direction by the same number, and so not the choice. Equal scores go to the earlier row; scores are compared in float32,
so that equal rows have equal scores in whatever order their products were added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from storage.format.arrays import Array
from workers.anchors.means import TrainingRows, read_slab, slabs
from workers.cluster.tasks import Tasks

Column = Literal["row", "context"]


@dataclass(frozen=True)
class Best:
    """The best of one direction so far, each number once, best first: score float32 [n], number int64 [n]."""

    score: Array
    number: Array

    @classmethod
    def none(cls) -> "Best":
        return cls(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64))

    def with_(self, other: "Best", most: int) -> "Best":
        """The best of both. In which order several are put together does not matter."""
        score, number = np.concatenate([self.score, other.score]), np.concatenate([self.number, other.number])
        order = np.lexsort((-score, number))
        first = np.ones(len(order), dtype=np.bool_)  # of a context in several slabs or calls, its highest peak
        first[1:] = number[order][1:] != number[order][:-1]
        score, number = score[order[first]], number[order[first]]
        order = np.lexsort((number, -score))[:most]
        return Best(score[order], number[order])


def strongest(
    rows: TrainingRows, site: str, directions: Array, column: Column, most: int, tasks: Tasks, most_calls: int
) -> list[Array]:
    """The `most` strongest training rows (or contexts, by their highest row) of each direction [k, d]: int64,
    ascending; fewer where there are no more."""
    shared = tasks.share(directions)
    handles = [
        handle
        for blocks in rows.calls(most_calls)
        for handle in tasks.call(best_of_blocks, rows, site, shared, column, most, blocks, returns=1)
    ]
    found: Iterable[list[Best]] = (tasks.get([handle])[0] for handle in handles)
    best = reduce(lambda some, others: _merged(some, others, most), found, [Best.none()] * len(directions))
    return [np.sort(of.number) for of in best]


def _merged(some: Sequence[Best], others: Sequence[Best], most: int) -> list[Best]:
    return [one.with_(other, most) for one, other in zip(some, others, strict=True)]


def best_of_blocks(
    rows: TrainingRows, site: str, directions: Array, column: Column, most: int, blocks: range
) -> tuple[list[Best]]:
    """The best of some blocks, for each direction."""
    store = rows.open()
    best = [Best.none()] * len(directions)
    for start, stop in (unit for block in blocks for unit in rows.units(block)):
        for first, last in slabs(store, site, start, stop, len(directions)):
            scores = (read_slab(store, site, slice(first, last)) @ directions.T).astype(np.float32)
            numbers = np.arange(first, last)
            if column == "context":
                context = store.columns(first, last, [column])[column]
                begins = np.flatnonzero(np.diff(context, prepend=-1))  # the rows of a context follow one another
                scores, numbers = np.maximum.reduceat(scores, begins, axis=0), context[begins]
            for i, of in enumerate(best):
                enough = scores[:, i] >= (of.score[-1] if len(of.score) == most else -np.inf)
                if enough.any():
                    best[i] = of.with_(Best(scores[enough, i], numbers[enough]), most)
    return (best,)
