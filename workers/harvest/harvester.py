"""The harvester: it holds the model and computes, writes and commits one unit after another.

Two units are in flight at once: while one is computed, the one before is written by the thread of its own call
(pipeline.capture.unit_computer). The memory of a harvester is the model and two units, whatever the corpus.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from pipeline.capture.compilers import check_compiler
from pipeline.capture.contexts import ContextRows, contexts_of_rows
from pipeline.capture.rounding import Rounded
from pipeline.capture.unit import Activations, RawMoments, UnitRunner, group_moments, summarise, value_moments
from pipeline.capture.unit_computer import UnitComputer
from pipeline.model.describe import ModelInfo
from pipeline.model.finite import NotFinite, embedding_not_finite, words_of
from pipeline.model.load import load_base_model
from pipeline.model.placement import Placement
from pipeline.sites import parse_site
from storage.backends.place import open_place
from storage.backends.retry import Waiting
from storage.format.arrays import Array
from storage.harvest.commits import RoundingCost, UnitFigures
from storage.harvest.harvest import Harvest, writer_id
from storage.harvest.moments import MomentKey, Moments
from storage.harvest.write_unit import UnitBlock, write_unit
from storage.store import Store, open_store
from storage.table.root import label_columns
from workers.harvest.schedule import UNITS_IN_FLIGHT
from workers.tensors import to_numpy


@dataclass(frozen=True)
class HarvesterSetup:
    """What an actor needs to begin. Small: it is sent to every actor."""

    store: str
    harvest: Harvest
    model: ModelInfo
    layers: int
    """Decoder layers to run: those up to the deepest site."""
    model_dtype: str
    attention: str
    compile: bool
    batch_tokens: int
    threads: int
    placement: Placement
    blocks: bool = True
    """True if compiled layers may attend in blocks; see `UnitRunner`."""


@dataclass(frozen=True)
class ComputedUnit:
    """A unit before it is written."""

    activations: Activations
    block: UnitBlock
    figures: UnitFigures
    """What its commit says of how it was computed."""


@dataclass(frozen=True)
class UnitResult:
    """What the supervisor hears of a unit that is done."""

    unit: int
    rows: int
    positions_run: int
    """Positions of the forward passes: padding and positions that are no rows included."""
    padding: int
    """Those of them that belong to no context."""
    seconds: float
    committed: bool
    """False when another worker's commit was first."""
    idle_share: float | None = None
    """Share of the time that the worker's GPU spent outside forward passes; None on CPU."""


def _no_step() -> None:
    return None


class Harvester:
    """Plain class, so that benchmarks and tests can run it without Ray; workers.harvest.actor has the actor."""

    def __init__(self, setup: HarvesterSetup, on_step: Callable[[], None] = _no_step, waiting: Waiting | None = None):
        """`on_step` is called after each batch and each few writes; `waiting` is told when the store stops answering,
        and when it does again."""
        self.setup = setup
        self.on_step = on_step
        self.store = open_store(open_place(setup.store, waiting=waiting))
        self.writer = writer_id()
        self._computer = UnitComputer(
            self._load,
            rows=min(self.store.info.rows_per_unit, self.store.num_rows),
            units=UNITS_IN_FLIGHT,
            threads=setup.threads,
        )
        self._runner = self._computer.runner

    def harvest_unit(self, unit: int) -> UnitResult:
        """Compute, write and commit one unit. May be called from two threads at once; they take turns to compute."""
        with self.computing(unit) as computed:
            committed = write_unit(
                self.store,
                self.setup.harvest,
                unit,
                computed.block,
                writer=self.writer,
                figures=computed.figures,
                on_step=self.on_step,
            )
        start, stop = self.store.info.unit_rows(unit)
        return UnitResult(
            unit=unit,
            rows=stop - start,
            positions_run=computed.activations.positions_run,
            padding=computed.activations.padding,
            seconds=time.time() - computed.figures.started_at,
            committed=committed,
            idle_share=computed.activations.idle_share,
        )

    @contextmanager
    def computing(self, unit: int) -> Iterator["ComputedUnit"]:
        """Compute one unit. Its arrays are buffers that belong to the caller within the block only."""
        started = time.time()
        start, stop = self.store.info.unit_rows(unit)
        contexts, groups = read_contexts(self.store, start, stop)
        summarise = partial(self._summarise, contexts, groups)
        with self._computer.computing(contexts, stop - start, summarise) as (activations, block):
            figures = UnitFigures(
                positions_run=activations.positions_run,
                padding=activations.padding,
                rounding=rounding_of(activations, block),
                device=self.device_name,
                started_at=started,
                seconds=time.time() - started,
                idle_share=activations.idle_share,
            )
            yield ComputedUnit(activations, block, figures)

    @property
    def device_name(self) -> str:
        """What computes, as commits name it."""
        on_gpu = self.setup.placement.device != "cpu"
        return torch.cuda.get_device_name() if on_gpu else f"cpu, {self.setup.threads} threads"

    def _load(self) -> UnitRunner:
        setup = self.setup
        if setup.compile:
            check_compiler(setup.placement.device)
        model = load_base_model(
            setup.model,
            layers=setup.layers,
            dtype=setup.model_dtype,
            attention=setup.attention,
            placement=setup.placement,
        )
        layouts = setup.harvest.sites
        model.register_forward_hook(lambda *_: self.on_step())
        return UnitRunner(
            model,
            {parse_site(site): layout.dtype for site, layout in layouts.items()},
            d_model=next(iter(layouts.values())).d,
            batch_tokens=setup.batch_tokens,
            device=setup.placement.input_device,
            context=self.store.info.context,
            compile_layers=setup.compile,
            blocks=setup.blocks,
        )

    def _summarise(self, contexts: Sequence[ContextRows], groups: "RowGroups", computed: Activations) -> UnitBlock:
        sites = {str(site): acts for site, acts in computed.sites.items()}
        try:
            return unit_block(self.store, groups, sites, self.on_step)
        except NotFinite as error:
            # layers were looked at as they were loaded; other rows of the embedding have no part in this unit
            tokens = torch.cat([torch.from_numpy(context.tokens.astype("int64")) for context in contexts])
            names = embedding_not_finite(self._runner.model, tokens)
            if not names:
                raise
            reason = f"is not finite: {words_of(self.setup.model.id, names)}"
            raise NotFinite(error.row, reason, error.site) from None


