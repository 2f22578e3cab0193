"""Shuffled batches whose order is a pure function of (store, seed, position).

Epoch e of a stream is one permutation of the rows that are not held out: the blocks (chunks) in a seeded order, taken
`POOL_ROWS` at a time into a pool, the rows permuted within the pool. Epochs follow one another without a gap. Row p of
this endless sequence is the same for every reader, so batch s is rows [s * batch_rows, (s + 1) * batch_rows) of it: a
checkpoint is one integer, and a stream that starts at step s equals one that ran there. Each epoch gives every row
exactly once. The next pool is read while the current one is used.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from storage.arrays import Array, RowArray
from storage.errors import StorageError
from storage.store import Store

POOL_ROWS = 2**17
"""Rows of a pool: wide enough to mix hundreds of documents, small enough to hold two (256 MiB each at d = 1024)."""


@dataclass(frozen=True)
class Order:
    """The shuffled order of `num_rows` rows in blocks of `block_rows`. Values in, values out; no I/O."""

    num_rows: int
    block_rows: int
    seed: int
    pool_rows: int = POOL_ROWS

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
        """Pool `number` of the endless sequence: its blocks as row ranges, and the order of the rows read from them."""
        epoch, pool = divmod(number, self.pools_per_epoch)
        blocks = self._rng(epoch, 0).permutation(self.num_blocks)
        mine = blocks[pool * self.blocks_per_pool : (pool + 1) * self.blocks_per_pool]
        ranges = [(int(b) * self.block_rows, min((int(b) + 1) * self.block_rows, self.num_rows)) for b in mine]
        rows = self._rng(epoch, 1 + pool).permutation(sum(stop - start for start, stop in ranges))
        return ranges, rows

    def locate(self, position: int) -> tuple[int, int]:
        """The pool that holds a position of the endless sequence, and the offset in it."""
        epoch, offset = divmod(position, self.num_rows)
        # All blocks are full but the last one of the table, which is in one of the pools: rows after it come earlier.
        blocks = self._rng(epoch, 0).permutation(self.num_blocks)
        short_pool = int(np.flatnonzero(blocks == self.num_blocks - 1)[0]) // self.blocks_per_pool
        missing = self.num_blocks * self.block_rows - self.num_rows
        size = self.blocks_per_pool * self.block_rows
        if offset >= (short_pool + 1) * size - missing:
            offset += missing
        pool, within = divmod(offset, size)
        return epoch * self.pools_per_epoch + pool, within

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *key])))


def stream(
    store: Store, sites: Sequence[str], *, batch_rows: int, seed: int = 0, start_step: int = 0, steps: int | None = None
) -> Iterator[dict[str, Array]]:
    """Yield batch `start_step`, `start_step + 1`, ... as {site: [batch_rows, d_model]} in the stored dtype.

    All sites of a batch hold the same rows in the same order; key "row" holds the row numbers (int64). Endless unless
    `steps` is given. Raises UncommittedRows before the first batch when a unit that is not held out is missing.
    """
    num_rows = store.info.held_out_start
    if num_rows == 0:
        raise StorageError("every row of the store is held out: nothing to stream")
    arrays = {site: store.array(site) for site in sites}
    for site in sites:
        store.require_committed(site, range(-(-num_rows // store.info.rows_per_unit)))
    order = Order(num_rows, max(a.chunk_rows for a in arrays.values()), seed)
    return _batches(arrays, order, batch_rows, start_step, steps)


def _batches(
    arrays: dict[str, RowArray], order: Order, batch_rows: int, start_step: int, steps: int | None
) -> Iterator[dict[str, Array]]:
    pool_number, offset = order.locate(start_step * batch_rows)
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as prefetch:
        upcoming: Future[dict[str, Array]] = prefetch.submit(_read_pool, arrays, order, pool_number)
        pool: dict[str, Array] = {"row": np.empty(0, np.int64)}
        given = 0
        while steps is None or given < steps:
            parts: list[dict[str, Array]] = []
            wanted = batch_rows
            while wanted:
                if offset >= len(pool["row"]):
                    offset -= len(pool["row"])
                    pool = upcoming.result()
                    pool_number += 1
                    upcoming = prefetch.submit(_read_pool, arrays, order, pool_number)
                    continue
                taken = {name: values[offset : offset + wanted] for name, values in pool.items()}
                parts.append(taken)
                offset += len(taken["row"])
                wanted -= len(taken["row"])
            yield parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            given += 1


def _read_pool(arrays: dict[str, RowArray], order: Order, number: int) -> dict[str, Array]:
    ranges, rows = order.pool(number)
    pool: dict[str, Array] = {"row": np.concatenate([np.arange(a, b) for a, b in ranges])[rows]}
    for site, array in arrays.items():
        read = np.empty((len(rows), *array.shape[1:]), dtype=array.numpy_dtype)
        at = 0
        for start, stop in ranges:
            read[at : at + stop - start] = array.read(start, stop)
            at += stop - start
        pool[site] = read[rows]
    return pool
