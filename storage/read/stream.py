"""Shuffled batches whose order is a pure function of (store, seed, position).

Epoch e of a stream is one permutation of the rows that are not held out: the blocks (`BLOCK_ROWS` rows, whatever the
sites and the size of their chunks) in a seeded order, taken `POOL_ROWS` at a time into a pool, the rows permuted within
the pool. Epochs follow one another without a gap. Row p of this endless sequence is the same for every reader, whatever
it reads, so batch s is rows [s * batch_rows, (s + 1) * batch_rows) of it: a checkpoint is one integer, and a stream
that starts at step s equals one that ran there. Each epoch gives every row exactly once; where rows of extreme norm are
left out, every other row. The next pool is read while the current one is used.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from storage.errors import StorageError
from storage.format.arrays import Array
from storage.format.site_rows import SiteRows, unscaled
from storage.read.norm_filter import NormFilter, norm_filter
from storage.read.reader import StoreReader

BLOCK_ROWS = 2**14
"""Rows that are read in one piece, or a unit's if those are fewer. Chunks divide it for widths from 128 on (bfloat16).
Documents are in random order in the store, so that pieces as long as this mix as well as short ones."""
POOL_ROWS = 2**17
"""Rows of a pool: wide enough to mix hundreds of documents, small enough to hold two (256 MiB each at d = 1024)."""


def block_rows_of(rows_per_unit: int) -> int:
    """Return the rows of a block in a store whose units have `rows_per_unit` rows."""
    return min(rows_per_unit, BLOCK_ROWS)


@dataclass(frozen=True)
class Order:
    """The shuffled order of `num_rows` rows in blocks of `block_rows`. Values in, values out; no I/O."""

    num_rows: int
    block_rows: int
    seed: int
    pool_rows: int = POOL_ROWS
    kept: Array | None = field(default=None, compare=False)
    """int64 [blocks]: rows of each block that are not left out; all, if not given."""

    @cached_property
    def counts(self) -> Array:
        """int64 [blocks]: rows given of each block."""
        starts = np.arange(self.num_blocks) * self.block_rows
        return np.minimum(self.block_rows, self.num_rows - starts) if self.kept is None else self.kept

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.block_rows)

    @property
    def blocks_per_pool(self) -> int:
        return max(1, self.pool_rows // self.block_rows)

    @property
    def pools_per_epoch(self) -> int:
        return -(-self.num_blocks // self.blocks_per_pool)

    def pool(self, number: int) -> tuple[list[tuple[int, int]], Array]:
        """Pool `number` of the endless sequence: its blocks as row ranges, and the order of the rows kept of them."""
        epoch, pool = divmod(number, self.pools_per_epoch)
        blocks = self._rng(epoch, 0).permutation(self.num_blocks)
        mine = blocks[pool * self.blocks_per_pool : (pool + 1) * self.blocks_per_pool]
        ranges = [(int(b) * self.block_rows, min((int(b) + 1) * self.block_rows, self.num_rows)) for b in mine]
        rows = self._rng(epoch, 1 + pool).permutation(int(self.counts[mine].sum()))
        return ranges, rows

    def locate(self, position: int) -> tuple[int, int]:
        """The pool that holds a position of the endless sequence, and the offset in it."""
        epoch, offset = divmod(position, int(self.counts.sum()))
        blocks = self._rng(epoch, 0).permutation(self.num_blocks)
        ends = np.cumsum(np.add.reduceat(self.counts[blocks], np.arange(0, self.num_blocks, self.blocks_per_pool)))
        pool = int(np.searchsorted(ends, offset, side="right"))
        return epoch * self.pools_per_epoch + pool, offset - (int(ends[pool - 1]) if pool else 0)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *key])))


def stream(
    store: StoreReader,
    sites: Sequence[str],
    *,
    batch_rows: int,
    seed: int = 0,
    start_step: int = 0,
    steps: int | None = None,
    max_norm: float | None = None,
    norm_site: str | None = None,
) -> Iterator[dict[str, Array]]:
    """Yield batch `start_step`, `start_step + 1`, ... as {site: [batch_rows, d_model]} in the stored dtype, int8 as
    float32.

    All sites of a batch hold the same rows in the same order; key "row" holds the row numbers (int64). Endless unless
    `steps` is given. `max_norm`: rows are left out whose norm at `norm_site` (the first of `sites`, if not given) is
    above this many times the median; the order depends on both. Raises UncommittedRows before the first batch when a
    unit that is not held out is missing.
    """
    num_rows = store.info.held_out_start
    if num_rows == 0:
        raise StorageError("every row of the store is held out: nothing to stream")
    arrays = {site: store.site_rows(site) for site in sites}
    for site in sites:
        store.require_committed(site, range(-(-num_rows // store.info.rows_per_unit)))
    block_rows = block_rows_of(store.info.rows_per_unit)
    chosen = None if max_norm is None else norm_filter(store, norm_site or sites[0], max_norm, block_rows)
    order = Order(num_rows, block_rows, seed, kept=None if chosen is None else chosen.counts)
    return _batches(store, arrays, order, chosen, batch_rows, start_step, steps)


def _batches(
    store: StoreReader,
    arrays: dict[str, SiteRows],
    order: Order,
    chosen: NormFilter | None,
    batch_rows: int,
    start_step: int,
    steps: int | None,
) -> Iterator[dict[str, Array]]:
    if steps == 0:
        return
    pool_number, offset = order.locate(start_step * batch_rows)
    last_pool = None if steps is None else order.locate((start_step + steps) * batch_rows - 1)[0]
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as prefetch:

        def read_ahead() -> Future[dict[str, Array]] | None:
            if last_pool is not None and pool_number > last_pool:
                return None
            return prefetch.submit(_read_pool, store, arrays, order, chosen, pool_number)

        upcoming = read_ahead()
        pool: dict[str, Array] = {"row": np.empty(0, np.int64)}
        given = 0
        while steps is None or given < steps:
            parts: list[dict[str, Array]] = []
            wanted = batch_rows
            while wanted:
                if offset >= len(pool["row"]):
                    offset -= len(pool["row"])
                    assert upcoming is not None  # the last pool has the last row that is asked for
                    pool = upcoming.result()
                    pool_number += 1
                    upcoming = read_ahead()
                    continue
                taken = {name: values[offset : offset + wanted] for name, values in pool.items()}
                parts.append(taken)
                offset += len(taken["row"])
                wanted -= len(taken["row"])
            batch = parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            yield _as_read(batch, arrays)
            given += 1


def _read_pool(
    store: StoreReader, arrays: dict[str, SiteRows], order: Order, chosen: NormFilter | None, number: int
) -> dict[str, Array]:
    with store.as_opened():
        return _pool_rows(arrays, order, chosen, number)


def _pool_rows(arrays: dict[str, SiteRows], order: Order, chosen: NormFilter | None, number: int) -> dict[str, Array]:
    ranges, rows = order.pool(number)
    if chosen is not None:
        rows = np.flatnonzero(np.concatenate([chosen.kept(start, stop) for start, stop in ranges]))[rows]
    pool: dict[str, Array] = {"row": np.concatenate([np.arange(a, b) for a, b in ranges])[rows]}
    for site, of_site in arrays.items():
        for name, array in ((site, of_site.values), (_scales(site), of_site.scales)):
            if array is None:
                continue
            read = np.empty((sum(b - a for a, b in ranges), *array.shape[1:]), dtype=array.numpy_dtype)
            at = 0
            for start, stop in ranges:
                read[at : at + stop - start] = array.read(start, stop)
                at += stop - start
            pool[name] = read[rows]
    return pool


def _scales(site: str) -> str:
    """The name of a site's scales in a pool: int8 rows take a quarter of their memory until they are given out."""
    return f"{site} scales"


def _as_read(batch: dict[str, Array], arrays: dict[str, SiteRows]) -> dict[str, Array]:
    for site, array in arrays.items():
        if array.scales is not None:
            batch[site] = unscaled(batch[site], batch.pop(_scales(site)))
    return batch
