"""From records to documents: which records of a chunk are in a range of keys, their tokens, their contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpora.chat import ChatEncoder
from pipeline.corpora.contents import BadContent, Encoder, TextEncoder, TokensEncoder
from pipeline.corpora.files import CorpusFile
from pipeline.corpora.records import FILE_SHIFT, Chunk
from pipeline.corpora.spans import labelled
from pipeline.errors import InputError
from pipeline.layout import Documents, cut, document_keys, left_out
from pipeline.rows import ContextPolicy


@dataclass(frozen=True)
class Recipe:
    """All that makes documents of records. Sent to every task that reads a part of the corpus."""

    encoder: Encoder
    policy: ContextPolicy
    seed: int
    roles: tuple[str, ...]

    def documents(self, chunk: Chunk, number: int, file: CorpusFile, low: int, high: int) -> Documents:
        """The documents of a chunk of file `number` with keys from `low` up to, not including, `high`."""
        records, keys = self._keys(chunk.numbers, number)
        kept = np.flatnonzero(_between(keys, low, high))
        sources = pa.array([f"{file.name}:{chunk.numbers[i]}" for i in kept.tolist()], pa.string())
        labels = {name: values.take(pa.array(kept)) for name, values in chunk.labels.items()}
        aligned = {name: label.take(kept.tolist()) for name, label in chunk.aligned.items()}
        encoder = self.encoder
        if aligned:  # chats have none: refused where they are read
            assert isinstance(encoder, TextEncoder | TokensEncoder)
            encoder = replace(encoder, with_extents=True)
        contents = [chunk.contents[i] for i in kept.tolist()]
        try:
            encoded = encoder.encode(contents)
        except BadContent as bad:
            raise InputError(f"record {sources[bad.index]} of {file.url}: {bad}") from None
        if aligned:
            encoded = labelled(encoded, aligned, contents)
        about = pa.table({"source": sources, **labels})
        documents = cut(encoded, records[kept], keys[kept], about, self.policy, self.roles)
        if not chunk.broken:
            return documents
        return _with_broken(documents, chunk.broken, file, *self._keys([n for n, _ in chunk.broken], number), low, high)

    def _keys(self, numbers: Any, file: int) -> tuple[Any, Any]:
        records = np.asarray(numbers, dtype=np.int64) + (file << FILE_SHIFT)
        return records, document_keys(self.seed, records)


def make_recipe(
    kind: str, tokenizer: Any, vocabulary: int, policy: ContextPolicy, seed: int, roles: Sequence[str]
) -> Recipe:
    """`kind`: what the records hold: text, tokens or messages. Raises InputError for a tokenizer without template."""
    encoder: Encoder
    if kind == "messages":
        encoder = ChatEncoder(tokenizer, policy.bos)
    elif kind == "tokens":
        encoder = TokensEncoder(vocabulary, policy.bos)
    else:
        encoder = TextEncoder(tokenizer)
    return Recipe(encoder, policy, seed, tuple(roles))


def _between(keys: Any, low: int, high: int) -> Any:
    return (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))


def _with_broken(
    documents: Documents, broken: list[tuple[int, str]], file: CorpusFile, records: Any, keys: Any, low: int, high: int
) -> Documents:
    inside = np.flatnonzero(_between(keys, low, high))
    sources = [f"{file.name}:{broken[i][0]}" for i in inside.tolist()]
    lines = left_out(keys[inside], records[inside], sources, [broken[i][1] for i in inside.tolist()])
    return replace(documents, left_out=pa.concat_tables([documents.left_out, lines]))