def rounding_of(run: Activations, block: UnitBlock) -> dict[str, RoundingCost]:
    """What storing each site cost."""
    return {
        str(site): RoundingCost(error, float(block.moments[MomentKey(str(site))].sum_squares.sum()))
        for site, error in run.square_errors.items()
    }


@dataclass(frozen=True)
class RowGroups:
    """What tells the subpopulations of a unit's rows."""

    document: Array
    """The document of each row, [rows]."""
    labels: dict[str, Array]
    """The number of each row's value [rows] for each label of rows; -1 where it has none."""


def unit_block(
    store: Store, groups_of_rows: RowGroups, sites: Mapping[str, Rounded], on_step: Callable[[], None] = _no_step
) -> UnitBlock:
    """A unit as it is stored: its rows with their norms, and the moments of all rows and of each subpopulation.

    `sites` has the rows of each site as they are stored, [rows, d_model]; `on_step` is called after each site.
    """
    document = groups_of_rows.document
    documents = store.documents_between(int(document[0]), int(document[-1]), store.info.labels)
    bounds = [0, *(1 + (document[1:] != document[:-1]).nonzero()[0]).tolist(), len(document)]
    segments = list(pairwise(bounds))
    groups = {label: [str(value) for value in documents.column(label).to_pylist()] for label in store.info.labels}
    activations: dict[str, Array] = {}
    scales: dict[str, Array] = {}
    norms: dict[str, Array] = {}
    moments: dict[MomentKey, Moments] = {}
    for site, acts in sites.items():
        try:
            row_norms, per_document = summarise(acts, segments)
        except NotFinite as error:
            raise NotFinite(error.row, error.reason, site) from None
        activations[site] = to_numpy(acts.values)
        if acts.scales is not None:
            scales[site] = acts.scales.numpy()
        norms[site] = row_norms.numpy()
        on_step()
        for (label, value), raw in group_moments(per_document, groups).items():
            moments[MomentKey(site, label, value)] = _as_stored(raw)
        for name, codes in groups_of_rows.labels.items():
            values = store.info.values_of_rows[name]
            for number, raw in value_moments(acts, codes).items():
                moments[MomentKey(site, name, values[number])] = _as_stored(raw)
    return UnitBlock(activations, norms, moments, scales)


def _as_stored(raw: RawMoments) -> Moments:
    return Moments(raw.count, raw.sum.numpy(), raw.sum_squares.numpy())


def read_groups(store: Store, start: int, stop: int) -> RowGroups:
    """Read what tells the subpopulations of rows [start, stop)."""
    labels = label_columns(store.info.values_of_rows)
    return _groups(store.columns(start, stop, ["document", *labels]), labels)


def _groups(columns: Mapping[str, Array], labels: Mapping[str, str]) -> RowGroups:
    return RowGroups(columns["document"], {label: columns[name] for name, label in labels.items()})


def read_contexts(store: Store, start: int, stop: int) -> tuple[list[ContextRows], RowGroups]:
    """Read what is needed to compute rows [start, stop): their contexts, and what tells their subpopulations."""
    labels = label_columns(store.info.values_of_rows)
    columns = store.columns(start, stop, ["position", "context", "document", *labels])
    context = columns["context"]
    tokens = store.context_tokens(int(context[0]), int(context[-1]))
    return contexts_of_rows(columns["position"], context, tokens), _groups(columns, labels)
