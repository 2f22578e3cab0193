"""Rows per second beside SAELens: python -m benchmarks.peers

The same Llama (see benchmarks.harvest) from the same folder, the same text and cores, in turn in one run: SAELens'
CacheActivationsRunner storing one site (the output of the last layer) with as many threads as there are cores, and our
harvesters storing three of that layer, one of one thread for each core, through real actors, committed and flushed to
disk. Loading, compiling and tokenising are left out on both sides.

SAELens gets what suits it: the model in the faster type of the machine, full batches of as many tokens as ours,
contexts tokenised beforehand that follow one another without padding (BOS and 255 tokens, documents run together; every
position counts as a row, BOS too), no shuffling, one shard, no hub. By default it runs models as transformer_lens'
HookedTransformer and stores float32; the model as transformers has it (AutoModelForCausalLM), and float16, are faster.
It does not flush to disk, and its hooks on every module rule out compiling.

It is installed once, with its dependencies, into .bench-venv/saelens (see benchmarks.peer_libraries.environments).
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.harvest import (
    BATCH_TOKENS,
    CONTEXT,
    HIDDEN,
    LAYERS,
    ROWS_PER_UNIT,
    UNITS_PER_WORKER,
    Rate,
    harvest_rate,
    make_corpus,
    make_model,
    prepare,
    ratio_of,
    start,
)
from benchmarks.peer_libraries.environments import SAELENS, PeerProcess, environment_python, peer_process
from pipeline.precision import faster_type
from storage.store import open_store
from workers.cluster.connect import connected
from workers.machine import machine

SAELENS_ROWS = 4 * ROWS_PER_UNIT
OURS = f"ours, 3 sites, {faster_type()}"
THEIRS = {
    "SAELens, 1 site, its defaults (HookedTransformer, float32)": ("HookedTransformer", "float32"),
    "SAELens, 1 site, HookedTransformer, float16": ("HookedTransformer", "float16"),
    "SAELens, 1 site, AutoModel, float32": ("AutoModelForCausalLM", "float32"),
    "SAELens, 1 site, AutoModel, float16": ("AutoModelForCausalLM", "float16"),
}
"""Class of the model, and what the rows are stored as: bfloat16 it cannot."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    python = environment_python("saelens", [SAELENS])
    with tempfile.TemporaryDirectory(prefix="bench-") as name, connected("local", cpus=arguments.threads):
        result = run(Path(name), python, arguments.rounds, arguments.threads)
    print(json.dumps({"machine": machine(), "saelens": SAELENS, "threads": arguments.threads, **result}))


def run(folder: Path, python: Path, rounds: int, threads: int) -> dict[str, Any]:
    make_model(folder / "model")
    make_corpus(folder / "corpus.parquet")
    setup = prepare(folder, threads * (1 + rounds * UNITS_PER_WORKER), 1, compiled=True)
    write_contexts(setup.store, folder / "contexts.parquet")
    actors = start(setup, threads)
    rates: dict[str, list[Rate]] = {OURS: [], **{name: [] for name in THEIRS}}
    with ExitStack() as stack:
        peers = {name: stack.enter_context(saelens(python, folder, threads, *of)) for name, of in THEIRS.items()}
        for number in range(rounds):
            rates[OURS].append(harvest_rate(actors, threads * (1 + number * UNITS_PER_WORKER), UNITS_PER_WORKER)[0])
            for name, peer in peers.items():
                rates[name].append(saelens_rate(peer))
            print(f"round {number}: {', '.join(f'{k} {v[-1][0]:,.0f}' for k, v in rates.items())} rows/s", flush=True)
    for actor in actors:
        ray.kill(actor)
    print("| | rows/s | rows per second of a core | ours to it | in seconds of a core |\n|---|---|---|---|---|")
    for name, taken in rates.items():
        rate, per_core = map(statistics.median, zip(*taken, strict=True))
        to_it, of_core = ratio_of(rates[OURS], taken), ratio_of(rates[OURS], taken, 1)
        print(f"| {name} | {rate:,.0f} | {per_core:,.0f} | {to_it:.2f} | {of_core:.2f} |")
    return {
        "rows_per_s": {name: statistics.median(rate for rate, _ in taken) for name, taken in rates.items()},
        "ratios": {name: ratio_of(rates[OURS], rates[name]) for name in THEIRS},
        "cpu_ratios": {name: ratio_of(rates[OURS], rates[name], 1) for name in THEIRS},
    }


def write_contexts(store_url: str, path: Path) -> None:
    """The store's text as SAELens takes it: `input_ids` of whole contexts, without padding."""
    store = open_store(store_url)
    tokens = store.columns(0, min(store.num_rows, SAELENS_ROWS), ["token"])["token"]  # without BOS
    number = len(tokens) // (CONTEXT - 1)
    bos = store.context_tokens(0, 0)[0][0]
    contexts = np.full((number, CONTEXT), bos, dtype=np.int64)
    contexts[:, 1:] = tokens[: number * (CONTEXT - 1)].reshape(number, CONTEXT - 1)
    pq.write_table(pa.table({"input_ids": contexts.tolist()}), path)


@contextmanager
def saelens(python: Path, folder: Path, threads: int, kind: str, dtype: str) -> Iterator[PeerProcess]:
    """A process that runs SAELens' runner whenever it is asked to; it has done so once."""
    place = folder / f"{kind}-{dtype}"
    place.mkdir()
    settings = {
        "folder": str(place),
        "contexts": str(folder / "contexts.parquet"),
        "model": str(folder / "model"),
        "class": kind,
        "hook": f"blocks.{LAYERS - 1}.hook_resid_post" if kind == "HookedTransformer" else f"model.layers.{LAYERS - 1}",
        "d_model": HIDDEN,
        "context": CONTEXT,
        "batch": BATCH_TOKENS // CONTEXT,
        "rows": SAELENS_ROWS,
        "dtype": dtype,
        "model_dtype": faster_type(),
        "bytes": np.dtype(dtype).itemsize,
        "compile": False,
        "threads": threads,
    }
    with peer_process(python, "saelens_cache.py", settings, threads) as peer:
        saelens_rate(peer)
        yield peer


def saelens_rate(peer: PeerProcess) -> Rate:
    found = peer.ask({"run": True})
    return found["rows"] / found["seconds"], found["rows"] / found["core_seconds"]


if __name__ == "__main__":
    main()
