"""A harvest without a store: units through `capture.unit_computer`, as a harvester runs them, beside their limits.

Two units are in flight: while one is run, the rows of the one before are on the host, where their norms and moments are
computed. Nothing is written. What it is compared with runs the same batches, one after the other, without waiting.
"""

import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.llama import matrix_products, twin
from benchmarks.gpu.plan import HarvestCase
from benchmarks.gpu.rounds import Timed, in_turn, ratio, repeated
from pipeline.capture.batches import batches_of
from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import model_inputs
from pipeline.capture.unit import Activations, UnitRunner, group_moments, summarise
from pipeline.capture.unit_computer import UnitComputer
from pipeline.precision import faster_type
from pipeline.sites import Site

UNITS_IN_FLIGHT = 2
STORED = "bfloat16"
LABELS = 3
"""Values of the label whose subpopulations have moments of their own."""
GIB = 2**30


def measure_harvest(case: HarvestCase, model: nn.Module, device: torch.device, round_s: float) -> dict[str, Any]:
    """Return rates in positions a second, ratios to the limits, memory, and where a unit's time goes."""
    contexts = contexts_of(case)
    batches = batches_of(contexts, case.batch_tokens, case.context)
    bare = runner_of(case, model, device, [])
    inputs = [model_inputs(model, batch, device) for batch in batches]

    @torch.inference_mode()
    def forward() -> None:
        for batch in inputs:
            bare._forward(batch)

    products = matrix_products(model, batches[0].positions)

    def all_products() -> None:
        for _ in batches:
            products()

    begin_memory(device)
    forward()
    forward_gib = peak_gib(device)
    begin_memory(device)
    units = Units(case, model, device, contexts)
    try:
        started = time.perf_counter()
        if case.compiled:
            units.timed(1)
        compile_s = time.perf_counter() - started if case.compiled else None
        units.forget()
        clocks: dict[str, Timed] = {
            "harvest": units.timed,
            "forward": repeated(forward, device),
            "products": repeated(all_products, device),
        }
        seconds = in_turn(clocks, round_s)
    finally:
        units.close()
    harvest_gib = peak_gib(device)
    positions = sum(batch.positions for batch in batches)
    card = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None
    return {
        "positions_per_s": {name: positions / statistics.median(of) for name, of in seconds.items()},
        "harvest_of_forward": ratio(seconds["forward"], seconds["harvest"]),
        "forward_of_products": ratio(seconds["products"], seconds["forward"]),
        "rows_a_unit": units.rows,
        "batches_a_unit": len(batches),
        "padding": sum(batch.padding for batch in batches) / positions,
        "rounds": len(seconds["harvest"]),
        "compile_s": compile_s,
        "unit_s": statistics.median(seconds["harvest"]),
        "summarise_s": statistics.median(units.summarise_s),
        "idle_share": statistics.median(units.idle) if units.idle else None,
        "peak_gib": {"harvest": harvest_gib, "forward": forward_gib},
        "peak_share_of_card": None if card is None or harvest_gib is None else harvest_gib / card,
    }


def sites_of(case: HarvestCase) -> list[Site]:
    """Return resid_post at evenly spaced layers up to the last, so that no layer can be left out."""
    layers = case.shape.layers
    count = layers if case.sites is None else case.sites
    return [Site(layers * (number + 1) // count - 1, "resid_post") for number in range(count)]


def contexts_of(case: HarvestCase) -> list[ContextRows]:
    """Return the contexts of one unit, one a document, of random tokens; the first position of each is no row."""
    rng = np.random.default_rng(0)
    contexts, row, left = [], 0, case.unit_tokens
    while left >= 2:
        size = int(rng.integers(2, case.context + 1)) if case.packed else case.context
        size = min(size, left)
        tokens = rng.integers(0, case.shape.vocabulary, size).astype(np.int32)
        contexts.append(ContextRows(tokens, np.arange(1, size), row))
        row, left = row + size - 1, left - size
    return contexts


def runner_of(case: HarvestCase, model: nn.Module, device: torch.device, sites: list[Site]) -> UnitRunner:
    """Return a runner over a twin of the model, so that taps and compiled layers are its own."""
    return UnitRunner(
        twin(model),
        dict.fromkeys(sites, STORED),
        d_model=case.shape.hidden,
        batch_tokens=case.batch_tokens,
        context=case.context,
        device=device.type,
        compile_layers=case.compiled,
        blocks=faster_type(device.type) == "bfloat16",  # as a harvest decides it
    )


class Units:
    """Units that are computed and summarised without end, two in flight, and what each of them took."""

    def __init__(self, case: HarvestCase, model: nn.Module, device: torch.device, contexts: list[ContextRows]):
        self.contexts = contexts
        self.rows = sum(context.num_rows for context in contexts)
        bounds = [*(context.first_row for context in contexts), self.rows]
        self._segments = list(pairwise(bounds))
        self._groups = {"label": [str(number % LABELS) for number in range(len(contexts))]}
        self._computer = UnitComputer(
            lambda: runner_of(case, model, device, sites_of(case)),
            rows=self.rows,
            units=UNITS_IN_FLIGHT,
            threads=case.threads,
        )
        self._callers = ThreadPoolExecutor(UNITS_IN_FLIGHT)
        self.forget()

    def forget(self) -> None:
        """Begin the accounts anew."""
        self.summarise_s: list[float] = []
        self.idle: list[float] = []

    def timed(self, units: int) -> float:
        """Return the seconds from the end of a first unit to the end of the last one after it."""
        ended = sorted(self._callers.map(self._unit, range(units + 1)))
        return ended[-1] - ended[0]

    def close(self) -> None:
        self._callers.shutdown()
        self._computer.close()

    def _unit(self, number: int) -> float:
        with self._computer.computing(self.contexts, self.rows, self._summary) as (computed, summarise_s):
            self.summarise_s.append(summarise_s)
            if computed.idle_share is not None and number:  # the first one's counts what lies before it
                self.idle.append(computed.idle_share)
            return time.perf_counter()

    def _summary(self, computed: Activations) -> float:
        started = time.perf_counter()
        for acts in computed.sites.values():
            _, moments = summarise(acts, self._segments)
            group_moments(moments, self._groups)
        return time.perf_counter() - started


def begin_memory(device: torch.device) -> None:
    """Free what is not used, and begin a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the most GiB that tensors had on the card since `begin_memory`; None on CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
