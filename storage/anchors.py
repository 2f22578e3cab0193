"""Anchors: named sets of directions, one per subpopulation, kept with the counts they were made from."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.arrays import RowArray
from storage.errors import StorageError, StoreMismatch
from storage.files import create_file
from storage.records import Record, differences, encode, read_record
from storage.store import Store


@dataclass(frozen=True)
class AnchorSet:
    """Anchors of one or several sites. Row i of every array belongs to `values[i]` of `labels[i]`."""

    name: str
    labels: list[str]
    values: list[str]
    counts: list[int]
    """Rows behind each mean."""
    identity: Record
    """What determines the vectors: corpus and harvest digests, labels, units, least rows."""
    vectors: Mapping[str, npt.NDArray[np.float32]]
    """Site -> float32 [k, d_model]: the subpopulation's mean minus the mean of all rows, not normalised."""


def write_anchors(store: Store, anchors: AnchorSet) -> None:
    """Write anchors/<name>: one Zarr array a site, the record last. Raises StoreMismatch if others have the name."""
    folder = store.path / "anchors" / anchors.name
    if (folder / "anchors.json").exists():
        found = read_anchors(store, anchors.name).identity
        if found != anchors.identity:
            raise StoreMismatch(
                f"anchors {anchors.name!r} are in the store, made otherwise: "
                f"{'; '.join(differences(found, anchors.identity))}. Give the new ones another name"
            )
        return
    for parent in (folder.parent, folder):
        create_file(parent / "zarr.json", encode({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    for site, vectors in anchors.vectors.items():
        path = folder / site.replace("/", "--")
        shutil.rmtree(path, ignore_errors=True)  # left by an attempt that did not reach its record
        array = RowArray(path, vectors.shape, "float32", len(vectors), ("anchor", "d_model"), {"site": site})
        array.create()
        array.write(0, vectors)
    record = {name: getattr(anchors, name) for name in ("name", "labels", "values", "counts", "identity")}
    create_file(folder / "anchors.json", encode({**record, "sites": list(anchors.vectors)}))


def read_anchors(store: Store, name: str) -> AnchorSet:
    """Read anchors/<name>. Raises StorageError when there are none."""
    folder = store.path / "anchors" / name
    if not (folder / "anchors.json").exists():
        raise StorageError(
            f"no anchors named {name!r} in {store.path}; it has {', '.join(anchor_names(store)) or 'none'}. "
            "`granary anchors SPEC` makes those of a spec"
        )
    record = read_record(folder / "anchors.json")
    vectors = {}
    for site in record.pop("sites"):
        array = RowArray.open(folder / site.replace("/", "--"))
        vectors[site] = array.read(0, array.shape[0])
    return AnchorSet(**record, vectors=vectors)


def anchor_names(store: Store) -> list[str]:
    """The names under anchors/."""
    return sorted(path.parent.name for path in Path(store.path / "anchors").glob("*/anchors.json"))
