"""Datasets by name, streamed from the Hugging Face hub (or any place that `datasets.load_dataset` takes).

A stream has no size and no pieces: its records are taken in its own order until they give enough rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pipeline.corpora.files import CorpusFile, reading
from pipeline.corpora.records import Chunk, Columns, parted_labels
from pipeline.errors import InputError

RECORDS_AT_ONCE = 256


@dataclass(frozen=True)
class NamedDataset:
    path: str
    subset: str | None
    split: str
    columns: Columns

    @property
    def identity(self) -> dict[str, Any]:
        """What is streamed: its name. What the hub has under a name may change."""
        return {"dataset": self.path, "subset": self.subset, "split": self.split}

    @property
    def summary(self) -> str:
        return f"the dataset {self.path}, split {self.split}"

    @property
    def file(self) -> CorpusFile:
        """As records name the file they are from."""
        return CorpusFile(self.path.rstrip("/").rpartition("/")[2], 0)

    def chunks(self) -> Iterator[Chunk]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                "corpus.format: datasets needs the package `datasets`: pip install 'granary-activations[datasets]'"
            ) from None
        with reading(f"the dataset {self.path}"):
            try:
                stream = iter(load_dataset(self.path, self.subset, split=self.split, streaming=True))
            except (ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"corpus.path: the dataset {self.path} cannot be streamed: {reason}") from None
            first = 0
            while records := list(islice(stream, RECORDS_AT_ONCE)):
                self.columns.check_present(sorted(records[0]), f"the dataset {self.path}")
                numbers = np.arange(first, first + len(records))
                found = {name: [record.get(name) for record in records] for name in self.columns.labels}
                labels, aligned = parted_labels(self.columns, found, numbers, self.file)
                contents = [r.get(self.columns.content) for r in records]
                yield Chunk(numbers, contents, labels, aligned=aligned)
                first += len(records)
