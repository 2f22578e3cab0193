"""Requests, hours, money and the break-even, against cases reckoned by hand."""

import math
from pathlib import Path

import pytest

from jobs.plan.economics import (
    GETS_PER_UNIT,
    GIB,
    Bill,
    Pass,
    Requests,
    Work,
    bill,
    harvest_requests,
    num_objects,
    stored_bytes,
    training_pass,
)
from jobs.plan.price_tables import Prices, load_prices, storage_costs
from pipeline.errors import InputError
from pipeline.sites import STORED_TYPES
from storage.backends.place import open_place
from storage.format.arrays import RowArray

PART_BYTES = 16 * 2**20
PRICES = Prices(
    as_of="then", currency="EUR", gpu_hour=4, cpu_hour=0.1, object_gib_month=0.02, disk_gib_month=0.1, put_1000=0.005,
    get_1000=0.0004, egress_gib=0.09,
)  # fmt: skip


def array(
    rows: int, width: int | None, chunk_rows: int, shard_rows: int | None = None, dtype: str = "bfloat16"
) -> RowArray:
    shape, names = ((rows,), ("row",)) if width is None else ((rows, width), ("row", "d_model"))
    return RowArray(open_place("memory://economics"), shape, dtype, chunk_rows, names, {}, shard_rows)


def work(**changes: object) -> Work:
    given = {"rows": 3_600_000, "training_rows": 1_800_000, "rows_per_second": 1000.0, "workers": 2}
    return Work(**{**given, "gpus_per_worker": 1, "threads_per_worker": 2, **changes})  # type: ignore[arg-type]


def test_bytes_of_plain_chunks() -> None:
    """10 rows of 3 bfloat16 in chunks of 4: 3 files of 4 x 3 x 2 bytes and a checksum; the last is stored whole."""
    of_site = array(10, 3, 4)
    assert (num_objects(of_site), stored_bytes(of_site)) == (3, 3 * (24 + 4))


def test_bytes_of_shards() -> None:
    """10 rows in units of 8, chunks of 4: a shard of 2 chunks and one of 1; an index is 2 entries and a crc."""
    of_site = array(10, 3, 4, shard_rows=8)
    index = 2 * 16 + 4
    assert (num_objects(of_site), stored_bytes(of_site)) == (2, 2 * 28 + index + 28 + index)


def test_requests_of_a_harvest() -> None:
    """65,536-row units of 1024 bfloat16 are 128 MiB and more than 8 parts of 16 MiB: 9 and two; norms take one PUT."""
    rows = 2 * 65536 + 10
    sites = [array(rows, 1024, 2048, shard_rows=65536), array(rows, None, 65536, dtype="float32")]
    last_unit = 1  # one chunk of 4 MiB
    found = harvest_requests(sites, units=3, part_bytes=PART_BYTES, units_per_listing=2)
    assert found == Requests(put=2 * (9 + 2) + last_unit + 3 + 2 * 3, get=3 * GETS_PER_UNIT + 1, list=1 + 2)
    assert found.cost(PRICES) == pytest.approx((found.put + 3) * 0.005 / 1000 + found.get * 0.0004 / 1000)


def test_a_pass_of_training_reads_block_by_block() -> None:
    """Blocks are 16,384 rows, or a unit; chunks of a block are read together, up to 16 MiB a request."""
    wide, narrow = array(65536, 1024, 2048), array(65536, 4, 65536)
    found = training_pass([wide], 60_000, 65536)  # three blocks of 8 chunks of 4 MiB, three to a request, and 6 chunks
    assert found == Pass(Requests(get=3 * 3 + 2), 30 * (2048 * 1024 * 2 + 4))
    found = training_pass([wide, narrow], 60_000, 65536)  # one chunk a unit, read again for every block
    assert found.requests == Requests(get=11 + 4)
    assert found.num_bytes == 30 * (2048 * 1024 * 2 + 4) + 4 * (65536 * 4 * 2 + 4)
    scales = array(65536, None, 65536, dtype="float32")
    assert training_pass([wide, scales], 60_000, 65536).requests == Requests(get=11 + 4)
    small = array(4096, 1024, 2048)
    assert training_pass([small], 3 * 4096, 4096).requests == Requests(get=3)
    assert training_pass([], 60_000, 65536) == Pass(Requests(), 0)


