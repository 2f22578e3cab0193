"""What of the store's rows a dictionary is trained, normalised and calibrated on.

Where rows of extreme norm are left out of training they are left out of the normalisation and the calibration too: one
row in a hundred of 30 times the norm is nine tenths of the variance.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from storage.format.arrays import Array
from storage.harvest.moments import MomentKey, Moments
from storage.read.moments import merged_moments, training_units
from storage.read.norm_filter import NormFilter
from storage.store import Store
from workers.tensors import to_torch
from workers.train.plan import TrainPlan, calibration_range

MOMENT_ROWS = 2**18
"""Rows for the moments where some are left out: a mean is known to 0.2 % of a standard deviation."""
READ_ROWS = 8192


def normalisations(
    store: Store, sites: Sequence[str], plan: TrainPlan, kept: NormFilter | None
) -> dict[str, Normalisation]:
    """Return the normalisation of each site: centre on the mean of the training rows and scale to E||x||^2 = d.

    From the harvest's own moments; where a filter leaves rows out, from the first rows of a stream without them."""
    if kept is None or kept.counts.sum() == store.info.held_out_start:
        return {site: normalisation(store, site) for site in sites}  # each reads the moments of every unit
    batches = max(1, min(MOMENT_ROWS, int(kept.counts.sum())) // plan.batch_rows)
    stream = store.stream(
        sites,
        batch_rows=plan.batch_rows,
        seed=plan.seed,
        steps=batches,
        max_norm=plan.max_norm,
        norm_site=plan.norm_site,
    )
    moments: dict[str, Moments] = {}
    for batch in stream:
        for site in sites:
            found = _moments(batch[site])
            moments[site] = moments[site] + found if site in moments else found
    return {site: _of_site(site, found) for site, found in moments.items()}


def _moments(rows: Array) -> Moments:
    x = rows.astype(np.float64)
    return Moments(len(x), x.sum(0), np.square(x).sum(0))


def normalisation(store: Store, site: str) -> Normalisation:
    """That of all training rows, from the harvest's own moments."""
    _, name = store.find(site)
    return _of_site(site, merged_moments(store, site, training_units(store))[MomentKey(name)])


def _of_site(site: str, moments: Moments) -> Normalisation:
    try:
        return Normalisation.of(torch.from_numpy(moments.mean), moments.total_variance)
    except InputError as error:
        raise InputError(f"{site}: {error}") from None


def calibration_rows(store: Store, config: DictionaryConfig, kept: NormFilter | None = None) -> Iterator[torch.Tensor]:
    """Inputs of the rows of `calibration_range`, float32."""
    for first in calibration_range(store)[::READ_ROWS]:
        last = min(first + READ_ROWS, store.num_rows)
        rows: slice | Array = slice(first, last)
        if kept is not None:
            rows = first + np.flatnonzero(kept.kept(first, last))
            if not len(rows):
                continue
        yield side_by_side([to_torch(store.read(site, rows)).float() for site in config.input])


def pair(config: DictionaryConfig, of_site: Callable[[str], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [rows, d_in] and outputs [rows, d_out] from the rows of each site; one tensor where they are the same."""
    x = side_by_side([of_site(site) for site in config.input])
    return x, x if config.is_autoencoder else side_by_side([of_site(site) for site in config.output])


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
