"""Rows per second of a harvest against the bare forward pass: python -m benchmarks.harvest

A Llama with hidden size 512 and 8 layers, random weights in the faster type of the machine, contexts of 256, three
sites of the last layer stored (so that no layer can be left out). Loading and compiling are left out on all sides
(steady state); how long they took is printed. In turn, several times in one run:

- the plain eager forward pass of the same model on full batches of the harvest's size and of the size at which it is
  fastest, and its matrix products alone (no forward pass in that type is faster); the compiled forward pass of the
  harvester on full batches (what a harvest could at best be);
- units through a real harvester actor, two in flight, committed to disk; and through as many actors of one thread as it
  has threads, which hold the model once each;
- units through one worker of one thread, and twice as many through two of them at once.

Beside the clock, the seconds that processes had a core: on a machine that others use too, these say more.

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jobs.demo.corpus import standard_library_documents
from pipeline.model.describe import describe_model
from pipeline.precision import TYPES, faster_type
from workers.cluster.connect import connected
from workers.harvest.harvester import Harvester, HarvesterSetup, UnitResult
from workers.harvest.schedule import UNITS_IN_FLIGHT
from workers.harvest.stage import declare, prepare_harvests
from workers.machine import machine
from workers.plan.stage import ensure_store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import HarvestSettings, ModelSettings

HIDDEN, LAYERS, CONTEXT, BATCH_TOKENS, ROWS_PER_UNIT = 512, 8, 256, 4096, 32768
SITES = [f"resid_post.{LAYERS - 1}", f"mlp_in.{LAYERS - 1}", f"mlp_out.{LAYERS - 1}"]
EAGER_SIZES = (512, 1024, 2048, BATCH_TOKENS)
UNITS_PER_ROUND = 4
UNITS_PER_WORKER = 2
BATCHES_PER_ROUND = 12


Rate = tuple[float, float]
"""Rows per second, and per second of a core."""


class MeasuredHarvester(Harvester):
    """A harvester that tells its memory, its seconds of a core, and the speed of its forward pass."""

    def cpu_seconds(self) -> float:
        return time.process_time()

    def forward_rate(self) -> Rate:
        return self._computer.in_compute_thread(forward_rate, self._forward, self.setup.model.vocabulary)

    def _forward(self, tokens: torch.Tensor) -> None:
        self._runner._forward({"input_ids": tokens})

    def model_bytes(self) -> int:
        """Resident bytes of the process with its model, at the peak of a forward pass of a full batch; no unit held."""
        gc.collect()
        tokens = torch.zeros(BATCH_TOKENS // CONTEXT, CONTEXT, dtype=torch.int64)
        self.resident_bytes(reset_peak=True)
        self._computer.in_compute_thread(torch.inference_mode()(self._forward), tokens)
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
    parser.add_argument("--only", choices=("forward", "workers", "memory"))
    arguments = parser.parse_args()
    compiled = arguments.compile == "true"
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, connected("local", cpus=max(2, arguments.threads)):
        folder = Path(name)
        make_model(folder / "model")
        make_corpus(folder / "corpus.parquet")
        if arguments.only in (None, "forward"):
            result |= against_forward(folder, arguments.rounds, arguments.threads, compiled)
        if arguments.only in (None, "workers"):
            result |= against_one_worker(folder, arguments.rounds, arguments.threads, compiled)
        if arguments.only in (None, "memory"):
            result["peak_units"] = memory(folder, arguments.threads, compiled)
    print(json.dumps({"machine": machine(), "threads": arguments.threads, "compiled": compiled, **result}))


def against_forward(folder: Path, rounds: int, threads: int, compiled: bool) -> dict[str, Any]:
    eager = EagerForward(folder, threads)
    products = matrix_products(eager.model)
    setup = prepare(folder, 1 + rounds * UNITS_PER_ROUND, threads, compiled)
    started = time.perf_counter()
    (actor,) = start(setup, 1)
    warm_up = time.perf_counter() - started
    print(f"load, compile and first unit: {warm_up:.1f} s")
    taken: dict[str, list[Rate]] = {"eager": [], "eager, best": [], "products": [], "compiled": [], "harvest": []}
    results: list[UnitResult] = []
    for number in range(rounds):
        taken["eager"].append(eager.rate(BATCH_TOKENS))
        taken["eager, best"].append(eager.rate(eager.best))
        taken["products"].append(forward_rate(products, eager.model.config.vocab_size))
        taken["compiled"].append(ray.get(actor.forward_rate.remote()))
        rate, of_units = harvest_rate([actor], 1 + number * UNITS_PER_ROUND)
        taken["harvest"].append(rate)
        results += of_units
        print(f"round {number}: {', '.join(f'{k} {v[-1][0]:,.0f}' for k, v in taken.items())} rows/s", flush=True)
    ray.kill(actor)
    ratios, cpu_ratios = ratio_of(taken["harvest"], taken["eager"]), ratio_of(taken["harvest"], taken["eager"], 1)
    to_best = ratio_of(taken["harvest"], taken["eager, best"])
    medians = {
        name: [statistics.median(column) for column in zip(*rates, strict=True)] for name, rates in taken.items()
    }
    print("| | rows/s | rows per second of a core |\n|---|---|---|")
    for name, (rate, per_core) in medians.items():
        print(f"| {name} | {rate:,.0f} | {per_core:,.0f} |")
    rows, positions = sum(r.rows for r in results), sum(r.positions_run for r in results)
    padding = sum(r.padding for r in results) / positions
    print(f"harvest / eager forward: {ratios:.2f}, in seconds of a core {cpu_ratios:.2f}")
    print(f"harvest / eager forward in batches of {eager.best}: {to_best:.2f}")
    print(f"harvest / compiled forward: {ratio_of(taken['harvest'], taken['compiled']):.2f}")
    print(f"padding: {padding:.1%} of the positions run; {positions / rows:.3f} positions a row")
    return {
        "rows_per_s": {name: rate for name, (rate, _) in medians.items()},
        "rows_per_core_s": {name: rate for name, (_, rate) in medians.items()},
        "ratio": ratios,
        "cpu_ratio": cpu_ratios,
        "ratio_to_best_eager": to_best,
        "padding": padding,
        "warm_up_s": warm_up,
    }


def against_one_worker(folder: Path, rounds: int, threads: int, compiled: bool) -> dict[str, Any]:
    """Two workers of one thread on units of their own, and one of them alone; as many units for each worker."""
    eager, forward = EagerForward(folder, threads), []
    setup = prepare(folder, 2 + rounds * 3 * UNITS_PER_WORKER, 1, compiled)
    both = start(setup, 2)
    alone, together = [], []
    for number in range(rounds):
        first = 2 + number * 3 * UNITS_PER_WORKER
        forward.append(eager.rate(eager.best))
        alone.append(harvest_rate(both[:1], first, UNITS_PER_WORKER)[0])
        together.append(harvest_rate(both, first + UNITS_PER_WORKER, UNITS_PER_WORKER)[0])
        print(f"round {number}: one worker {alone[-1][0]:,.0f}, two {together[-1][0]:,.0f} rows/s", flush=True)
    for actor in both:
        ray.kill(actor)
    rates = {"one": statistics.median(r for r, _ in alone), "two": statistics.median(r for r, _ in together)}
    ratio = ratio_of(together, alone)
    # Had each worker a core of its own, two would give this: what the machine's caches and memory cost.
    of_cores = 2 * ratio_of(together, alone, 1)
    print(f"two workers / one worker: {ratio:.2f} ({rates['two']:,.0f} / {rates['one']:,.0f} rows/s); ", end="")
    print(f"by seconds of a core {of_cores:.2f}")
    to_best = ratio_of(together, forward)
    print(f"two workers / eager forward of {threads} threads in batches of {eager.best}: {to_best:.2f}")
    return {
        "workers_rows_per_s": rates,
        "workers_ratio": ratio,
        "workers_cpu_ratio": of_cores,
        "workers_ratio_to_best_eager": to_best,
    }


def memory(folder: Path, threads: int, compiled: bool) -> dict[str, float]:
    peaks = {}
    for size in (UNITS_PER_ROUND + 1, 4 * (UNITS_PER_ROUND + 1)):
        (actor,) = start(prepare(folder, size, threads, compiled), 1)
        loaded = ray.get(actor.model_bytes.remote())
        harvest_rate([actor], 1)
        _, peak = ray.get(actor.resident_bytes.remote())
        rows, growth = size * ROWS_PER_UNIT, (peak - loaded) / (ROWS_PER_UNIT * HIDDEN * 2 * len(SITES))
        peaks[str(rows)] = growth
        print(f"memory above the running model, corpus of {rows:,} rows: {growth:.2f} units")
        ray.kill(actor)
    return peaks


class EagerForward:
    """The model as transformers runs it."""

    def __init__(self, folder: Path, threads: int):
        torch.set_num_threads(threads)
        self.model = AutoModel.from_pretrained(folder / "model", dtype=TYPES[faster_type()]).eval()
        self.best = max(EAGER_SIZES, key=lambda size: self.rate(size)[0])

    def rate(self, batch_tokens: int) -> Rate:
        return forward_rate(partial(self.model, use_cache=False), self.model.config.vocab_size, batch_tokens)


def start(setup: HarvesterSetup, workers: int) -> list[Any]:
    """Actors, each after a first unit (unit 0, 1, ...), so that everything is loaded and compiled."""
    actor = ray.remote(max_concurrency=UNITS_IN_FLIGHT)(MeasuredHarvester).options(num_cpus=setup.threads)
    actors = [actor.remote(setup) for _ in range(workers)]
    ray.get([actor.harvest_unit.remote(unit) for unit, actor in enumerate(actors)])
    return actors


@torch.inference_mode()
def forward_rate(forward: Callable[[torch.Tensor], Any], vocabulary: int, batch_tokens: int = BATCH_TOKENS) -> Rate:
    """Return the rate of full batches; a context of 256 tokens gives 255 rows, as in the harvest."""
    tokens = torch.randint(0, vocabulary, (batch_tokens // CONTEXT, CONTEXT))
    batches = BATCHES_PER_ROUND * BATCH_TOKENS // batch_tokens
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        forward(tokens)
    rows = batches * tokens.shape[0] * (tokens.shape[1] - 1)
    return rows / (time.perf_counter() - started), rows / (time.process_time() - cpu)


def matrix_products(model: nn.Module) -> Callable[[torch.Tensor], None]:
    """The products of a batch with every matrix of the layers, and nothing else."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.randn(BATCH_TOKENS, width).to(TYPES[faster_type()]) for width in {m.in_features for m in linears}
    }

    def products(tokens: torch.Tensor) -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    return products


