"""Datasets by name, streamed from the Hugging Face hub (or any place that `datasets.load_dataset` takes).

A stream has no size and no pieces: its records are taken in its own order until they give enough rows. What interrupts
it is waited for (`pipeline.corpus.sources.retry`), after the tries of `datasets` and `huggingface_hub` themselves,
which take seconds to minutes; then it goes on after the last record that came.

Where that is, the library knows (`state_dict`), exactly in some versions and kinds of streams and nearly in others. So
it is set to a place a little before, and what comes must be what came before.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pipeline.corpus.formats.objects import chunk_of_objects
from pipeline.corpus.formats.paths import find
from pipeline.corpus.formats.records import Chunk, Columns
from pipeline.corpus.sources.files import CorpusFile, reading
from pipeline.corpus.sources.remote import failure_at
from pipeline.corpus.sources.retry import Patience, Unread, chain_of, failure_of, is_answer, why_unread, words_of
from pipeline.errors import InputError

RECORDS_AT_ONCE = 256
NOT_FOUND = re.compile(r"Unable to find '(https?://[^']+)'")
"""What `datasets` says of a file that a server does not give, whatever the server said."""
NO_URL = "NonHttpUrlClientError"


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
                self.columns.required.check_present(sorted(found), self._name)
                yield chunk
                first += len(records)

    @property
    def _name(self) -> str:
        return f"the dataset {self.path}"

    def _records(self) -> Iterator[dict[str, Any]]:
        """The records, whatever interrupts them: each once, in the order of the stream. The dataset is opened once, so
        all are of one commit. Raises Unread when an interruption is long."""
        patience = Patience(self._name)
        stream: _Stream | None = None
        while True:
            try:
                if stream is None:
                    stream = _Stream(self._open(), self.columns.names)
                for record in stream.rest():
                    patience.progressed()
                    yield record
                return
            except InputError:
                raise
            except (
                Exception
            ) as error:  # datasets, hub and fsspec raise kinds of their own; all are raised again or named
                so_far = f"it gave {0 if stream is None else stream.taken:,} records"
                failure = _as_answered(error) if stream is None else _as_interruption(error)
                if not patience.waits_for(failure, so_far):
                    raise Unread(
                        f"corpus.path: {self._name} cannot be read: {why_unread(failure)}; {so_far}"
                    ) from error

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
            raise InputError(f"corpus.path: the dataset {self.path} cannot be streamed: {why_unread(error)}") from None


class _Stream:
    """The records of a dataset, which may be taken up again where they were interrupted."""

    def __init__(self, dataset: Any, columns: tuple[str, ...]):
        self.taken = 0
        self._dataset = self._current = dataset
        self._columns = columns
        self._marks: list[tuple[int, Any]] = []
        """Two places that were passed: how many records had been taken, and the state of the dataset."""
        self._kept: list[list[Any]] = []
        """The columns of the records from the first mark on."""

    def rest(self) -> Iterator[dict[str, Any]]:
        """The records after those that were taken."""
        for record in self._resumed() if self.taken else iter(self._current):
            self.taken += 1
            self._kept.append(self._told(record))
            yield record
            if self.taken % RECORDS_AT_ONCE == 0:
                self._mark()

    def _resumed(self) -> Iterator[dict[str, Any]]:
        if self._marks:
            self._current.load_state_dict(self._marks[0][1])
            records: Iterator[dict[str, Any]] = iter(self._current)
            if [self._told(record) for record in islice(records, len(self._kept))] == self._kept:
                return records
        self._marks, self._kept = [], []
        self._current = self._dataset.skip(self.taken)  # all that came is fetched again
        afresh: Iterator[dict[str, Any]] = iter(self._current)
        return afresh

    def _mark(self) -> None:
        try:
            self._marks.append((self.taken, self._current.state_dict()))
        except (NotImplementedError, RuntimeError):  # a kind of stream that cannot tell where it is
            self._kept = []
            return
        if len(self._marks) > 2:
            del self._marks[0]
            self._kept = self._kept[-RECORDS_AT_ONCE:]
        elif len(self._marks) == 1:
            self._kept = []

    def _told(self, record: dict[str, Any]) -> list[Any]:
        return [find(record, name) for name in self._columns]


def _as_answered(error: Exception) -> BaseException:
    """What fails as a dataset is opened. Of a file at an HTTP server `datasets` says only that there is none, whatever
    the server said: it is asked once more."""
    url = NOT_FOUND.search(str(error))
    return error if url is None else failure_at(url[1]) or error


def _as_interruption(error: Exception) -> BaseException:
    """What fails after a dataset was opened, as what it may be: for a file that an HTTP server does not give, fsspec
    says that there is none, and then asks for a folder of that name without http://. The server is asked once more."""
    chain = list(chain_of(error))
    if not all(type(each).__name__ in ("FileNotFoundError", NO_URL) for each in chain):
        return error
    for place in (str(each) for each in chain if type(each).__name__ == NO_URL):
        for failure in (failure_at(f"{scheme}://{place}") for scheme in ("https", "http")):
            if failure is not None and is_answer(failure):
                return failure
    return ConnectionError(f"a file is not found now: {words_of(error)}")
