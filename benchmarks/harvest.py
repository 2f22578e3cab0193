"""Rows per second of a harvest against the bare forward pass: python -m benchmarks.harvest

A Llama with hidden size 512 and 8 layers, random weights in bfloat16, contexts of 256, three sites of the last layer
stored (so that no layer can be left out). In turn, several times in one run: the plain eager forward pass of the same
model on full batches, and units through a real harvester actor, two in flight, committed to disk. Loading and
compiling are left out on both sides (steady state); how long they took is printed.

Memory: the actor's peak resident size over the harvest, less what it takes to hold and run the model (its size after a
unit, and the peak of one more forward pass above that), in units of stored bytes; on a corpus and on one four times as
large.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine
from jobs.demo.corpus import standard_library_documents
from pipeline.models import describe_model
from workers.cluster import connected
from workers.harvester import UNITS_IN_FLIGHT, Harvester, HarvesterSetup
from workers.harvesting import declare, prepare_harvests
from workers.planning import ensure_store
from workers.settings import CorpusSettings, HarvestSettings, ModelSettings

HIDDEN, LAYERS, CONTEXT, BATCH_TOKENS, ROWS_PER_UNIT = 512, 8, 256, 4096, 32768
SITES = [f"resid_post.{LAYERS - 1}", f"mlp_in.{LAYERS - 1}", f"mlp_out.{LAYERS - 1}"]
UNITS_PER_ROUND = 5
EAGER_BATCHES_PER_ROUND = 16


class MeasuredHarvester(Harvester):
    """A harvester that tells its memory."""

    def model_bytes(self) -> int:
        """Resident bytes of the process with its model, at the peak of a forward pass of a full batch; no unit held."""
        gc.collect()
        tokens = torch.zeros(BATCH_TOKENS // CONTEXT, CONTEXT, dtype=torch.int64)
        self.resident_bytes(reset_peak=True)
        self._compute.submit(torch.inference_mode()(self._runner._forward), tokens).result()
        return self.resident_bytes(reset_peak=True)[1]

    def resident_bytes(self, reset_peak: bool = False) -> tuple[int, int]:
        """Resident bytes now, and the peak since the last reset."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", choices=("true", "false"), default="true")
    arguments = parser.parse_args()
    compiled = arguments.compile == "true"
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = run(Path(folder), arguments.rounds, arguments.threads, compiled)
    print(json.dumps({"machine": machine(), "threads": arguments.threads, "compiled": compiled, **result}))


def run(folder: Path, rounds: int, threads: int, compiled: bool) -> dict[str, Any]:
    make_model(folder / "model")
    make_corpus(folder / "corpus.parquet")
    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, model.config.vocab_size, (BATCH_TOKENS // CONTEXT, CONTEXT))
    units = rounds * UNITS_PER_ROUND
    ours, eager, peaks = [], [], {}
    with connected("local", cpus=threads):
        for size in (units + 2, 4 * (units + 2)):
            setup = prepare(folder, size, threads, compiled)
            started = time.perf_counter()
            actor = (
                ray.remote(max_concurrency=UNITS_IN_FLIGHT)(MeasuredHarvester).options(num_cpus=threads).remote(setup)
            )
            ray.get(actor.harvest_unit.remote(0))
            warm_up = time.perf_counter() - started
            loaded = ray.get(actor.model_bytes.remote())
            if size == units + 2:
                print(f"load, compile and first unit: {warm_up:.1f} s")
                for number in range(rounds):
                    eager.append(eager_rate(model, tokens))
                    ours.append(harvest_rate(actor, 1 + number * UNITS_PER_ROUND))
                    print(f"round {number}: eager {eager[-1]:,.0f}, ours {ours[-1]:,.0f} rows/s", flush=True)
            else:
                harvest_rate(actor, 1)
            _, peak = ray.get(actor.resident_bytes.remote())
            peaks[size] = (peak - loaded) / (ROWS_PER_UNIT * HIDDEN * 2 * len(SITES))
            ray.kill(actor)
    ratio = statistics.median(a / b for a, b in zip(ours, eager, strict=True))
    print(f"harvest {statistics.median(ours):,.0f} rows/s, eager forward {statistics.median(eager):,.0f}: {ratio:.2f}")
    for size, growth in peaks.items():
        print(f"memory above the running model, corpus of {size * ROWS_PER_UNIT:,} rows: {growth:.2f} units")
    return {
        "ours_rows_per_s": statistics.median(ours),
        "eager_rows_per_s": statistics.median(eager),
        "ratio": ratio,
        "warm_up_s": warm_up,
        "peak_units": {str(size * ROWS_PER_UNIT): growth for size, growth in peaks.items()},
    }


def eager_rate(model: Any, tokens: torch.Tensor) -> float:
    """Rows per second of the plain forward pass; a context of 256 tokens gives 255 rows, as in the harvest."""
    with torch.inference_mode():
        started = time.perf_counter()
        for _ in range(EAGER_BATCHES_PER_ROUND):
            model(tokens, use_cache=False)
        seconds = time.perf_counter() - started
    return EAGER_BATCHES_PER_ROUND * tokens.shape[0] * (tokens.shape[1] - 1) / seconds


def harvest_rate(actor: Any, first: int) -> float:
    """Rows per second of units first ... first + UNITS_PER_ROUND - 1, from the first hand-out to the last commit."""
    started = time.perf_counter()
    results = ray.get([actor.harvest_unit.remote(unit) for unit in range(first, first + UNITS_PER_ROUND)])
    return sum(r.rows for r in results) / (time.perf_counter() - started)


def make_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "jobs" / "demo" / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_corpus(path: Path) -> None:
    """The demo's text, over and over: 8 copies are about 20 million rows."""
    documents = list(standard_library_documents())
    order = np.random.default_rng(0).integers(0, len(documents), 8 * len(documents))
    columns = {"text": [documents[i].text for i in order], "kind": [documents[i].kind for i in order]}
    pq.write_table(pa.table(columns), path)


def prepare(folder: Path, units: int, threads: int, compiled: bool) -> HarvesterSetup:
    model = ModelSettings(id=str(folder / "model"), dtype="bfloat16")
    corpus = CorpusSettings(
        path=str(folder / "corpus.parquet"), labels=("kind",), context=CONTEXT, rows=units * ROWS_PER_UNIT,
        rows_per_unit=ROWS_PER_UNIT,
    )  # fmt: skip
    harvest = HarvestSettings(
        sites=tuple(SITES), threads_per_worker=threads, batch_tokens=BATCH_TOKENS, compile=compiled
    )
    store, _ = ensure_store(folder / f"store-{units}", corpus, model, lambda done, total: None)
    (job,) = prepare_harvests(store, model, describe_model(model.id), harvest)
    declare(store, job)
    return job.setup


if __name__ == "__main__":
    main()
