"""How well latents tell the subpopulations of an anchor set from other rows, on held-out ones."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.measure.metrics import auroc
from storage.format.arrays import Array
from storage.format.records import Record
from storage.results.anchors import AnchorSet, read_anchors
from storage.sql.conditions import Conditions
from storage.store import Store
from storage.table.root import label_columns


def score_set(store: Store, name: str, codes: Tensor, start: int, anchored: Dictionary | None) -> list[Record]:
    """For every subpopulation of a set the latent with the best AUROC, and the anchored one's if there is one.

    `codes` [rows, latents] are those of the rows from `start` on; `anchored` is the dictionary, if it is anchored to
    this set. Of a cross-layer transcoder, whose layers all have anchored latents, it is the first layer's.
    """
    anchors = read_anchors(store, name)
    document = store.columns(start, start + len(codes), ["document"])["document"]
    member = members(store, anchors, start, document)
    areas = auroc(codes, torch.from_numpy(member))
    groups = []
    for i, (label, value) in enumerate(zip(anchors.labels, anchors.values, strict=True)):
        column = areas[:, i]
        known = not bool(torch.isnan(column).any())
        line: Record = {
            "anchors": name,
            "label": label,
            "value": value,
            "rows": int(member[:, i].sum()),
            "documents": len(np.unique(document[member[:, i]])),  # rows of one document say much the same
            "best_latent": int(column.argmax()) if known else None,
            "best_auroc": float(column.max()) if known else None,
        }
        if anchored is not None:
            line["anchored_latent"] = i
            line["anchored_auroc"] = float(column[i]) if known else None
            if anchors.vectors.keys() >= set(anchored.config.output):  # not so where the encoder alone is anchored
                direction = np.concatenate([anchors.vectors[site][i] for site in anchored.config.output])
                decoder = anchored.each_block()[0].W_dec[i].cpu()
                cosine = functional.cosine_similarity(decoder, torch.from_numpy(direction), dim=0)
                line["anchor_cosine"] = float(cosine)
        groups.append(line)
    return groups


def members(store: Store, anchors: AnchorSet, start: int, document: Array) -> npt.NDArray[np.bool_]:
    """Which of the rows from `start` on, of these documents, belong to which: bool [rows, subpopulations]."""
    member = np.zeros((len(document), len(anchors.values)), dtype=bool)
    if conditions := anchors.identity.get("where"):
        for i, rows in enumerate(
            Conditions(store, [text for _, text in conditions]).rows(start, start + len(document))
        ):
            member[rows - start, i] = True
        return member
    carried = {label: _values(store, label, start, document) for label in set(anchors.labels)}
    for i, (label, value) in enumerate(zip(anchors.labels, anchors.values, strict=True)):
        member[:, i] = carried[label] == value
    return member


def _values(store: Store, label: str, start: int, document: Array) -> npt.NDArray[np.object_]:
    """The value of a label that each of these rows has, as text; None where it has none."""
    for name, of_rows in label_columns(store.info.values_of_rows).items():
        if of_rows == label:
            values = np.array([*store.info.values_of_rows[label], None], dtype=object)
            codes = store.columns(start, start + len(document), [name])[name]
            return values.take(codes, mode="wrap")  # -1, no value, is the last
    first, last = int(document[0]), int(document[-1])
    documents = store.documents_between(first, last, [label])
    of_documents = np.array([str(v) for v in documents.column(label).to_pylist()], dtype=object)
    return of_documents.take(document - first)
