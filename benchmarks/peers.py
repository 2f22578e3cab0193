"""Rows per second beside SAELens: python -m benchmarks.peers

The same Llama (see benchmarks.harvest) from the same folder, the same text and number of threads, in turn in one run:
SAELens' CacheActivationsRunner storing one site (the output of the last layer), and our harvester storing three of that
layer, through a real actor, committed and flushed to disk. Loading, compiling and tokenising are left out on both
sides.

SAELens gets what suits it best: the model in bfloat16, full batches of as many tokens as ours, contexts tokenised
beforehand that follow one another without padding (BOS and 255 tokens, documents run together; every position counts
as a row, BOS too), no shuffling, one shard, no hub. What it stores is float32, its default, or float16 if that is
faster here (bfloat16 it cannot store). It does not flush to disk, and its hooks on every module rule out compiling.

It is installed once, with its dependencies, into .bench-venv/saelens: it wants other packages than we do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.harvest import (
    BATCH_TOKENS,
    CONTEXT,
    HIDDEN,
    LAYERS,
    ROWS_PER_UNIT,
    UNITS_PER_ROUND,
    Rate,
    harvest_rate,
    make_corpus,
    make_model,
    prepare,
    ratio_of,
    start,
)
from benchmarks.machine import machine
from storage.store import open_store
from workers.cluster import connected

ENVIRONMENT = Path(__file__).parents[1] / ".bench-venv" / "saelens"
SAELENS = "sae-lens==6.54.12"
SAELENS_ROWS = 4 * ROWS_PER_UNIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    python = saelens_python()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, connected("local", cpus=arguments.threads):
        result = run(Path(name), python, arguments.rounds, arguments.threads)
    print(json.dumps({"machine": machine(), "saelens": SAELENS, "threads": arguments.threads, **result}))


def run(folder: Path, python: Path, rounds: int, threads: int) -> dict[str, Any]:
    make_model(folder / "model")
    make_corpus(folder / "corpus.parquet")
    setup = prepare(folder, 1 + rounds * UNITS_PER_ROUND, threads, compiled=True)
    write_contexts(setup.store, folder / "contexts.parquet")
    (actor,) = start(setup, 1)
    rates: dict[str, list[Rate]] = {"ours, 3 sites": [], "SAELens, 1 site, float32": [], "SAELens, 1 site, float16": []}
    with saelens(python, folder, threads, "float32") as wide, saelens(python, folder, threads, "float16") as narrow:
        for number in range(rounds):
            ours, _ = harvest_rate([actor], 1 + number * UNITS_PER_ROUND)
            for taken, rate in zip(rates.values(), (ours, saelens_rate(wide), saelens_rate(narrow)), strict=True):
                taken.append(rate)
            print(f"round {number}: {', '.join(f'{k} {v[-1][0]:,.0f}' for k, v in rates.items())} rows/s", flush=True)
    ray.kill(actor)
    ours_rates, *theirs_rates = rates.values()
    best = max(theirs_rates, key=lambda taken: statistics.median(rate for rate, _ in taken))
    ratio, cpu_ratio = ratio_of(ours_rates, best), ratio_of(ours_rates, best, 1)
    medians = {k: tuple(map(statistics.median, zip(*taken, strict=True))) for k, taken in rates.items()}
    print("| | rows/s | rows per second of a core |\n|---|---|---|")
    for name, (rate, per_core) in medians.items():
        print(f"| {name} | {rate:,.0f} | {per_core:,.0f} |")
    print(f"ours / the better of SAELens': {ratio:.2f}, in seconds of a core {cpu_ratio:.2f}")
    return {"rows_per_s": {k: rate for k, (rate, _) in medians.items()}, "ratio": ratio, "cpu_ratio": cpu_ratio}


def write_contexts(store_url: str, path: Path) -> None:
    """The store's text as SAELens takes it: `input_ids` of whole contexts, without padding."""
    store = open_store(store_url)
    tokens = store.columns(0, min(store.num_rows, SAELENS_ROWS), ["token"])["token"]  # without BOS
    number = len(tokens) // (CONTEXT - 1)
    bos = store.context_tokens(0, 0)[0][0]
    contexts = np.full((number, CONTEXT), bos, dtype=np.int64)
    contexts[:, 1:] = tokens[: number * (CONTEXT - 1)].reshape(number, CONTEXT - 1)
    pq.write_table(pa.table({"input_ids": contexts.tolist()}), path)


def saelens_python() -> Path:
    """The interpreter of SAELens' environment, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").is_file():
        print(f"installing {SAELENS} into {ENVIRONMENT}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        torch_pin = ENVIRONMENT / "constraints.txt"
        torch_pin.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        subprocess.run([*pip, "--constraint", torch_pin, "torch"], check=True)
        subprocess.run([*pip, "--constraint", torch_pin, SAELENS], check=True)
        # Comes with it, is not needed here, and where its build is not torch's, importing transformers fails.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        (ENVIRONMENT / "installed").write_text(SAELENS)
    return python


@contextmanager
def saelens(python: Path, folder: Path, threads: int, dtype: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs SAELens' runner whenever it is asked to; it has done so once."""
    place = folder / dtype
    place.mkdir()
    settings = {
        "folder": str(place),
        "contexts": str(folder / "contexts.parquet"),
        "model": str(folder / "model"),
        "hook": f"model.layers.{LAYERS - 1}",
        "d_model": HIDDEN,
        "context": CONTEXT,
        "batch": BATCH_TOKENS // CONTEXT,
        "rows": SAELENS_ROWS,
        "dtype": dtype,
        "bytes": np.dtype(dtype).itemsize,
        "compile": False,
        "threads": threads,
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [python, Path(__file__).with_name("saelens_cache.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        _say(process, json.dumps(settings))
        saelens_rate(process)
        yield process
    finally:
        process.kill()
        process.wait()


def saelens_rate(process: "subprocess.Popen[str]") -> Rate:
    _say(process, "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"rows"'):
            found = json.loads(line)
            return found["rows"] / found["seconds"], found["rows"] / found["core_seconds"]
    raise SystemExit(f"SAELens ended with exit status {process.wait()}: see its messages above")


def _say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


if __name__ == "__main__":
    main()
