"""Datasets by name, streamed from the Hugging Face hub (or any place that `datasets.load_dataset` takes).

A stream has no size and no pieces: its records are taken in its own order until they give enough rows. What interrupts
it is waited for (`pipeline.corpora.patience`), after the tries of `datasets` and `huggingface_hub` themselves, which
take seconds to minutes; then it goes on after the last record that came.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipeline.corpora.files import CorpusFile, reading
from pipeline.corpora.objects import chunk_of_objects
from pipeline.corpora.patience import Patience, Unread, failure_of, words_of
from pipeline.corpora.records import Chunk, Columns
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
        with reading(self._name):
            stream = self._records()
            first = 0
            while records := list(islice(stream, RECORDS_AT_ONCE)):
                found: dict[str, None] = {}
                numbers = np.arange(first, first + len(records))
                chunk = chunk_of_objects(records, numbers, self.columns, self.file, found)
                replace(self.columns, tools=None).check_present(sorted(found), self._name)
                yield chunk
                first += len(records)

    @property
    def _name(self) -> str:
        return f"the dataset {self.path}"

    def _records(self) -> Iterator[dict[str, Any]]:
        """The records, whatever interrupts them: each once, in the order of the stream. The dataset is opened once, so
        all are of one commit. Raises Unread when an interruption is long."""
        patience = Patience(self._name)
        dataset: Any = None
        taken = 0
        while True:
            try:
                if dataset is None:
                    dataset = self._open()
                for record in _after(dataset, taken) if taken else dataset:
                    taken += 1
                    patience.progressed()
                    yield record
                return
            except InputError:
                raise
            except Exception as error:
                so_far = f"it gave {taken:,} records"
                if not patience.waits_for(error, so_far):
                    raise Unread(f"corpus.path: {self._name} cannot be read: {words_of(error)}; {so_far}") from error

    def _open(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                "corpus.format: datasets needs the package `datasets`: pip install 'granary-activations[datasets]'"
            ) from None
        try:
            return load_dataset(self.path, self.subset, split=self.split, streaming=True)
        except (ValueError, RuntimeError) as error:
            if failure_of(error) is not None:
                raise
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"corpus.path: the dataset {self.path} cannot be streamed: {reason}") from None


def _after(dataset: Any, taken: int) -> Any:
    """A dataset without the records that were taken from it, those of whole files not read again."""
    try:
        dataset.load_state_dict(dataset.state_dict())
    except (NotImplementedError, RuntimeError):  # a kind of stream that cannot tell where it is
        return dataset.skip(taken)
    return dataset
