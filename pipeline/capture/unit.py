"""Computing one unit: run the contexts that touch it, keep its rows, and summarise them.

The result is a function of the contexts, the model and the settings alone: batches are determined by the contexts, and
every row of the unit is filled exactly once (checked).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo.config
from torch import Tensor, nn

from pipeline.capture.attention import attend_in_blocks
from pipeline.capture.batches import Batch, batches_of, full_shapes
from pipeline.capture.contexts import ContextRows
from pipeline.capture.rounding import TORCH_TYPES, Rounded, is_exact, round_rows, square_error
from pipeline.capture.taps import capture, model_inputs, overwritten_sites, run_base
from pipeline.capture.transfer import ForwardClock, RowCopies, upload
from pipeline.model.finite import NotFinite
from pipeline.model.layers import decoder_layers
from pipeline.precision import faster_type
from pipeline.sites import Site

SUMMED_AT_ONCE = 1024
"""Rows added in float32 (torch adds pairwise: error about 1e-7) before the float64 sum takes over."""


@dataclass(frozen=True)
class RawMoments:
    """Count, sum and sum of squares of some rows; float64 [d_model]."""

    count: int
    sum: Tensor
    sum_squares: Tensor


@dataclass(frozen=True)
class Activations:
    """The rows of a unit at each site as they are stored, and what was run for them."""

    sites: dict[Site, Rounded]
    square_errors: dict[Site, float]
    """The sum over the rows of ||x - stored(x)||^2, with x as the model computed it."""
    positions_run: int
    """Positions of the forward passes."""
    padding: int
    """Those of them that belong to no context."""
    idle_share: float | None
    """Share of the time that a GPU spent outside forward passes since it ended the unit before; None on CPU."""


Buffers = dict[Site, Rounded]


class UnitRunner:
    """A model with the sites to take from it. `run` is to be called from one thread."""

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[Site, str],
        *,
        d_model: int,
        batch_tokens: int,
        context: int,
        device: str,
        compile_layers: bool = False,
        blocks: bool | None = None,
    ):
        """`sites`: the sites to take, with what each is stored as. `context`: most tokens of a context.
        `compile_layers`: compile the layers for full batches. Only for those, as each shape costs the compiler some
        seconds for each layer with sites; what is left at the end of a unit runs eagerly. `blocks`: let compiled
        bfloat16 layers attend in blocks (`pipeline.capture.attention`); where that is faster, if not given."""
        self.model = model
        self.sites = dict(sites)
        self.d_model = d_model
        self.batch_tokens = batch_tokens
        self.context = context
        self.device = torch.device(device)
        # The taps stay for good: a compiled layer would be compiled anew when they change.
        self._taps = ExitStack()
        with torch.compiler.set_stance("force_eager"):  # an earlier runner may have compiled the layers
            copied = overwritten_sites(model, list(self.sites), self.device)
        self._taken = self._taps.enter_context(capture(model, list(self.sites), copied))
        self._copies = RowCopies()
        self._clock = ForwardClock(self.device)
        self._compiled_shapes: set[tuple[int, int]] | None = None
        if compile_layers:
            if self.device.type == "cpu" and (faster_type() == "bfloat16" if blocks is None else blocks):
                attend_in_blocks(model)
            full = full_shapes(batch_tokens, context)
            # Flash attention gets several contexts in a line as one line (see model_inputs).
            self._compiled_shapes = full | {(1, lines * length) for lines, length in full}
            layers = decoder_layers(model)
            # The compiler keeps what it made on disk under a key that does not name the processor: code for a larger
            # one (a disk that machines share, ATEN_CPU_CAPABILITY) would crash, or give nonsense.
            torch.compiler.config.cache_key_tag = f"{torch.backends.cpu.get_cpu_capability()} {faster_type()}"
            # Layers with other taps are other code to the compiler, which by default gives up, and runs the rest
            # eagerly, after eight. So are other shapes, and a mask beside none.
            variants = 2 * len(self._compiled_shapes) * (1 + len({site.layer for site in self.sites}))
            # Added, as the layers of other runners in this process count too.
            torch._dynamo.config.recompile_limit += variants
            torch._dynamo.config.accumulated_recompile_limit += variants
            for layer in layers:
                layer.compile(dynamic=False)

    def buffers(self, rows: int) -> Buffers:
        """Memory on the CPU for the activations of a unit of at most `rows` rows; pinned for a GPU's copies."""
        pinned = self.device.type == "cuda"
        return {
            site: Rounded(
                torch.empty(rows, self.d_model, dtype=TORCH_TYPES[stored], pin_memory=pinned),
                torch.empty(rows, pin_memory=pinned) if stored == "int8" else None,
            )
            for site, stored in self.sites.items()
        }

    @torch.inference_mode()
    def run(self, contexts: Sequence[ContextRows], num_rows: int, into: Buffers | None = None) -> Activations:
        """Return the activations of a unit's rows, on the CPU, rounded to what is stored (`capture.rounding`).

        They lie in `into` (made by `buffers`), if given.
        """
        kept = {site: acts[:num_rows] for site, acts in (into or self.buffers(num_rows)).items()}
        errors: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        filled = np.zeros(num_rows, dtype=np.int64)
        positions = padding = 0
        for batch in batches_of(contexts, self.batch_tokens, self.context):
            source, parts = _rows_of(batch)
            with self._clock.forward():
                self._forward(model_inputs(self.model, batch, self.device))
            for site, stored in self.sites.items():
                acts = self._taken[site].reshape(-1, self.d_model)
                # Gathered where they are (layers may be on several devices), into memory that no later batch reuses.
                rows = acts.index_select(0, upload(source, acts.device))
                rounded = round_rows(rows, stored)
                if not is_exact(rows.dtype, stored):
                    errors[site].append(square_error(rows, rounded))
                targets = [kept[site][part].tensors for part in parts]
                for tensor, its_targets in zip(rounded.tensors, zip(*targets, strict=True), strict=True):
                    self._copies.put(tensor, its_targets)
            self._copies.end_batch()
            for part in parts:
                filled[part] += 1
            positions += batch.positions
            padding += batch.padding
        self._copies.finish()
        if not (filled == 1).all():  # the buffers have the rows of another unit
            row = int((filled != 1).argmax())
            raise RuntimeError(f"row {row} of the unit was filled {filled[row]} times; this is an error in Granary")
        square_errors = {site: sum(error.item() for error in parts) for site, parts in errors.items()}
        return Activations(kept, square_errors, positions, padding, self._clock.idle_share())

    def _forward(self, inputs: Mapping[str, Tensor]) -> None:
        shape = tuple(inputs["input_ids"].shape)
        eager = self._compiled_shapes is not None and shape not in self._compiled_shapes
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            run_base(self.model, inputs)