def harvest_rate(actors: Sequence[Any], first: int, units: int = UNITS_PER_ROUND) -> tuple[Rate, list[UnitResult]]:
    """Return the rate of `units` units for each actor, from the first hand-out to the last commit."""
    cpu = sum(ray.get([actor.cpu_seconds.remote() for actor in actors]))
    started = time.perf_counter()
    waiting = [
        actor.harvest_unit.remote(first + number * units + unit)
        for number, actor in enumerate(actors)
        for unit in range(units)
    ]
    results = ray.get(waiting)
    seconds = time.perf_counter() - started
    cpu = sum(ray.get([actor.cpu_seconds.remote() for actor in actors])) - cpu
    rows = sum(r.rows for r in results)
    return (rows / seconds, rows / cpu), results


def ratio_of(ours: Sequence[Rate], theirs: Sequence[Rate], column: int = 0) -> float:
    """The median over the rounds, each of which took both in turn."""
    return statistics.median(a[column] / b[column] for a, b in zip(ours, theirs, strict=True))


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
    model = ModelSettings(id=str(folder / "model"), dtype=faster_type())
    corpus = CorpusSettings(
        path=(str(folder / "corpus.parquet"),), labels=("kind",), context=CONTEXT, rows=units * ROWS_PER_UNIT,
        rows_per_unit=ROWS_PER_UNIT,
    )  # fmt: skip
    harvest = HarvestSettings(
        sites=tuple(SITES), threads_per_worker=threads, batch_tokens=BATCH_TOKENS, compile=compiled
    )
    info = describe_model(model.id)
    store, _ = ensure_store(folder / f"store-{units}-{threads}", corpus, model, info, lambda done, total: None)
    (job,) = prepare_harvests(store, model, info, harvest)
    declare(store, job)
    return job.setup


if __name__ == "__main__":
    main()
