"""Putting right what `granary verify` found, where the store or the model says what the bytes must be.

The same objects are written again under the same names; a commit is never removed, so readers and harvests may be at
work meanwhile (docs/decisions/0007). What nothing determines is refused, with advice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.model.placement import Placement
from storage.backends.place import Place
from storage.errors import StorageError, Unreachable
from storage.format.layout import StoreLayout
from storage.harvest.harvest import Harvest, read_harvest, writer_id
from storage.harvest.log import log_of
from storage.store import Store, open_store
from storage.verify.findings import ByHand, Fault, Remake, Remove, Rewrite
from workers.check.recompute import ModelName, Recomputer, find_model, repair_from_rows

OnRepair = Callable[[str], None]
"""Told what was written."""


@dataclass(frozen=True)
class Refused:
    """Faults that stay, and why."""

    faults: tuple[Fault, ...]
    reason: str


def repair(
    root: Place,
    faults: Sequence[Fault],
    models: Sequence[ModelName],
    on_repair: OnRepair,
    placement: Placement | None = None,
) -> Iterator[Refused]:
    """Repair what can be; yield what cannot. Records first: units need their harvest's.

    `placement`: where models run, if a spec says it.
    """
    for fault in faults:
        if isinstance(fault.remedy, ByHand):
            yield Refused((fault,), fault.remedy.advice)
        elif isinstance(fault.remedy, Rewrite):
            fault.place.write(fault.remedy.content)
            on_repair(f"wrote {fault.place}")
        elif isinstance(fault.remedy, Remove):
            fault.place.remove()
            on_repair(f"removed {fault.place}")
    units: dict[tuple[str, int], list[Fault]] = {}
    for fault in faults:
        if isinstance(fault.remedy, Remake):
            units.setdefault((fault.remedy.harvest, fault.remedy.unit), []).append(fault)
    removed = {fault.place for fault in faults if isinstance(fault.remedy, Remove)}
    layout = StoreLayout(root)
    bitmaps = {name for name in layout.harvests.names() if layout.bitmap(name) in removed} if removed else set()
    # no harvests but those to be mended: the record of another may be what was refused above
    if digests := bitmaps | {digest for digest, _ in units}:
        store = open_store(root)
        found = [read_harvest(root, digest) for digest in digests]
        for _, harvest in sorted(found, key=lambda of: (of[0], of[1].digest)):
            log = log_of(store, harvest)
            if harvest.digest in bitmaps:
                log.compact(log.committed())
                on_repair(f"wrote {log.layout.bitmap(harvest.digest)}")
            mine = {unit: of for (digest, unit), of in sorted(units.items()) if digest == harvest.digest}
            yield from _repair_units(store, harvest, mine, models, on_repair, placement)


def _repair_units(
    store: Store,
    harvest: Harvest,
    units: dict[int, list[Fault]],
    models: Sequence[ModelName],
    on_repair: OnRepair,
    placement: Placement | None,
) -> Iterator[Refused]:
    rerunner: Recomputer | None = None
    refusal = ""
    for unit, faults in units.items():
        remedies = [fault.remedy for fault in faults if isinstance(fault.remedy, Remake)]
        if all(remedy.from_rows for remedy in remedies) and _from_rows(store, harvest, unit):
            on_repair(f"wrote unit {unit} of harvest {harvest.digest}, from its rows")
            continue
        if rerunner is None and not refusal:
            try:
                rerunner = Recomputer(store, harvest, find_model(harvest, models), placement)
            except InputError as error:
                refusal = str(error)
        if rerunner is None:
            yield Refused(tuple(faults), refusal)
            continue
        try:
            rerunner.repair(unit, instead=any(remedy.instead_of_commit for remedy in remedies))
            on_repair(f"wrote unit {unit} of harvest {harvest.digest}, with the model")
        except Unreachable:
            raise
        except (InputError, StorageError) as error:
            yield Refused(tuple(faults), str(error))


def _from_rows(store: Store, harvest: Harvest, unit: int) -> bool:
    """Try to make a unit again without the model."""
    try:
        repair_from_rows(store, harvest, unit, writer_id())
    except Unreachable:
        raise
    except StorageError:  # a damaged row, or other libraries: the model will tell
        return False
    return True
