"""What a harvest takes and costs, and when keeping it is cheaper than running the model again. Values in, values out.

Requests are those that an object store counts. Not counted: the table of rows, which is small and written once, and
what is asked a few times in a run (opening the store, the drivers' heartbeats).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.plan.price_tables import Prices
from storage.format.arrays import REQUEST_BYTES, RowArray
from storage.read.stream import block_rows_of

PUTS_PER_UNIT = 2
"""The unit's moments and its commit."""
GETS_PER_UNIT = 9
"""The commit; five columns of its rows and contexts; its documents' part of a Parquet file, in three."""
GIB = 2**30
HOUR_S = 3600


@dataclass(frozen=True)
class Requests:
    put: int = 0
    get: int = 0
    list: int = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(self.put + other.put, self.get + other.get, self.list + other.list)

    def cost(self, prices: Prices) -> float:
        return ((self.put + self.list) * prices.put_1000 + self.get * prices.get_1000) / 1000


@dataclass(frozen=True)
class Work:
    """The rows of a plan, and how fast workers run them."""

    rows: int
    """Rows that are still to be run; twice, where two harvests of the store lack them."""
    training_rows: int
    """All rows that are not held out."""
    rows_per_second: float | None
    """The rate of one worker; None if nobody knows."""
    workers: int | None
    """None where the cluster decides."""
    gpus_per_worker: int
    threads_per_worker: int

    def worker_hours(self, rows: int) -> float | None:
        """Return the hours of all workers together that `rows` take."""
        return None if self.rows_per_second is None else rows / self.rows_per_second / HOUR_S

    def worker_hour_cost(self, prices: Prices) -> float:
        if self.gpus_per_worker:
            return self.gpus_per_worker * prices.gpu_hour
        return self.threads_per_worker * prices.cpu_hour


def num_objects(array: RowArray) -> int:
    """Files, or objects of an object store, that hold an array."""
    return -(-array.num_chunks // array.chunks_per_object)


def stored_bytes(array: RowArray) -> int:
    """Bytes of an array's files, checksums and the rest of the last chunk included."""
    last = num_objects(array) - 1
    return last * array.object_bytes(0) + array.object_bytes(last)


def harvest_requests(arrays: Sequence[RowArray], units: int, part_bytes: int, units_per_listing: int) -> Requests:
    """Requests to write the arrays and the rest of the units; objects above `part_bytes` go up in parts."""
    puts = PUTS_PER_UNIT * units
    for array in arrays:
        last = num_objects(array) - 1
        puts += last * _puts(array.object_bytes(0), part_bytes) + _puts(array.object_bytes(last), part_bytes)
    is_short = arrays[0].shape[0] % unit_rows(arrays) != 0
    gets = GETS_PER_UNIT * units + is_short  # the writer of a short unit looks whether the store has grown
    return Requests(puts, gets, 1 + -(-units // units_per_listing))


def unit_rows(arrays: Sequence[RowArray]) -> int:
    """Rows of a unit, from all arrays of a harvest: norms have a chunk for each unit."""
    return max(array.shard_rows or array.chunk_rows for array in arrays)


def _puts(num_bytes: int, part_bytes: int) -> int:
    return 1 if num_bytes <= part_bytes else 2 + -(-num_bytes // part_bytes)  # begin, parts, complete


@dataclass(frozen=True)
class Pass:
    """Reading the rows that are not held out once, in the order of training."""

    requests: Requests
    num_bytes: int

    def cost(self, prices: Prices) -> float:
        return self.requests.cost(prices) + self.num_bytes / GIB * prices.egress_gib


def training_pass(arrays: Sequence[RowArray], training_rows: int, rows_per_unit: int) -> Pass:
    """One pass over some arrays: blocks in a shuffled order, each read from every array (see storage.read.stream)."""
    whole, rest = divmod(training_rows, block_rows := block_rows_of(rows_per_unit))
    gets = num_bytes = 0
    for array in arrays:
        for blocks, rows in ((whole, block_rows), (1, rest)):
            chunks = -(-rows // array.chunk_rows)
            gets += blocks * -(-chunks // max(1, REQUEST_BYTES // array.chunk_bytes))
            num_bytes += blocks * chunks * array.chunk_bytes
    return Pass(Requests(get=gets), num_bytes)


@dataclass(frozen=True)
class Bill:
    """What things cost, in the currency of the prices. None where it rests on a rate that nobody knows."""

    compute: float | None
    """The forward passes that are still to be run."""
    requests: float
    """What the requests of the harvest cost; 0 on a disk."""
    month: float
    """Keeping the activations for a month."""
    read: float
    """Reading the training rows once."""
    rerun: float | None
    """Running the model again for the training rows, once."""

    def break_even_passes(self, months: float) -> float | None:
        """From how many passes on it is cheaper to store and read than to run the model for each: solves
        compute + requests + months * month + passes * read = passes * rerun. None if it never is, or nobody knows.
        """
        if self.compute is None or self.rerun is None or self.rerun <= self.read:
            return None
        return (self.compute + self.requests + months * self.month) / (self.rerun - self.read)

    def break_even_months(self, passes: float) -> float | None:
        """For how many months keeping the store is cheaper than `passes` runs of the model; infinite where keeping
        costs nothing, 0 if it never is. None if nobody knows."""
        if self.compute is None or self.rerun is None:
            return None
        saved = passes * (self.rerun - self.read) - self.compute - self.requests
        if saved <= 0:
            return 0.0
        return saved / self.month if self.month else float("inf")


def bill(
    work: Work, num_bytes: int, requests: Requests, reading: Pass, prices: Prices, *, on_object_store: bool
) -> Bill:
    """Reckon up. On a disk, requests and reading cost nothing."""

    def computing(rows: int) -> float | None:
        hours = work.worker_hours(rows)
        return None if hours is None else hours * work.worker_hour_cost(prices)

    return Bill(
        compute=computing(work.rows),
        requests=requests.cost(prices) if on_object_store else 0.0,
        month=num_bytes / GIB * (prices.object_gib_month if on_object_store else prices.disk_gib_month),
        read=reading.cost(prices) if on_object_store else 0.0,
        rerun=computing(work.training_rows),
    )
