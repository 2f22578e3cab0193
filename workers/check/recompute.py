"""Running units of a store again that are there already: to audit them, and to repair them. No Ray.

What is needed is in the store: a harvest's identity says how its units are computed. The model is found by the name it
had, or by one that the caller gives, and must have the fingerprint of the harvest.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.capture.batches import COMPOSITION
from pipeline.capture.rounding import Rounded
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo, describe_model
from pipeline.model.placement import Placement
from pipeline.sites import layers_up_to, parse_site
from storage.format.arrays import Array
from storage.format.site_rows import SiteRows, unscaled
from storage.harvest.harvest import Harvest
from storage.harvest.identity import Computation
from storage.harvest.log import log_of
from storage.harvest.moments import read_unit_moments, same_moments
from storage.harvest.write_unit import UnitBlock, rewrite_unit
from storage.store import Store
from storage.verify.findings import ByHand, Fault, Remake
from workers.harvest.harvester import Harvester, HarvesterSetup, read_groups, unit_block
from workers.harvest.known_models import is_of_model
from workers.tensors import to_torch
from workers.versions import versions

ModelName = tuple[str, str]
"""A model's id and revision."""
TOLERANCE_ULPS = 16
"""Where the bytes cannot be had, rows may differ by this many roundings of the coarser of the two types, relative to
their norm: other devices and libraries add in other orders, through all layers."""


def find_model(harvest: Harvest, names: Sequence[ModelName]) -> ModelInfo:
    """The harvest's model, among `names` or where it was at the harvest. Raises InputError, with what was tried."""
    _computation(harvest)  # there is nothing to find if no model made it
    wanted = harvest.identity.fingerprint
    recorded = (harvest.made_with.get("model"), harvest.made_with.get("revision", "main"))
    tried = []
    for name, revision in dict.fromkeys([*names, recorded]):
        if name is None:
            continue
        try:
            info = describe_model(name, revision)
        except InputError as error:
            tried.append(str(error))
            continue
        if is_of_model(harvest, info):
            return info
        tried.append(f"{name} has the fingerprint {info.fingerprint}")
    raise InputError(
        f"harvest {harvest.digest} is of the model {harvest.model}, fingerprint {wanted}, which is not here "
        f"({'; '.join(tried) or 'its name is not recorded'}): give --model its folder or name"
    )


def placement_for(harvest: Harvest, given: Placement | None) -> Placement:
    """Where the model of a harvest is to run: on the device that it was made on, or on CPU where there is no GPU.

    `given`: where a spec has it; whole on one device, if there is none. Layers that were compiled cannot be moved.
    """
    how = _computation(harvest)
    on_gpu = how.device != "cpu" and torch.cuda.is_available()
    if given is None or how.compile:
        return Placement(how.device if on_gpu else "cpu")
    if on_gpu:
        return given if given.device != "cpu" else replace(given, device=how.device)
    return replace(given, device="cpu")


def _computation(harvest: Harvest) -> Computation:
    computation = harvest.identity.computation
    if computation is None:
        raise _no_model(harvest)
    return computation


def _dtype(harvest: Harvest) -> str:
    dtype = harvest.identity.dtype
    if dtype is None:
        raise _no_model(harvest)
    return dtype


def _no_model(harvest: Harvest) -> InputError:
    return InputError(
        f"harvest {harvest.digest} does not say how a model computed it: its rows were written through Python, and no "
        "model can compute them again; restore what is damaged from a copy of the store, or write the harvest again "
        "to a new store, as it was written"
    )


