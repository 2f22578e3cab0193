"""The harvester: an actor that holds the model and computes, writes and commits one unit after another.

Two units are in flight in one actor: while one is computed (by a single thread, whose torch settings are fixed), the
one before is written by the thread of its own call. Each has one of two buffers, made once: the memory of an actor is
the model and two units, whatever the corpus.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import ray
import torch

from pipeline.errors import InputError
from pipeline.models import ModelInfo, load_base_model
from pipeline.rows import ContextRows, contexts_of_rows
from pipeline.sites import parse_site
from pipeline.unit import Buffers, UnitRunner, group_moments, summarise
from storage.arrays import Array
from storage.harvests import Harvest, writer_id
from storage.moments import MomentKey, Moments
from storage.store import Store, open_store
from storage.units import UnitBlock, write_unit
from workers.tensors import to_numpy

UNITS_IN_FLIGHT = 2


@dataclass(frozen=True)
class HarvesterSetup:
    """What an actor needs to begin. Small: it is sent to every actor."""

    store: Path
    harvest: Harvest
    model: ModelInfo
    layers: int
    """Decoder layers to run: those up to the deepest site."""
    model_dtype: str
    attention: str
    compile: bool
    batch_tokens: int
    threads: int
    device: str
    """cpu, cuda, or auto for a model that accelerate spreads over the actor's GPUs."""


@dataclass(frozen=True)
class UnitResult:
    """What the supervisor hears of a unit that is done."""

    unit: int
    rows: int
    positions_run: int
    """Positions of the forward passes, padding and positions that are no rows included."""
    seconds: float
    committed: bool
    """False when another worker's commit was first."""


class Harvester:
    """Plain class, so that benchmarks and tests can run it without Ray; `HarvesterActor` is the actor."""

    def __init__(self, setup: HarvesterSetup):
        self.setup = setup
        self.store = open_store(setup.store)
        self.writer = writer_id()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._runner = self._compute.submit(self._load).result()
        self._free: SimpleQueue[Buffers] = SimpleQueue()
        for _ in range(UNITS_IN_FLIGHT):
            self._free.put(self._runner.buffers(min(self.store.info.rows_per_unit, self.store.num_rows)))

    def harvest_unit(self, unit: int) -> UnitResult:
        """Compute, write and commit one unit. May be called from two threads at once; they take turns to compute."""
        started = time.time()
        buffers = self._free.get()
        try:
            block, positions = self._compute.submit(self._compute_unit, unit, buffers).result()
            about = {"device": self._device_name(), "started_at": started, "seconds": time.time() - started}
            committed = write_unit(self.store, self.setup.harvest, unit, block, writer=self.writer, about=about)
        finally:
            self._free.put(buffers)
        start, stop = self.store.info.unit_rows(unit)
        return UnitResult(unit, stop - start, positions, time.time() - started, committed)

    def _load(self) -> UnitRunner:
        setup = self.setup
        if setup.compile and setup.device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise InputError(
                "compiling the layers on CPU needs a C++ compiler (g++): install one, or set harvest.compile: false"
            )
        torch.set_num_threads(setup.threads)  # of this thread's computations: OpenMP counts threads per caller
        model = load_base_model(
            setup.model, layers=setup.layers, dtype=setup.model_dtype, attention=setup.attention, device=setup.device
        )
        sites = [parse_site(site) for site in setup.harvest.sites]
        layout = next(iter(setup.harvest.sites.values()))
        return UnitRunner(
            model,
            sites,
            dtype=layout["dtype"],
            d_model=layout["d"],
            batch_tokens=setup.batch_tokens,
            device="cuda" if setup.device == "auto" else setup.device,
            context=self.store.info.context,
            compile_layers=setup.compile,
        )

    def _compute_unit(self, unit: int, buffers: Buffers) -> tuple[UnitBlock, int]:
        start, stop = self.store.info.unit_rows(unit)
        contexts, document = read_contexts(self.store, start, stop)
        computed = self._runner.run(contexts, stop - start, into=buffers)
        first_document, last_document = int(document[0]), int(document[-1])
        documents = self.store.documents_between(first_document, last_document)
        bounds = [0, *(1 + (document[1:] != document[:-1]).nonzero()[0]).tolist(), stop - start]
        segments = list(pairwise(bounds))
        groups = {
            label: [str(value) for value in documents.column(label).to_pylist()] for label in self.store.info.labels
        }
        activations: dict[str, Array] = {}
        norms: dict[str, Array] = {}
        moments: dict[MomentKey, Moments] = {}
        for site, acts in computed.sites.items():
            name = str(site)
            row_norms, per_document = summarise(acts, segments)
            activations[name] = to_numpy(acts)
            norms[name] = row_norms.numpy()
            for (label, value), raw in group_moments(per_document, groups).items():
                moments[MomentKey(name, label, value)] = Moments(raw.count, raw.sum.numpy(), raw.sum_squares.numpy())
        return UnitBlock(activations, norms, moments), computed.positions_run

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.setup.device != "cpu" else f"cpu, {self.setup.threads} threads"


# Methods run in threads: one call computes while the other writes.
HarvesterActor = ray.remote(max_restarts=0, max_concurrency=UNITS_IN_FLIGHT)(Harvester)


def read_contexts(store: Store, start: int, stop: int) -> tuple[list[ContextRows], Array]:
    """Read what is needed to compute rows [start, stop): their contexts, and the document of each row."""
    lead = max(0, start - store.info.context)  # a context that touches row `start` begins at most this much earlier
    columns = store.columns(lead, stop, ["token", "context", "document"])
    prefix = store.prefix(int(columns["context"][0]), int(columns["context"][-1]) + 1)
    contexts = contexts_of_rows(columns["token"], columns["context"], prefix, start - lead)
    return contexts, columns["document"][start - lead :]
