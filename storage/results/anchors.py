"""Anchors: named sets of directions, one per subpopulation, kept with the counts they were made from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage.errors import StorageError, StoreMismatch
from storage.format.arrays import RowArray, checksum, write_group
from storage.format.layout import StoreLayout
from storage.format.records import Record, differences, encode, read_record
from storage.read.reader import StoreReader


@dataclass(frozen=True)
class AnchorSet:
    """Anchors of one or several sites. Row i of every array belongs to `values[i]` of `labels[i]`; the label is
    `where`, `top` or `vectors` where no column says who belongs."""

    name: str
    labels: list[str]
    values: list[str]
    counts: list[int]
    """Rows behind each mean; 0 of vectors that were given."""
    identity: Record
    """What determines the vectors: corpus and harvest digests, and the labels, conditions or directions."""
    vectors: Mapping[str, npt.NDArray[np.float32]]
    """Site -> float32 [k, d_model], not normalised: the subpopulation's mean minus that of all rows, or as given."""

    def identity_at(self, sites: Iterable[str]) -> Record:
        """What determines the vectors of some sites: equal however many other sites the set has."""
        return {**self.identity, "harvests": {site: self.identity["harvests"].get(site) for site in sites}}


def write_anchors(store: StoreReader, anchors: AnchorSet) -> None:
    """Write anchors/<name>: one Zarr array a site, the record last. A set of the same kind grows by the new sites.

    Raises StoreMismatch if another kind has the name.
    """
    layout = StoreLayout(store.root)
    record_place = layout.anchor_record(anchors.name)
    known: dict[str, npt.NDArray[np.float32]] = {}
    if record_place.exists():
        found = read_anchors(store, anchors.name)
        check_identity(found, anchors.identity, store)
        known = dict(found.vectors)
        anchors = replace(
            anchors, identity=found.identity | {"harvests": found.identity["harvests"] | anchors.identity["harvests"]}
        )
    for group in (layout.all_anchors, layout.anchors(anchors.name)):
        write_group(group, {})
    for site in anchors.vectors.keys() - known.keys():
        vectors, path = anchors.vectors[site], layout.anchor_array(anchors.name, site)
        path.remove()  # left by an attempt that did not reach its record
        array = RowArray(path, vectors.shape, "float32", len(vectors), ("anchor", "d_model"), {"site": site})
        array.create()
        array.write(0, vectors)
    record = {name: getattr(anchors, name) for name in ("name", "labels", "values", "counts", "identity")}
    vectors_of = {**anchors.vectors, **known}
    record_place.write(
        encode({**record, "sites": {site: {"crc32c": checksum(vectors_of[site])} for site in sorted(vectors_of)}})
    )


def check_identity(found: AnchorSet, identity: Record, store: StoreReader) -> None:
    """Raise StoreMismatch unless anchors of this identity are of the kind of those found, perhaps at other sites."""
    same = found.identity | {"harvests": None} == identity | {"harvests": None}
    if same and all(found.identity["harvests"].get(s, digest) == digest for s, digest in identity["harvests"].items()):
        return
    since = store.info.since(found.identity)
    otherwise = f"of {since}" if since else f"otherwise: {'; '.join(differences(found.identity, identity))}"
    raise StoreMismatch(f"anchors {found.name!r} are in the store, made {otherwise}. Give the new ones another name")


def read_anchors(store: StoreReader, name: str) -> AnchorSet:
    """Read anchors/<name>. Raises StorageError when there are none."""
    layout = StoreLayout(store.root)
    if not layout.anchor_record(name).exists():
        raise StorageError(
            f"no anchors named {name!r} in {store.url}; it has {', '.join(anchor_names(store)) or 'none'}. "
            "`granary anchors SPEC` makes those of a spec"
        )
    record = read_record(layout.anchor_record(name))
    vectors = {}
    for site, written in record.pop("sites").items():
        array = RowArray.open(layout.anchor_array(name, site))
        vectors[site] = array.read(0, array.shape[0])
        if checksum(vectors[site]) != written["crc32c"]:
            raise StorageError(f"the anchors {array.path} are not those of their record {layout.anchor_record(name)}")
    return AnchorSet(**record, vectors=vectors)


def anchor_names(store: StoreReader) -> list[str]:
    """The names under anchors/."""
    layout = StoreLayout(store.root)
    return [name for name in layout.all_anchors.names() if layout.anchor_record(name).exists()]
