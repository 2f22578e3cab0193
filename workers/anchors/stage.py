"""The anchor stage: sets of anchors out of labels, conditions, directions or files.

Means by label are in the moments that the harvest stored, and read no activations. Those of conditions and of top rows
are taken over the chosen rows (`workers.anchors.means`), at every site over the same ones, minus the harvest's own mean
of all training rows; in float64, rounded once. All that can be refused without reading rows `plan_anchors` refuses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from storage.errors import StorageError
from storage.format.records import Record
from storage.harvest.moments import MomentKey
from storage.read.moments import merged_moments, training_units
from storage.results.anchors import AnchorSet, read_anchors, write_anchors
from storage.sql.conditions import Conditions
from storage.store import Store
from workers.anchors.means import MOST_CALLS, ByCondition, ByNumber, TrainingRows, sums_of
from workers.anchors.top_rows import Column, strongest
from workers.anchors.vector_files import ANY_SITE, Vectors, digest_of, read_vectors
from workers.cluster.tasks import Here, OnRay, Tasks
from workers.settings.anchors import FILE_ENDINGS, AnchorSettings, TopSettings

SMALL_BYTES = 2**30
"""Activations below this are read in the process itself: no Ray has to be started."""


@dataclass(frozen=True)
class AnchorPlan:
    """A set resolved against the store and the files that it names."""

    settings: AnchorSettings
    sites: tuple[str, ...]
    """The sites it is made for."""
    identity: Record
    """What determines the vectors."""
    given: Mapping[str, Vectors] = field(default_factory=dict)
    """With top and vectors: site -> the given directions."""
    names: tuple[str, ...] = ()
    """With top and vectors: what each direction is called."""


def plan_anchors(store: Store, settings: AnchorSettings, sites: Sequence[str]) -> AnchorPlan:
    """Resolve a set. Raises InputError, naming the set, for what the store or a file does not have. Writes nothing."""
    base = {
        "corpus_digest": store.info.corpus_digest,
        "harvests": {site: store.find(site)[0].digest for site in sites},
    }
    counted = {"min_rows": settings.least_rows}
    if settings.source == "by":
        unknown = [label for label in settings.by if label not in store.info.all_labels]
        if unknown:
            known = ", ".join(store.info.all_labels) or "none"
            raise InputError(
                f"anchors.by: the store has no label {', '.join(unknown)}; it has {known} (labels are named in "
                "corpus.labels when the store is made)"
            )
        return AnchorPlan(settings, tuple(sites), {**base, "by": list(settings.by), **counted})
    if settings.source == "where":
        for name, condition in settings.where.items():
            try:
                Conditions(store, [condition])
            except StorageError as error:
                raise InputError(f"anchors {settings.name!r}: where.{name}: {error}") from None
        conditions = [list(item) for item in settings.where.items()]  # a list: their order is that of the anchors
        return AnchorPlan(settings, tuple(sites), {**base, "where": conditions, **counted})
    if settings.top is not None:
        return _plan_top(store, settings, settings.top, sites, base)
    return _plan_vectors(store, settings, sites, base)


def _plan_top(
    store: Store, settings: AnchorSettings, top: TopSettings, sites: Sequence[str], base: Record
) -> AnchorPlan:
    names: tuple[str, ...] = ()
    try:
        harvest, _ = store.find(top.site)
        if top.directions.endswith(FILE_ENDINGS):
            found = read_vectors(top.directions)
        else:
            stored = read_anchors(store, top.directions)
            found, names = {s: v.astype(np.float64) for s, v in stored.vectors.items()}, tuple(stored.values)
    except (InputError, StorageError) as error:
        raise InputError(f"anchors {settings.name!r}: top: {error}") from None
    if ANY_SITE not in found and top.site not in found:
        raise InputError(
            f"anchors {settings.name!r}: {top.directions} has no directions for top.site {top.site}; it has "
            f"{', '.join(sorted(found))}"
        )
    directions = found.get(top.site, found.get(ANY_SITE))
    assert directions is not None
    _check_width(store, settings, top.site, directions, top.directions)
    if top.contexts is None and top.count > store.info.held_out_start:
        raise InputError(
            f"anchors {settings.name!r}: top.rows asks for {top.count:,} rows and the store has "
            f"{store.info.held_out_start:,} to train on: ask for fewer"
        )
    given = {top.site: directions}
    kind = "rows" if top.contexts is None else "contexts"
    what = {"site": top.site, "harvest": harvest.digest, kind: top.count, "directions": digest_of(given)}
    return AnchorPlan(settings, tuple(sites), {**base, "top": what}, given, _called(names, len(directions)))


def _plan_vectors(store: Store, settings: AnchorSettings, sites: Sequence[str], base: Record) -> AnchorPlan:
    assert settings.vectors is not None
    file = settings.vectors
    try:
        found = read_vectors(file)
    except InputError as error:
        raise InputError(f"anchors {settings.name!r}: {error}") from None
    if unknown := sorted(found.keys() - {*sites, ANY_SITE}):
        raise InputError(
            f"anchors {settings.name!r}: {file} has tensors for {', '.join(unknown)}, which are none of the harvest's "
            f"sites ({', '.join(sites)})"
        )
    given = {site: found[key] for site in sites if (key := ANY_SITE if ANY_SITE in found else site) in found}
    for site, vectors in given.items():
        _check_width(store, settings, site, vectors, file)
    numbers = {site: len(vectors) for site, vectors in given.items()}
    if len(set(numbers.values())) > 1:
        raise InputError(f"anchors {settings.name!r}: {file} must have as many vectors for every site, not {numbers}")
    count = next(iter(numbers.values()))
    if settings.names and len(settings.names) != count:
        raise InputError(f"anchors {settings.name!r}: {len(settings.names)} names for the {count} vectors of {file}")
    names = _called(settings.names, count)
    identity = {  # no corpus_digest: they stay what they are when the store grows
        "harvests": {site: base["harvests"][site] for site in given},
        "vectors": {"sha256": digest_of(found), "names": list(names)},
    }
    return AnchorPlan(settings, tuple(given), identity, given, names)


def _called(names: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(names) or tuple(map(str, range(count)))


def _check_width(store: Store, settings: AnchorSettings, site: str, vectors: Vectors, source: str) -> None:
    width = store.array(site).shape[1]
    if vectors.shape[1] != width:
        raise InputError(
            f"anchors {settings.name!r}: the vectors of {source} are {vectors.shape[1]} wide and {site} is {width}"
        )


def tasks_for(store: Store, plan: AnchorPlan, connect: Callable[[], None] | None) -> Tasks:
    """Where to read rows: here what is small, or where Ray cannot be had; else on Ray, which `connect` brings up."""
    sites = [*plan.sites, *plan.given] if plan.settings.top else plan.sites if plan.settings.where else []
    num_bytes = sum(store.info.held_out_start * store.array(site).row_bytes for site in sites)
    if connect is None or num_bytes < SMALL_BYTES:
        return Here()
    connect()
    return OnRay("making anchors")


def make_anchors(
    store: Store,
    settings: AnchorSettings | AnchorPlan,
    sites: Sequence[str] = (),
    tasks: Tasks | None = None,
    most_calls: int = MOST_CALLS,
) -> AnchorSet:
    """Compute and write anchors over the training rows of `sites`, or as planned. The bytes do not depend on `tasks`
    and `most_calls`.

    Raises InputError when there is none or a subpopulation has too few rows, UncommittedRows when a training unit is
    not harvested, StoreMismatch if another set has the name. Then nothing is written.
    """
    plan = settings if isinstance(settings, AnchorPlan) else plan_anchors(store, settings, sites)
    source = plan.settings.source
    if source == "by":
        anchors = _by_labels(store, plan)
    elif source == "vectors":
        vectors = {site: given.astype(np.float32) for site, given in plan.given.items()}
        anchors = _anchor_set(plan, plan.names, [0] * len(plan.names), vectors)
    else:
        anchors = _by_rows(store, plan, tasks or Here(), most_calls)
    write_anchors(store, anchors)
    return anchors


def _anchor_set(
    plan: AnchorPlan, names: Sequence[str], counts: Sequence[int], vectors: Mapping[str, npt.NDArray[np.float32]]
) -> AnchorSet:
    source = plan.settings.source
    return AnchorSet(plan.settings.name, [source] * len(names), list(names), list(counts), plan.identity, vectors)


def _by_labels(store: Store, plan: AnchorPlan) -> AnchorSet:
    """Values with fewer than `min_rows` rows, and a value that all rows have, give no anchor."""
    settings = plan.settings
    chosen: list[MomentKey] = []
    counts: list[int] = []
    vectors = {}
    for number, site in enumerate(plan.sites):
        _, name = store.find(site)
        moments = merged_moments(store, site, training_units(store))
        everything = moments[MomentKey(name)]
        if number == 0:
            for label in settings.by:
                keys = sorted((k for k in moments if k.label == label), key=lambda k: k.value or "")
                chosen += [k for k in keys if settings.least_rows <= moments[k].count < everything.count]
            if not chosen:
                raise InputError(
                    f"anchors.by: no value of {', '.join(settings.by)} has at least {settings.least_rows} training "
                    "rows and is not the value of all rows; lower anchors.min_rows or choose another label"
                )
            counts = [moments[k].count for k in chosen]
        means = [moments[MomentKey(name, k.label, k.value)].mean for k in chosen]
        vectors[site] = (np.stack(means) - everything.mean).astype(np.float32)
    return AnchorSet(
        name=settings.name,
        labels=[k.label or "" for k in chosen],
        values=[k.value or "" for k in chosen],
        counts=counts,
        identity=plan.identity,
        vectors=vectors,
    )


def _by_rows(store: Store, plan: AnchorPlan, tasks: Tasks, most_calls: int) -> AnchorSet:
    """Conditions and top rows: choose rows, then take their means at every site."""
    everything = {}
    for site in plan.sites:  # first, as it raises for a unit that is not harvested
        everything[site] = merged_moments(store, site, training_units(store))[MomentKey(store.find(site)[1])]
    rows, top = TrainingRows.of(store), plan.settings.top
    if top is None:
        names: Sequence[str] = tuple(plan.settings.where)
        choice: ByCondition | ByNumber = ByCondition(tuple(plan.settings.where.values()))
    else:
        names = plan.names
        store.require_committed(top.site, training_units(store))
        column: Column = "row" if top.contexts is None else "context"
        numbers = strongest(rows, top.site, plan.given[top.site], column, top.count, tasks, most_calls)
        if len(numbers[0]) < top.count:
            raise InputError(
                f"anchors {plan.settings.name!r}: top.{column}s asks for {top.count:,} {column}s and the store has "
                f"{len(numbers[0]):,} to train on: ask for fewer"
            )
        choice = ByNumber(column, tuple(numbers))
    sums = sums_of(rows, plan.sites, choice, tasks, most_calls)
    counts = [sums[key].count if (key := (plan.sites[0], i)) in sums else 0 for i in range(len(names))]
    if top is None:
        _check_counts(plan.settings, dict(zip(names, counts, strict=True)), rows.num_rows)
    vectors = {
        site: np.stack([sums[site, i].mean - everything[site].mean for i in range(len(names))]).astype(np.float32)
        for site in plan.sites
    }
    return _anchor_set(plan, names, counts, vectors)


def _check_counts(settings: AnchorSettings, counts: Mapping[str, int], num_rows: int) -> None:
    """Raise InputError, with every subpopulation that is empty, too small, or all rows."""
    wrong = [f"{name} has {count:,}" for name, count in counts.items() if not settings.least_rows <= count < num_rows]
    if wrong:
        raise InputError(
            f"anchors {settings.name!r}: where: of {num_rows:,} training rows {', '.join(wrong)}; a subpopulation has "
            f"at least {settings.least_rows:,} (min_rows) and not all of them: change the condition, or lower min_rows"
        )
