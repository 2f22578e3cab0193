"""Rows of extreme norm, which a mean or a dictionary should not be made of unseen: attention sinks and the like.

Their norms are a hundred times those of other rows. They stand at the same positions (the first), or on the same tokens
(BOS, a newline, a comma), which says what leaves them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from storage.format.arrays import Array
from storage.read.reader import StoreReader
from storage.table.token_pieces import TokenStrings

EXTREME = 10.0
"""A norm above this many medians is extreme; in a site without sinks no row has one."""
SAMPLED_UNITS, SAMPLED_ROWS = 8, 32_768
"""Units in which rows are looked at, evenly spaced, and rows of each, at most."""
SHOWN = 3


@dataclass(frozen=True)
class ExtremeRows:
    """Rows of a site whose norm is above EXTREME medians, among those that were looked at."""

    site: str
    looked_at: int
    share: float
    largest: float
    """The largest norm, in medians."""
    positions: tuple[tuple[int, float], ...]
    """The positions that most of them stand at, and the share of them that does."""
    tokens: tuple[tuple[str, float], ...]
    """The same for tokens: their strings, as the tokenizer's file spells them."""


def extreme_rows(store: StoreReader, sites: Sequence[str], strings: TokenStrings | None = None) -> list[ExtremeRows]:
    """Look at some committed rows of each site for extreme norms; sites without are left out. `strings`: of the
    store's tokens, where they were made already.

    Reads 4 bytes a row of at most SAMPLED_UNITS * SAMPLED_ROWS rows of a site. Raises StorageError."""
    strings = strings or TokenStrings(store)
    found = []
    for site in sites:
        if (extreme := _of_site(store, site)) is None:
            continue
        found.append(replace(extreme, tokens=tuple((strings.get(int(t)) or t, share) for t, share in extreme.tokens)))
    return found


def _of_site(store: StoreReader, site: str) -> ExtremeRows | None:
    """With token ids in place of their strings."""
    committed = sorted(store.committed(site))
    if not committed:
        return None
    chosen = {committed[len(committed) * i // SAMPLED_UNITS] for i in range(SAMPLED_UNITS)}
    ranges = [(start, min(stop, start + SAMPLED_ROWS)) for start, stop in map(store.info.unit_rows, sorted(chosen))]
    norms = np.concatenate([store.norms(site, slice(start, stop)) for start, stop in ranges])
    median = float(np.median(norms))
    is_extreme = norms > EXTREME * median
    if median == 0 or not is_extreme.any():
        return None
    columns = [store.columns(start, stop, ("position", "token")) for start, stop in ranges]
    positions, tokens = (np.concatenate([c[name] for c in columns])[is_extreme] for name in ("position", "token"))
    largest = float(norms.max()) / median
    most = tuple((str(token), share) for token, share in _most(tokens))
    return ExtremeRows(site, len(norms), float(is_extreme.mean()), largest, _most(positions), most)


def _most(values: Array) -> tuple[tuple[int, float], ...]:
    """The commonest values, with the share of all that each has."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    return tuple((int(found[i]), float(counts[i] / len(values))) for i in order)
