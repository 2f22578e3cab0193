"""Checks of what was made from activations: anchors, and the runs that train and measure dictionaries."""

import hashlib
from collections.abc import Iterator
from functools import partial

from storage.backends.place import Place
from storage.errors import StorageError, Unreachable
from storage.format.arrays import RowArray, group_metadata
from storage.format.layout import GROUP, StoreLayout
from storage.read.reader import StoreReader
from storage.results.runs import CHECKPOINT, CURVE, DICTIONARY, EVALUATION, RUN
from storage.verify.findings import ByHand, Check, Checked, Fault, check_record, read_sound, read_whole, reason
from storage.verify.units import check_object


def anchor_checks(store: StoreReader) -> Iterator[Check]:
    """Every set of anchors: its record, and its arrays against it. A set without a record was never finished."""
    layout = StoreLayout(store.root)
    names = layout.all_anchors.names()
    if names:
        yield partial(check_record, layout.all_anchors / GROUP, group_metadata({}), "a group's metadata")
    for name in names:
        if name != GROUP and layout.anchor_record(name).exists():
            yield partial(_check_anchors, layout, name)


def _check_anchors(layout: StoreLayout, name: str) -> Checked:
    folder = layout.anchors(name)
    again = ByHand(f"remove {folder} and run `granary anchors` on the spec that made it")
    faults = list(check_record(folder / GROUP, group_metadata({}), "a group's metadata").faults)
    record = read_sound(layout.anchor_record(name), "the record of the anchors", again)
    if isinstance(record, Fault):
        return Checked((*faults, record))
    for site, written in record["sites"].items():
        place = layout.anchor_array(name, site)
        try:
            array = RowArray.open(place)
            if array.shape[0] != len(record["values"]):
                raise StorageError(f"it has {array.shape[0]} anchors, not {len(record['values'])}")
        except Unreachable:
            raise
        except (StorageError, OSError) as error:
            metadata = place / GROUP
            faults.append(Fault(metadata, "an array's metadata", reason(error, metadata), again))
            continue
        faults += check_object(array, 0, [written["crc32c"]], again).faults
    return Checked(tuple(faults))


def run_checks(store: StoreReader) -> Iterator[Check]:
    """Every run: its records, and the files that they name."""
    layout = StoreLayout(store.root)
    for name in layout.runs.names():
        yield partial(_check_run, layout.run(name))


def _check_run(folder: Place) -> Checked:
    names = set(folder.names())
    again = ByHand(f"restore it from a copy, or remove {folder} and run `granary train` on the spec that made it")
    measured = ByHand(f"remove {folder / EVALUATION} and run `granary evaluate`")
    faults: list[Fault] = []
    records = {}
    for name in sorted({RUN, *names} & {RUN, CURVE, DICTIONARY, EVALUATION}):
        found = read_sound(folder / name, "a record of the run", measured if name == EVALUATION else again)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            records[name] = found
    digests = {name: [sha256] for name, sha256 in records.get(DICTIONARY, {}).get("files", {}).items()}
    if CHECKPOINT in names and CURVE in records:
        digests[CHECKPOINT] = records[CURVE]["checkpoint_sha256"]
    for name, allowed in digests.items():
        remedy = again
        if name == CHECKPOINT:
            remedy = ByHand(f"remove {folder / CHECKPOINT}, and `granary train` begins the run anew")
        expected = f"sha256 {' or '.join(allowed)}"
        content = read_whole(folder / name, expected, remedy)
        if isinstance(content, Fault):
            faults.append(content)
        elif (sha256 := hashlib.sha256(content).hexdigest()) not in allowed:
            faults.append(Fault(folder / name, expected, f"sha256 {sha256}", remedy))
    return Checked(tuple(faults))