def test_a_bill_on_an_object_store() -> None:
    """3.6 M rows at 1,000 a second are one worker hour, at 4.00; half of the rows are trained on."""
    found = bill(
        work(),
        100 * GIB,
        Requests(put=10_000, get=100_000),
        Pass(Requests(get=50_000), 50 * GIB),
        PRICES,
        on_object_store=True,
    )
    assert found.compute == pytest.approx(4.00)
    assert found.requests == pytest.approx(0.05 + 0.04)
    assert found.month == pytest.approx(2.00)
    assert found.read == pytest.approx(0.02 + 4.50)
    assert found.rerun == pytest.approx(2.00)
    assert found.break_even_passes(months=1) is None  # reading across the network is dearer than the model


def test_a_bill_on_a_disk_of_workers_without_gpus() -> None:
    found = bill(
        work(gpus_per_worker=0),
        10 * GIB,
        Requests(put=10**9),
        Pass(Requests(get=10**9), GIB),
        PRICES,
        on_object_store=False,
    )
    assert found == Bill(
        compute=pytest.approx(0.2), requests=0, month=pytest.approx(1.0), read=0, rerun=pytest.approx(0.1)
    )


def test_no_rate_no_cost_of_computing() -> None:
    found = bill(work(rows_per_second=None), GIB, Requests(), Pass(Requests(), 0), PRICES, on_object_store=True)
    assert (found.compute, found.rerun, found.break_even_passes(1), found.break_even_months(5)) == (None,) * 4
    assert found.month == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("months", "passes"),
    [(0, 10 / 3), (1, 12 / 3), (7, 24 / 3)],
)
def test_break_even_passes(months: float, passes: float) -> None:
    """9 + 1 to store, 2 a month to keep, 1 a pass to read, against 4 a pass to run: each pass saves 3."""
    costs = Bill(compute=9, requests=1, month=2, read=1, rerun=4)
    assert costs.break_even_passes(months) == pytest.approx(passes)
    stored = 9 + 1 + months * 2 + passes * 1
    assert stored == pytest.approx(passes * 4)


def test_break_even_months() -> None:
    costs = Bill(compute=9, requests=1, month=2, read=1, rerun=4)
    assert costs.break_even_months(passes=10) == pytest.approx((30 - 10) / 2)
    assert costs.break_even_months(passes=1) == 0
    assert costs.break_even_months(passes=10 / 3) == 0
    free = Bill(compute=9, requests=1, month=0, read=1, rerun=4)
    assert free.break_even_months(passes=10) == math.inf
    # What is stored already costs no computing any more.
    assert Bill(compute=0, requests=0, month=2, read=1, rerun=4).break_even_passes(1) == pytest.approx(2 / 3)


def test_the_tables_that_come_with_granary() -> None:
    prices = load_prices()
    assert prices.currency == "USD"
    assert all(value >= 0 for _, value in prices if isinstance(value, float))
    costs = storage_costs()
    assert set(costs.types) == set(STORED_TYPES)
    assert costs.types["float32"].relative_error == 0
    assert 0 < costs.types["float16"].relative_error < costs.types["bfloat16"].relative_error
    assert costs.types["bfloat16"].relative_error < costs.types["int8"].relative_error < 1e-3
    assert all(abs(cost.fvu_change) < 0.01 for cost in costs.types.values())


GOOD = "\n".join(f"{name}: {value!r}" for name, value in PRICES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("gpu_hour: 4.0\n", ""), "gpu_hour: field required"),
        (GOOD + "\ngpu_hours: 3", "gpu_hours: extra inputs are not permitted"),
        (GOOD.replace("put_1000: 0.005", "put_1000: cheap"), "put_1000: input should be a valid number"),
        (GOOD.replace("put_1000: 0.005", "put_1000: -1"), "put_1000 must be a number from 0 up"),
        (GOOD.replace("put_1000: 0.005", "put_1000: .nan"), "put_1000 must be a number from 0 up"),
        ("- a\n- b", "the table: input should be a valid dictionary"),
        ("gpu_hour: [", "not valid YAML"),
        ("", "the table: input should be a valid dictionary"),
    ],
)
def test_bad_prices_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=str(path)) as refusal:
        load_prices(path)
    assert message in str(refusal.value)


def test_prices_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_prices(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_prices(tmp_path / "bytes.yaml")
