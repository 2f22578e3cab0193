"""Computing one unit: run the contexts that touch it, keep its rows, and summarise them.

The result is a function of the contexts, the model and the settings alone: batches are determined by the contexts, and
every row of the unit is filled exactly once (asserted).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
import torch._inductor.config
from torch import Tensor, nn

from pipeline.capture import capture, decoder_layers, run_base
from pipeline.errors import InputError
from pipeline.models import DTYPES
from pipeline.rows import Batch, ContextRows, batch_size, batches_of
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
    """The rows of a unit at each site, [rows, d_model] in the stored dtype; how many positions were run for them."""

    sites: dict[Site, Tensor]
    positions_run: int
    rows_kept: int


Buffers = dict[Site, Tensor]


class UnitRunner:
    """A model with the sites to take from it. `run` is to be called from one thread."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        dtype: str,
        d_model: int,
        batch_tokens: int,
        context: int,
        device: str,
        compile_layers: bool = False,
    ):
        """`context`: most tokens of a context. `compile_layers`: compile the layers for full batches of contexts of
        this length. Only for those, as each shape costs the compiler half a minute; other shapes run eagerly."""
        self.model = model
        self.sites = list(sites)
        self.dtype = DTYPES[dtype]
        self.d_model = d_model
        self.batch_tokens = batch_tokens
        self.context = context
        self.device = torch.device(device)
        # The taps stay for good: a compiled layer would be compiled anew when they change.
        self._taps = ExitStack()
        self._taken = self._taps.enter_context(capture(model, self.sites))
        self._compiled_shape: tuple[int, int] | None = None
        if compile_layers:
            # Packs the weights once for the CPU's matrix library: a tenth faster, for a second copy of the weights.
            torch._inductor.config.freezing = self.device.type == "cpu"
            self._compiled_shape = (batch_size(batch_tokens, context), context)
            for layer in decoder_layers(model):
                layer.compile(dynamic=False)

    def buffers(self, rows: int) -> Buffers:
        """Memory on the CPU for the activations of a unit of at most `rows` rows."""
        return {site: torch.empty(rows, self.d_model, dtype=self.dtype) for site in self.sites}

    @torch.inference_mode()
    def run(self, contexts: Sequence[ContextRows], num_rows: int, into: Buffers | None = None) -> Activations:
        """Return the activations of a unit's rows, on the CPU, rounded to the stored dtype (nearest, ties to even).

        They lie in `into` (made by `buffers`), if given.
        """
        kept = {site: acts[:num_rows] for site, acts in (into or self.buffers(num_rows)).items()}
        filled = positions = 0
        for batch in batches_of(contexts, self.batch_tokens, self.context):
            tokens = torch.from_numpy(batch.tokens())
            source, target = _row_index(batch)
            self._forward(tokens)
            for site in self.sites:
                acts = self._taken[site].reshape(-1, self.d_model)
                rows = acts.index_select(0, source.to(acts.device)).to(self.dtype)  # layers may be on several devices
                kept[site].index_copy_(0, target, rows.cpu())
            filled += len(target)
            positions += tokens.numel()
        assert filled == num_rows, f"{filled} rows filled of {num_rows}"
        return Activations(kept, positions, num_rows)

    def _forward(self, tokens: Tensor) -> None:
        eager = self._compiled_shape is not None and tuple(tokens.shape) != self._compiled_shape
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            run_base(self.model, tokens.to(self.device))


def _row_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where a batch's rows are: flat positions in [contexts * length], and row numbers within the unit."""
    starts = [(i * batch.length, context) for i, context in enumerate(batch.contexts)]
    source = [torch.arange(start + c.first_position, start + len(c.tokens)) for start, c in starts]
    target = [torch.arange(c.first_row, c.first_row + c.num_rows) for c in batch.contexts]
    return torch.cat(source), torch.cat(target)


@torch.inference_mode()
def summarise(acts: Tensor, segments: Sequence[tuple[int, int]]) -> tuple[Tensor, list[RawMoments]]:
    """Return the L2 norm of each row, float32 [rows], and the moments of each segment [start, stop).

    `acts` is [rows, d_model] as stored; segments follow one another and cover all rows (one per document).
    """
    norms = torch.empty(len(acts))
    moments = []
    for start, stop in segments:
        total = torch.zeros(2, acts.shape[1], dtype=torch.float64)
        for first in range(start, stop, SUMMED_AT_ONCE):
            last = min(first + SUMMED_AT_ONCE, stop)
            values = acts[first:last].float()
            squares = values.square()
            norms[first:last] = squares.sum(1).sqrt()
            total += torch.stack([values.sum(0), squares.sum(0)])
        moments.append(RawMoments(stop - start, total[0], total[1]))
    if not bool(norms.isfinite().all()):
        row = int(norms.isfinite().logical_not().nonzero()[0])
        raise InputError(
            f"row {row} of the unit has an activation that is not a finite {acts.dtype}: the model overflows, or the "
            "stored type is too narrow; compute and store in bfloat16 or float32"
        )
    return norms, moments


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
