"""Which latents to show, and the contexts in which they fire most: what a person looks at first."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from storage.format.records import Record
from storage.store import Store
from storage.table.root import label_columns

FREE_LATENTS = 12
"""Latents shown beside those of the subpopulations."""
MIN_FIRINGS = 20
CONTEXTS_SHOWN = 6
TOKENS_BEFORE, TOKENS_AFTER = 24, 12


def telling_latents(groups: Sequence[Record], codes: Tensor) -> dict[int, list[str]]:
    """Choose latents to show: latent -> why. First those of the subpopulations, then the most selective ones.

    Selective: the strongest activation is largest against the latent's mean activation over all rows, among latents
    that fired at least MIN_FIRINGS times.
    """
    chosen: dict[int, list[str]] = {}
    for group in groups:
        name = group["value"] if group["label"] == "where" else f"{group['label']} = {group['value']}"
        if group.get("anchored_latent") is not None:
            chosen.setdefault(group["anchored_latent"], []).append(f"anchored to {name}")
        elif group["best_latent"] is not None:
            chosen.setdefault(group["best_latent"], []).append(f"best AUROC for {name}")
    firings = (codes > 0).sum(0)
    mean = codes.mean(0).clamp(min=1e-9)
    selectivity = torch.where(firings >= MIN_FIRINGS, codes.max(0).values / mean, 0.0)
    shown = 0
    for latent in selectivity.argsort(descending=True).tolist():
        if shown == FREE_LATENTS or selectivity[latent] == 0:
            break
        if latent not in chosen:
            chosen[latent] = ["selective"]
            shown += 1
    return chosen


class TopContexts:
    """The text around the rows [start, stop) on which latents fire."""

    def __init__(self, store: Store, start: int, stop: int):
        self.store = store
        self.start = start
        self.labels = label_columns(store.info.values_of_rows)
        self.columns = store.columns(start, stop, ["position", "context", "document", *self.labels])
        self.tokenizer = Tokenizer.from_buffer(store.corpus_file("tokenizer/tokenizer.json"))

    def of(self, activations: Tensor) -> list[Record]:
        """The contexts with a latent's strongest activations (`activations` [stop - start]), strongest first.

        One entry a context: the tokens around the peak as text, the activation of each, the document's source, labels,
        and those of the peak's row that it has.
        """
        found: list[Record] = []
        seen: set[int] = set()
        for offset in activations.argsort(descending=True).tolist():
            if activations[offset] <= 0 or len(found) == CONTEXTS_SHOWN:
                break
            context = int(self.columns["context"][offset])
            if context in seen:
                continue
            seen.add(context)
            rows = np.flatnonzero(self.columns["context"] == context)
            positions = self.columns["position"][rows]
            peak = int(self.columns["position"][offset])
            tokens = self.store.context_tokens(context, context)[0][: peak + TOKENS_AFTER + 1]
            first = max(self.store.info.skip_first, peak - TOKENS_BEFORE)
            fires = dict(zip(positions.tolist(), activations[rows].tolist(), strict=True))
            document = int(self.columns["document"][offset])
            about = self.store.documents_between(document, document, ("source", *self.store.info.labels)).to_pylist()[0]
            found.append(
                {
                    "row": self.start + offset,
                    "document": document,
                    "source": about["source"],
                    "labels": {label: str(about[label]) for label in self.store.info.labels} | self._labels_of(offset),
                    "tokens": [self._piece(int(token)) for token in tokens[first:]],
                    # positions that are no rows have none, and are shown as text around the others
                    "activations": [round(fires.get(p, 0.0), 4) for p in range(first, len(tokens))],
                }
            )
        return found

    def _labels_of(self, offset: int) -> dict[str, str]:
        """The labels of one row, those that it has."""
        codes = {label: int(self.columns[name][offset]) for name, label in self.labels.items()}
        return {label: self.store.info.values_of_rows[label][code] for label, code in codes.items() if code >= 0}

    def _piece(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))