def _rows_of(batch: Batch) -> tuple[Tensor, list[slice]]:
    """Where a batch's rows are: flat positions in [lines * length], and for each context its rows of the unit."""
    places = list(batch.places())
    source = np.concatenate([place + context.positions for place, context in places])
    return torch.from_numpy(source), [slice(c.first_row, c.first_row + c.num_rows) for _, c in places]


@torch.inference_mode()
def summarise(acts: Rounded, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, list[RawMoments]]:
    """Return the L2 norm of each row, float32 [rows], and the moments of each segment [start, stop).

    `acts` is [rows, d_model], taken as a reader gets it; segments follow one another and cover all rows (one per
    document). Raises NotFinite for rows that are not.
    """
    norms = torch.empty(len(acts))
    moments = []
    for start, stop in segments:
        total = _no_sums(acts)
        for first in range(start, stop, SUMMED_AT_ONCE):
            last = min(first + SUMMED_AT_ONCE, stop)
            values = acts[first:last].float()
            squares = values.square()
            norms[first:last] = squares.sum(1).sqrt()
            total += torch.stack([values.sum(0), squares.sum(0)])
        moments.append(RawMoments(stop - start, total[0], total[1]))
    if not bool(norms.isfinite().all()):
        row = int(norms.isfinite().logical_not().nonzero()[0])
        raise NotFinite(
            row,
            f"has an activation that is not a finite {acts.type}: the model overflows, or the stored type is too "
            "narrow; compute and store in bfloat16 or float32",
        )
    return norms, moments


@torch.inference_mode()
def value_moments(acts: Rounded, codes: npt.NDArray[np.signedinteger[Any]]) -> dict[int, RawMoments]:
    """The moments of the rows of each value of a label of rows. `codes` [rows] has the number of each row's value, -1
    where it has none. Added value by value in the order of rows, so that the sums have one value."""
    order = np.argsort(codes, kind="stable")
    order = order[codes[order] >= 0]
    totals: dict[int, Tensor] = {}
    for first in range(0, len(order), SUMMED_AT_ONCE):  # rows of several values, where they have few
        rows = order[first : first + SUMMED_AT_ONCE]
        wide = acts[torch.from_numpy(rows)].float()
        squares = wide.square()
        values, starts = np.unique(codes[rows], return_index=True)
        for value, start, stop in zip(values.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            if value not in totals:
                totals[value] = _no_sums(acts)
            totals[value][0] += wide[start:stop].sum(0)
            totals[value][1] += squares[start:stop].sum(0)
    counts = np.bincount(codes[order])
    return {value: RawMoments(int(counts[value]), total[0], total[1]) for value, total in totals.items()}


def _no_sums(acts: Rounded) -> Tensor:
    """A sum and a sum of squares to add to, float64 [2, d_model]."""
    return torch.zeros(2, acts.values.shape[1], dtype=torch.float64)


def group_moments(
    segments: Sequence[RawMoments], groups: Mapping[str, Sequence[str]]
) -> dict[tuple[str | None, str | None], RawMoments]:
    """Add up segment moments: all of them under (None, None), and per label value under (label, value).

    `groups` gives, for each label, the value of every segment. Added in order, so that the sums have one value.
    """
    added: dict[tuple[str | None, str | None], RawMoments] = {}
    for number, segment in enumerate(segments):
        for key in [(None, None), *((label, values[number]) for label, values in groups.items())]:
            if key in added:
                before = added[key]
                added[key] = RawMoments(
                    before.count + segment.count,
                    before.sum + segment.sum,
                    before.sum_squares + segment.sum_squares,
                )
            else:
                added[key] = segment
    return added