class Recomputer:
    """The units of one harvest, computed again. Holds the model: make one after the other."""

    def __init__(self, store: Store, harvest: Harvest, info: ModelInfo, given: Placement | None = None):
        """`given`: see `placement_for`. Raises InputError when the model cannot be loaded."""
        how = _computation(harvest)
        placement = placement_for(harvest, given)
        self.store, self.harvest = store, harvest
        self.on_its_device = placement.input_device == how.device
        setup = HarvesterSetup(
            store=store.url,
            harvest=harvest,
            model=info,
            layers=layers_up_to(map(parse_site, harvest.sites)),
            model_dtype=_dtype(harvest),
            attention=how.attention,
            compile=how.compile and self.on_its_device,
            batch_tokens=how.batch_tokens,
            threads=how.threads_per_worker or os.cpu_count() or 1,
            placement=placement,
            blocks=how.attention_in_blocks,
        )
        try:
            self.harvester = Harvester(setup)
        except InputError as error:
            if given is None and isinstance(error.__context__, RuntimeError):  # torch's error for too little memory
                raise InputError(
                    f"{error}; if one device has no room for it, give `granary verify` the spec in place of the store, "
                    "with harvest.offload or several gpus_per_worker"
                ) from None
            raise

    def repair(self, unit: int, *, instead: bool) -> None:
        """Compute a unit and write it again. Raises InputError, or UnitConflict, before anything is written."""
        if not self.on_its_device:
            raise InputError(
                f"harvest {self.harvest.digest} was computed on a GPU, and other devices round otherwise: repair it "
                "on a machine that has one"
            )
        with self.harvester.computing(unit) as computed:
            writer, figures = self.harvester.writer, computed.figures
            rewrite_unit(
                self.store, self.harvest, unit, computed.block, writer=writer, figures=figures, instead=instead
            )

    def audit(self, unit: int) -> Iterator[Fault | str]:
        """Compute a unit and compare it with what is stored: yield faults, or one line if all is well."""
        differing = self._differing(unit)
        with self.harvester.computing(unit) as computed:
            faults = [*self._compare_rows(unit, computed.block, differing)]
            if not faults:
                faults = [*self._compare_derived(unit, computed.block, differing)]
        yield from faults
        if not faults:
            yield f"within tolerance ({differing})" if differing else "bit-exact"

    def _differing(self, unit: int) -> str:
        """How this machine is known to differ from the one that made a unit; empty if it is not."""
        made_with, here = self.harvest.made_with, versions()
        found = [
            f"{name} {made_with.get(name)} there, {here[name]} here"
            for name in ("torch", "transformers")
            if made_with.get(name) != here[name]
        ]
        batches = _computation(self.harvest).batches
        if batches != COMPOSITION:
            found.append(f"batches {batches} there, {COMPOSITION} here")
        figures = log_of(self.store, self.harvest).read(unit).figures
        device = None if figures is None else figures.device
        if device != self.harvester.device_name:
            found.append(f"{device} there, {self.harvester.device_name} here")
        return "; ".join(found)

    def _compare_rows(self, unit: int, block: UnitBlock, differing: str) -> Iterator[Fault]:
        start, stop = self.store.info.unit_rows(unit)
        computed_in = _dtype(self.harvest)
        for site, layout in self.harvest.sites.items():
            tolerance = TOLERANCE_ULPS * max(_epsilon(computed_in), _epsilon(layout.dtype))
            arrays = self.harvest.arrays(self.store.root, self.store.num_rows, site)
            array = arrays["activations"]
            stored = SiteRows(array, arrays.get("scales")).read(start, stop)
            computed = block.activations[site]
            if "scales" in arrays:
                computed = unscaled(computed, block.scales[site])
            unequal = (_bytes_of(stored) != _bytes_of(computed)).any(1)
            if not unequal.any():
                continue
            error = _relative_errors(stored, computed)
            row = int(np.argmax(error))
            place = array.object_place((start + row) // (array.chunk_rows * array.chunks_per_object))
            found = (
                f"{int(unequal.sum())} of {len(stored)} rows of unit {unit} are others; row {start + row} is off by "
                f"{error[row]:.2g} of its norm"
            )
            expected = f"the rows that the model gives{'' if not differing else f', to {tolerance:.2g}'}"
            if error[row] > tolerance:
                remedy = Remake(self.harvest.digest, unit, from_rows=False, instead_of_commit=True)
                yield Fault(place, expected, found, remedy if not differing else _elsewhere(differing))
            elif not differing:
                yield Fault(place, expected, found, _elsewhere("perhaps another processor"))

    def _compare_derived(self, unit: int, block: UnitBlock, differing: str) -> Iterator[Fault]:
        """Norms and moments against those of the computed rows, where these are the stored ones bit for bit."""
        if differing:
            return
        start, stop = self.store.info.unit_rows(unit)
        remedy = Remake(self.harvest.digest, unit, from_rows=False, instead_of_commit=True)
        for site in self.harvest.sites:
            norms = self.harvest.arrays(self.store.root, self.store.num_rows, site)["norms"]
            if not np.array_equal(norms.read(start, stop), block.norms[site]):
                place = norms.object_place(start // norms.chunk_rows)
                yield Fault(place, "the norms of the rows", "others", remedy)
        stored = read_unit_moments(self.store, self.harvest.digest, unit)
        if not same_moments(stored, block.moments):
            place = log_of(self.store, self.harvest).moments_place(unit)
            yield Fault(place, "the moments of the rows", "others", remedy)


def repair_from_rows(store: Store, harvest: Harvest, unit: int, writer: str) -> None:
    """Make a unit's norms and moments again from its stored rows, which its commit vouches for.

    Raises UnitConflict when they come out otherwise than the commit says, and CorruptChunk; then nothing was written.
    """
    computation = harvest.identity.computation  # None of rows that were written through Python
    if computation is not None and computation.threads_per_worker is not None:
        torch.set_num_threads(computation.threads_per_worker)
    start, stop = store.info.unit_rows(unit)
    rows = {}
    for site in harvest.sites:
        arrays = harvest.arrays(store.root, store.num_rows, site)
        scales = torch.from_numpy(arrays["scales"].read(start, stop)) if "scales" in arrays else None
        rows[site] = Rounded(to_torch(arrays["activations"].read(start, stop)), scales)
    block = unit_block(store, read_groups(store, start, stop), rows)
    rewrite_unit(store, harvest, unit, block, writer=writer, figures=None)


def sample_units(store: Store, harvests: Sequence[Harvest], number: int, seed: int) -> dict[str, list[int]]:
    """`number` committed units (all, if there are fewer), drawn evenly over all harvests: digest -> units."""
    committed = {h.digest: list(log_of(store, h).committed()) for h in harvests}
    everything = [(digest, unit) for digest, units in committed.items() for unit in units]
    chosen = random.Random(seed).sample(everything, min(number, len(everything)))
    return {h.digest: units for h in harvests if (units := sorted(u for digest, u in chosen if digest == h.digest))}


def _relative_errors(stored: Array, computed: Array) -> Array:
    """||stored - computed|| / ||computed|| of each row, float32."""
    a, b = stored.astype(np.float32), computed.astype(np.float32)
    scale = np.maximum(np.linalg.norm(b, axis=1), np.finfo(np.float32).tiny)
    errors: Array = np.linalg.norm(a - b, axis=1) / scale
    return np.where(np.isfinite(errors), errors, np.inf)


def _epsilon(dtype: str) -> float:
    """The relative step of a type; of int8 rows, that of their largest entry."""
    if dtype == "int8":
        return 1 / 127
    return float(torch.finfo(getattr(torch, dtype)).eps)


def _elsewhere(differing: str) -> ByHand:
    return ByHand(f"audit it on a machine like the one that made it ({differing}) before you trust or replace it")


def _bytes_of(values: Array) -> Array:
    return values.reshape(len(values), -1).view(np.uint8)
