"""Measuring before a harvest: how fast this machine runs the model, and what storing would cost in precision.

The same code as in a harvest, on some contexts of the corpus; nothing is written.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.capture.compilers import check_compiler
from pipeline.capture.contexts import ContextRows
from pipeline.capture.rounding import round_rows, square_error
from pipeline.capture.unit import UnitRunner
from pipeline.corpus.documents import Documents
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo
from pipeline.model.load import load_base_model
from pipeline.sites import STORED_TYPES, Site, layers_up_to, parse_site
from workers.settings.experiment import HarvestSettings, ModelSettings

SAMPLE_ROWS = 8192
"""Rows that are run: several batches, so that their shapes are those of a harvest."""


@dataclass(frozen=True)
class Measured:
    rows: int
    """Rows of the sample."""
    rows_per_second: float
    """The rate of one worker on this machine, once its model is loaded."""
    relative_errors: dict[str, dict[str, float]]
    """Site -> type -> E||x - stored(x)||^2 / E||x||^2."""


def sample(documents: Documents, max_rows: int = SAMPLE_ROWS) -> list[ContextRows]:
    """Return the first contexts, of at most `max_rows` rows together; at least one."""
    contexts: list[ContextRows] = []
    rows = start = 0
    for length in documents.context_lengths.tolist():
        positions = np.flatnonzero(documents.is_row[start : start + length])
        if contexts and rows + len(positions) > max_rows:
            break
        contexts.append(ContextRows(documents.tokens[start : start + length], positions.astype(np.int64), rows))
        rows += len(positions)
        start += length
    return contexts


def measure(
    info: ModelInfo,
    model: ModelSettings,
    settings: HarvestSettings,
    contexts: Sequence[ContextRows],
    context: int,
    *,
    compile_layers: bool,
    seconds: float,
) -> Measured:
    """Load the model, run the contexts once to warm up, then again and again for some seconds.

    `context`: most tokens of a context. Raises InputError where this machine lacks the GPUs that workers need.
    """
    if settings.gpus_per_worker > torch.cuda.device_count():
        raise InputError(
            f"--measure runs the model here, and the spec asks for {settings.gpus_per_worker} GPU(s) a worker where "
            f"this machine has {torch.cuda.device_count()}: measure on a machine like the workers', or give "
            "--rows-per-second"
        )
    if compile_layers:
        check_compiler(settings.placement.device)
    torch.set_num_threads(settings.threads_per_worker)
    places = {Site(site.layer, site.kind): model.dtype for site in settings.parsed_sites()}
    loaded = load_base_model(
        info,
        layers=layers_up_to(places),
        dtype=model.dtype,
        attention=settings.attention,
        placement=settings.placement,
    )
    runner = UnitRunner(
        loaded,
        places,
        d_model=info.d_model,
        batch_tokens=settings.batch_tokens,
        context=context,
        device=settings.placement.input_device,
        compile_layers=compile_layers,
    )
    rows = sum(c.num_rows for c in contexts)
    computed = runner.run(contexts, rows)
    started, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - started < seconds:
        runner.run(contexts, rows, into=computed.sites)
        runs += 1
    rate = runs * rows / (time.perf_counter() - started)
    errors = {
        name: _errors(computed.sites[Site(site.layer, site.kind)].values)
        for name, site in ((name, parse_site(name)) for name in settings.sites)
    }
    return Measured(rows, rate, errors)


def _errors(exact: torch.Tensor) -> dict[str, float]:
    total = exact.double().square().sum().item() or 1.0  # rows of zeros have no error
    return {stored: square_error(exact, round_rows(exact, stored)).item() / total for stored in STORED_TYPES}
