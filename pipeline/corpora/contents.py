"""From the contents of records to tokens: texts through the tokenizer, and token ids as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.corpora.extents import encode_with_extents
from pipeline.errors import InputError
from pipeline.models import encode_texts
from pipeline.token_labels import TokenLabels

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

EMPTY = "empty"
UNDECODABLE = "undecodable"


@dataclass(frozen=True)
class Encoded:
    """The tokens of some records, one record after the other, without BOS."""

    tokens: Int32
    lengths: Int64
    """Tokens of each record; 0 for those in `bad`."""
    bad: dict[int, str]
    """Records that give no tokens: index and reason."""
    roles: Int8 | None = None
    """Of each token, an index into `role_names`; None where contents are no chats."""
    role_names: list[str] = field(default_factory=list)
    labels: TokenLabels = field(default_factory=TokenLabels)
    extents: Int64 | None = None
    """Where in its record's content each token lies, [tokens, 2]: characters of a text, or places in a list of token
    ids. Of encoders that are `with_extents`."""
    sizes: Int64 | None = None
    """With extents: characters, or token ids, of each record's content."""

    @classmethod
    def of(
        cls,
        tokens: Sequence[Any],
        bad: dict[int, str],
        roles: Sequence[Int8] | None = None,
        role_names: Sequence[str] = (),
    ) -> "Encoded":
        flat = np.concatenate([np.empty(0, np.int32), *tokens]).astype(np.int32, copy=False)
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        of_tokens = None if roles is None else np.concatenate([np.empty(0, np.int8), *roles])
        return cls(flat, lengths, bad, of_tokens, list(role_names))

    def at(self, extents: Sequence[Int64], sizes: Sequence[int]) -> "Encoded":
        """The same, with the extents of each record's tokens."""
        flat = np.concatenate([np.empty((0, 2), np.int64), *extents])
        return replace(self, extents=flat, sizes=np.array(sizes, dtype=np.int64))


class BadContent(InputError):
    """A record that shows that the corpus was made for another model. `index` is its place among those given."""

    def __init__(self, index: int, problem: str):
        super().__init__(problem)
        self.index = index


class Encoder(Protocol):
    def encode(self, contents: Sequence[Any]) -> Encoded:
        """Encode some records. Raises BadContent."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    tokenizer: Any
    with_extents: bool = False

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        texts: list[str] = []
        for number, content in enumerate(contents):
            text = ""
            try:
                text = content.decode("utf-8") if isinstance(content, bytes) else content or ""
            except UnicodeDecodeError:
                bad[number] = UNDECODABLE
            if not isinstance(text, str):
                bad[number], text = "not text", ""
            elif not text.strip():
                bad.setdefault(number, EMPTY)
                text = ""
            elif not is_unicode(text):
                bad[number], text = UNDECODABLE, ""
            texts.append(text)
        if self.with_extents:
            ids, extents = encode_with_extents(self.tokenizer, texts)
            encoded = Encoded.of([np.array(i, dtype=np.int32) for i in ids], bad)
            return encoded.at(extents, [len(text) for text in texts])
        ids = encode_texts(self.tokenizer, texts)
        return Encoded.of([np.array(i, dtype=np.int32) for i in ids], bad)


def is_unicode(text: str) -> bool:
    """JSON may hold halves of surrogate pairs, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class TokensEncoder:
    vocabulary: int
    bos: int | None
    with_extents: bool = False

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        tokens: list[Int32] = []
        sizes: list[int] = []
        for number, content in enumerate(contents):
            try:
                ids = np.asarray([] if content is None else content)
            except ValueError:
                ids = np.asarray(["ragged"])
            if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
                bad[number], ids = "not a list of token ids", np.empty(0, np.int32)
            elif len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary):
                wrong = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
                raise BadContent(
                    number,
                    f"token id {wrong} is outside the model's vocabulary of {self.vocabulary}: the corpus was "
                    "made with another tokenizer",
                )
            sizes.append(len(ids))
            if self.bos is not None and len(ids) and ids[0] == self.bos:
                ids = ids[1:]  # contexts get theirs: it is not doubled
            if not len(ids):
                bad.setdefault(number, EMPTY)
            tokens.append(ids.reshape(-1).astype(np.int32))
        encoded = Encoded.of(tokens, bad)
        if not self.with_extents:
            return encoded
        places = [np.arange(size - len(ids), size) for ids, size in zip(tokens, sizes, strict=True)]
        return encoded.at([np.stack([place, place + 1], axis=1) for place in places], sizes)
