"""The anchor stage: subpopulation means out of the moments that the harvest stored. Reads no activations."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import InputError
from storage.anchors import AnchorSet, write_anchors
from storage.moments import MomentKey, merged_moments, training_units
from storage.records import Record
from storage.store import Store
from workers.settings import AnchorSettings


def anchors_identity(store: Store, settings: AnchorSettings, sites: Sequence[str]) -> Record:
    """What determines the vectors. Raises InputError for a label the store does not have."""
    unknown = [label for label in settings.by if label not in store.info.labels]
    if unknown:
        raise InputError(
            f"anchors.by: the store has no label {', '.join(unknown)}; it has {', '.join(store.info.labels) or 'none'} "
            "(labels are named in corpus.labels when the store is made)"
        )
    return {
        "corpus_digest": store.info.corpus_digest,
        "harvests": {site: store.find(site)[0].digest for site in sites},
        "by": list(settings.by),
        "min_rows": settings.min_rows,
    }


def make_anchors(store: Store, settings: AnchorSettings, sites: Sequence[str]) -> AnchorSet:
    """Compute and write anchors over the training rows of `sites`: mean of the subpopulation minus mean of all rows.

    Values with fewer than `min_rows` rows, and a value that all rows have, give no anchor. Raises InputError when
    none is left, UncommittedRows when a training unit is not harvested.
    """
    identity = anchors_identity(store, settings, sites)
    chosen: list[MomentKey] = []
    counts: list[int] = []
    vectors = {}
    for number, site in enumerate(sites):
        _, name = store.find(site)
        moments = merged_moments(store, site, training_units(store))
        everything = moments[MomentKey(name)]
        if number == 0:
            for label in settings.by:
                keys = sorted((k for k in moments if k.label == label), key=lambda k: k.value or "")
                chosen += [k for k in keys if settings.min_rows <= moments[k].count < everything.count]
            if not chosen:
                raise InputError(
                    f"anchors.by: no value of {', '.join(settings.by)} has at least {settings.min_rows} training rows "
                    "and is not the value of all rows; lower anchors.min_rows or choose another label"
                )
            counts = [moments[k].count for k in chosen]
        means = [moments[MomentKey(name, k.label, k.value)].mean for k in chosen]
        vectors[site] = (np.stack(means) - everything.mean).astype(np.float32)
    anchors = AnchorSet(
        name=settings.name,
        labels=[k.label or "" for k in chosen],
        values=[k.value or "" for k in chosen],
        counts=counts,
        identity=identity,
        vectors=vectors,
    )
    write_anchors(store, anchors)
    return anchors
