"""How fast `granary verify` is, against reading the same files: python -m benchmarks.verify

A store of two units of 65,536 rows and one site of width 1024 in bfloat16 (256 MiB of activations). Each round
reads all chunk files in order with numpy, reads the rows through the store, and verifies the store. From the page
cache: it shows what checking costs, not the disk.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.format.arrays import DTYPES
from storage.harvest.harvest import Harvest, SiteLayout, declare_harvest
from storage.harvest.identity import HarvestIdentity
from storage.harvest.moments import MomentKey, Moments
from storage.harvest.write_unit import UnitBlock, write_unit
from storage.make.create import Table, create_store
from storage.store import Store
from storage.table.root import CorpusInfo
from storage.verify.findings import Fault
from storage.verify.verify import verify
from workers.machine import machine

UNITS, ROWS_PER_UNIT, WIDTH, CONTEXT = 2, 65536, 1024, 256
SITE = "resid_post.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as folder:
        store = make_store(Path(folder) / "store")
        os.sync()
        chunks = sorted((store.path / "activations").rglob("c/*/0"))
        ways = {
            "numpy.fromfile of the chunk files": lambda: [np.fromfile(path, np.uint8) for path in chunks],
            "Store.read, unit by unit": lambda: [
                store.read(SITE, slice(*store.info.unit_rows(u))) for u in range(UNITS)
            ],
            "granary verify": lambda: check(store),
        }
        gigabytes = store.num_rows * WIDTH * 2 / 1e9
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds + 1):  # the first round warms caches and pools, and is dropped
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                speeds[name].append(gigabytes / (time.perf_counter() - started))
    result: dict[str, Any] = {"machine": machine(), "ways": {}}
    print(f"{'':36s} GB/s  of fromfile  of Store.read")
    plain, ours = list(speeds.values())[:2]
    for name, found in speeds.items():
        line = {
            "speed": statistics.median(found[1:]),
            "of_fromfile": statistics.median(a / b for a, b in list(zip(found, plain, strict=True))[1:]),
            "of_read": statistics.median(a / b for a, b in list(zip(found, ours, strict=True))[1:]),
        }
        result["ways"][name] = line
        print(f"{name:34s} {line['speed']:6.2f}  {line['of_fromfile']:11.2f}  {line['of_read']:13.2f}")
    print(json.dumps(result))


def check(store: Store) -> None:
    found = list(verify(store.root))
    assert not any(isinstance(finding, Fault) for finding in found), found


def make_store(path: Path) -> Store:
    num_rows = UNITS * ROWS_PER_UNIT
    store = create_store(path, table(num_rows), lambda digest: info(num_rows, digest), lambda folder: None)
    layout = SiteLayout.of(WIDTH, "bfloat16", ROWS_PER_UNIT)
    harvest = Harvest.of(
        HarvestIdentity.made_up(ROWS_PER_UNIT, sites={SITE: "bfloat16"}), "made-up", {SITE: layout}, {}
    )
    declare_harvest(store.root, num_rows, harvest)
    for unit in range(UNITS):
        rows = np.random.default_rng(unit).standard_normal((ROWS_PER_UNIT, WIDTH), dtype=np.float32)
        stored = rows.astype(DTYPES["bfloat16"])
        wide = stored.astype(np.float32)
        norms = np.sqrt(np.einsum("rd,rd->r", wide, wide))
        moments = Moments(ROWS_PER_UNIT, wide.sum(0, dtype=np.float64), np.square(wide).sum(0, dtype=np.float64))
        block = UnitBlock({SITE: stored}, {SITE: norms}, {MomentKey(SITE): moments})
        write_unit(store, harvest, unit, block, writer="benchmark", figures=None)
    return store


def table(num_rows: int) -> Table:
    context = np.arange(num_rows) // CONTEXT
    contexts = num_rows // CONTEXT
    starts = np.arange(contexts) * CONTEXT
    return Table(
        columns={
            "token": np.arange(num_rows, dtype=np.int32),
            "position": (np.arange(num_rows) % CONTEXT).astype(np.int32),
            "document": context.astype(np.int64),
            "context": context.astype(np.int64),
        },
        context_token=np.arange(num_rows, dtype=np.int32),
        context_start=np.arange(0, num_rows + 1, CONTEXT).astype(np.int64),
        documents=pa.table(
            {
                "document": np.arange(contexts),
                "row_start": starts,
                "row_stop": starts + CONTEXT,
                "source": [str(n) for n in range(contexts)],
            }
        ),
    )


def info(num_rows: int, digest: str) -> CorpusInfo:
    return CorpusInfo(
        num_rows=num_rows,
        num_contexts=num_rows // CONTEXT,
        num_context_tokens=num_rows,
        num_documents=num_rows // CONTEXT,
        rows_per_unit=ROWS_PER_UNIT,
        context=CONTEXT,
        skip_first=0,
        held_out_start=num_rows,
        labels=[],
        roles=[],
        corpus_digest=digest,
        tokenizer_digest="",
        plan={},
        skipped={},
        made_with={},
    )


if __name__ == "__main__":
    main()
