"""From records to documents: which records of a chunk are in a range of keys, their tokens, their contexts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.capture.contexts import ContextPolicy
from pipeline.corpus.documents import Documents, cut, document_keys, left_out
from pipeline.corpus.encode import BadContent, Encoded, Encoder, TextEncoder, TokensEncoder
from pipeline.corpus.formats.records import FILE_SHIFT, Chunk
from pipeline.corpus.sources.files import CorpusFile
from pipeline.corpus.spans import labelled
from pipeline.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """All that makes documents of records. Sent to every task that reads a part of the corpus."""

    encoder: Encoder
    policy: ContextPolicy
    seed: int
    roles: tuple[str, ...]
    vocabulary: int
    """Tokens that the model has embeddings for."""
    labels: tuple[str, ...] = ()
    """The columns beside each document that define subpopulations."""
    kept: tuple[str, ...] = ()
    """The other columns beside each document."""

    def documents(self, chunk: Chunk, number: int, file: CorpusFile, low: int, high: int) -> Documents:
        """The documents of a chunk of file `number` with keys from `low` up to, not including, `high`."""
        records, keys = self._keys(chunk.numbers, number)
        kept = np.flatnonzero(_between(keys, low, high))
        sources = pa.array([f"{file.source}:{chunk.numbers[i]}" for i in kept.tolist()], pa.string())
        labels = {name: values.take(pa.array(kept)) for name, values in chunk.labels.items()}
        try:
            encoded = self._encoded(chunk, kept.tolist())
        except BadContent as bad:
            raise InputError(f"record {sources[bad.index]} of {file.url}: {bad}") from None
        about = pa.table({"source": sources, **labels})
        if encoded.record is not None:
            kept, about = kept[encoded.record], _about_parts(about, encoded.record)
        documents = cut(encoded, records[kept], keys[kept], about, self.policy, self.roles)
        if not chunk.broken:
            return documents
        return _with_broken(documents, chunk.broken, file, *self._keys([n for n, _ in chunk.broken], number), low, high)

    def _encoded(self, chunk: Chunk, kept: list[int]) -> Encoded:
        """The tokens of some records, with their labels. Raises BadContent."""
        contents = [chunk.contents[i] for i in kept]
        encoder = self.encoder
        if chunk.aligned:  # chats have none: refused where they are read
            assert isinstance(encoder, TextEncoder | TokensEncoder)
            encoder = replace(encoder, with_extents=True)
        encoded = encoder.encode(contents)
        if chunk.aligned:
            encoded = labelled(encoded, {name: label.take(kept) for name, label in chunk.aligned.items()}, contents)
        return encoded.embedded(self.vocabulary)

    def _keys(self, numbers: Any, file: int) -> tuple[Any, Any]:
        records = np.asarray(numbers, dtype=np.int64) + (file << FILE_SHIFT)
        return records, document_keys(self.seed, records)


def _about_parts(about: pa.Table, record: npt.NDArray[np.int64]) -> pa.Table:
    """What is said of each document of records that were cut: those of `file:3` are `file:3#0`, `file:3#1` ..."""
    starts = np.searchsorted(record, record)  # documents of a record follow one another
    parts = about.take(pa.array(record))
    sources = parts.column("source").to_pylist()
    named = [f"{source}#{part}" for source, part in zip(sources, np.arange(len(record)) - starts, strict=True)]
    return parts.set_column(parts.column_names.index("source"), "source", pa.array(named, pa.string()))


def _between(keys: Any, low: int, high: int) -> Any:
    return (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))


def _with_broken(
    documents: Documents, broken: list[tuple[int, str]], file: CorpusFile, records: Any, keys: Any, low: int, high: int
) -> Documents:
    inside = np.flatnonzero(_between(keys, low, high))
    sources = [f"{file.source}:{broken[i][0]}" for i in inside.tolist()]
    lines = left_out(keys[inside], records[inside], sources, [broken[i][1] for i in inside.tolist()])
    return replace(documents, left_out=pa.concat_tables([documents.left_out, lines]))
