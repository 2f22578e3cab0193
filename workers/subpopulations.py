"""How well latents tell the subpopulations of an anchor set from other rows, on held-out ones."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.sdl.files import load_dictionary
from pipeline.sdl.metrics import auroc
from storage.anchors import AnchorSet, read_anchors
from storage.conditions import Conditions
from storage.records import Record
from storage.runs import Run
from storage.store import Store


def score_set(store: Store, run: Run, name: str, codes: Tensor, start: int) -> list[Record]:
    """For every subpopulation of a set the latent with the best AUROC, and the anchored one's if there is one.

    `codes` [rows, latents] are those of the rows from `start` on. Of a cross-layer transcoder, whose layers all have
    anchored latents, it is the first layer's.
    """
    anchors = read_anchors(store, name)
    member = members(store, anchors, start, start + len(codes))
    document = store.columns(start, start + len(codes), ["document"])["document"]
    areas = auroc(codes, torch.from_numpy(member))
    decoders = load_dictionary(str(run.folder)) if run.record()["anchors"] == name else None
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
        if decoders is not None:
            direction = np.concatenate([anchors.vectors[site][i] for site in decoders.config.output])
            decoder = decoders.each_block()[0].W_dec[i]
            cosine = functional.cosine_similarity(decoder, torch.from_numpy(direction), dim=0)
            line["anchored_latent"] = i
            line["anchored_auroc"] = float(column[i]) if known else None
            line["anchor_cosine"] = float(cosine)
        groups.append(line)
    return groups


def members(store: Store, anchors: AnchorSet, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Which of the rows [start, stop) belong to which subpopulation: bool [rows, subpopulations]."""
    member = np.zeros((stop - start, len(anchors.values)), dtype=bool)
    if conditions := anchors.identity.get("where"):
        for i, rows in enumerate(Conditions(store, [text for _, text in conditions]).rows(start, stop)):
            member[rows - start, i] = True
        return member
    document = store.columns(start, stop, ["document"])["document"]
    first, last = int(document[0]), int(document[-1])
    documents = store.documents_between(first, last)
    for i, (label, value) in enumerate(zip(anchors.labels, anchors.values, strict=True)):
        carries = np.array([str(v) == value for v in documents.column(label).to_pylist()])
        member[:, i] = carries[document - first]
    return member
