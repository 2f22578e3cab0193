"""From the contents of records to tokens: texts through the tokenizer, and token ids as they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.corpus.extents import encode_with_extents
from pipeline.corpus.token_labels import TokenLabels
from pipeline.errors import InputError
from pipeline.tokens.tokenizer import control_ids, encode_texts, special_tokens_as

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

EMPTY = "empty"
UNDECODABLE = "undecodable"
NOT_TEXT = "not text"
NO_TOKEN_IDS = "not a list of token ids"
NOT_AS_TEXT = "a control string that the tokenizer has in its vocabulary and cannot read as text"
SHOWN = 60
"""Letters of a text that a refusal shows."""
NOT_EMBEDDED = "has a token that the model has no embedding for"


@dataclass(frozen=True)
class Encoded:
    """The tokens of some records, one record after the other, without BOS."""

    tokens: Int32
    lengths: Int64
    """Tokens of each record; 0 for those in `bad`."""
    bad: dict[int, str]
    """Records that give no tokens: index and reason."""
    roles: Int8 | None = None
    """For each token an index into `role_names`; None where contents are no chats."""
    role_names: list[str] = field(default_factory=list)
    labels: TokenLabels = field(default_factory=TokenLabels)
    extents: Int64 | None = None
    """Where in its record's content each token lies, [tokens, 2]: characters of a text, or places in a list of token
    ids. Of encoders that are `with_extents`."""
    sizes: Int64 | None = None
    """With extents: characters, or token ids, of the content that each document is from."""
    record: Int64 | None = None
    """Where a record may give several documents: the record of each, and `lengths` are theirs; None: one a record."""

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
        """The same, with the extents of each document's tokens."""
        flat = np.concatenate([np.empty((0, 2), np.int64), *extents])
        return replace(self, extents=flat, sizes=np.array(sizes, dtype=np.int64))

    def embedded(self, vocabulary: int) -> "Encoded":
        """The same without the records that have a token of `vocabulary` or above, which are bad then.

        A tokenizer may have more tokens than its model has embeddings: most texts never use them."""
        return self.without(self.tokens >= vocabulary, NOT_EMBEDDED)

    def without(self, wrong: npt.NDArray[np.bool_], reason: str) -> "Encoded":
        """The same without the documents that have a token which is `wrong` [tokens]; they are bad for this reason."""
        if not wrong.any():
            return self
        document = np.repeat(np.arange(len(self.lengths)), self.lengths)
        bad = np.unique(document[wrong])
        kept = ~np.isin(document, bad)
        return replace(
            self,
            tokens=self.tokens[kept],
            lengths=np.where(np.isin(np.arange(len(self.lengths)), bad), 0, self.lengths),
            bad=self.bad | dict.fromkeys(bad.tolist(), reason),
            roles=None if self.roles is None else self.roles[kept],
            labels=self.labels[kept],
            extents=None if self.extents is None else self.extents[kept],
        )


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
    bos: int | None
    specials: Literal["text", "tokens"]
    """text: control strings like <s> are read as the characters they are. tokens: as the tokens they name."""
    with_extents: bool = False

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        texts: list[str] = []
        for number, content in enumerate(contents):
            text = ""
            try:
                text = content.decode("utf-8") if isinstance(content, bytes) else "" if content is None else content
            except UnicodeDecodeError:
                bad[number] = UNDECODABLE
            if not isinstance(text, str):
                bad[number], text = NOT_TEXT, ""
            elif not text.strip():
                bad.setdefault(number, EMPTY)
                text = ""
            elif not is_unicode(text):
                bad[number], text = UNDECODABLE, ""
            texts.append(text)
        extents: list[Int64] = []
        with special_tokens_as(self.tokenizer, self.specials):
            if self.with_extents:
                ids, extents = encode_with_extents(self.tokenizer, texts)
            else:
                ids = encode_texts(self.tokenizer, texts)
        tokens = [without_bos(np.array(i, dtype=np.int32), self.bos) for i in ids]
        encoded = Encoded.of(tokens, bad)
        if self.with_extents:
            of_rest = [extent[len(extent) - len(t) :] for extent, t in zip(extents, tokens, strict=True)]
            encoded = encoded.at(of_rest, [len(text) for text in texts])
        if self.specials == "tokens":
            return encoded
        return encoded.without(np.isin(encoded.tokens, control_ids(self.tokenizer)), NOT_AS_TEXT)


def without_bos(ids: Int32, bos: int | None) -> Int32:
    """Token ids without a BOS in front: every context gets its own, which is not doubled."""
    return ids[1:] if bos is not None and len(ids) and ids[0] == bos else ids


def is_unicode(text: str) -> bool:
    """JSON may hold halves of surrogate pairs, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_token_lists(contents: Iterable[Any], column: str) -> None:
    """Raise InputError for contents of which none is a list, neither by itself nor in JSON."""
    first = None
    for content in contents:
        if isinstance(content, list | np.ndarray):
            return
        first = content if first is None else first
    if first is not None:
        kind = "text" if isinstance(first, str) else "bytes" if isinstance(first, bytes) else "values"
        advice = "; if that is what is to be run, name it as corpus.text" if isinstance(first, str | bytes) else ""
        raise InputError(
            f"corpus.tokens: column {column!r} holds {kind}, not lists of token ids, as {str(first)[:SHOWN]!r}{advice}"
        )


@dataclass(frozen=True)
class TokensEncoder:
    vocabulary: int
    bos: int | None
    separator: int | None = None
    """A token at which a record is cut into documents; it belongs to none of them."""
    with_extents: bool = False

    def encode(self, contents: Sequence[Any]) -> Encoded:
        bad: dict[int, str] = {}
        tokens: list[Int32] = []
        extents: list[Int64] = []
        sizes: list[int] = []
        records: list[int] = []
        for number, content in enumerate(contents):
            problem, ids = self._ids(number, content)
            documents = [
                (stop, piece) for stop, part in self._documents(ids) if len(piece := without_bos(part, self.bos))
            ]
            if problem or not documents:
                bad[len(tokens)] = problem or EMPTY
            for stop, piece in documents or [(0, ids[:0])]:
                place = np.arange(stop - len(piece), stop)
                tokens.append(piece)
                extents.append(np.stack([place, place + 1], axis=1))
                sizes.append(len(ids))
                records.append(number)
        encoded = Encoded.of(tokens, bad)
        if self.separator is not None:
            encoded = replace(encoded, record=np.array(records, dtype=np.int64))
        return encoded.at(extents, sizes) if self.with_extents else encoded

    def _ids(self, number: int, content: Any) -> tuple[str | None, Int32]:
        """A problem, or the token ids of a record. Raises BadContent for ids of another tokenizer."""
        content = [] if content is None else content
        try:
            ids = np.asarray(content)
        except ValueError:
            ids = np.asarray(["ragged"])
        is_wide = ids.ndim == 1 and ids.dtype.kind in "fO" and all(type(i) is int for i in content)  # beyond 64 bits
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu" and not is_wide):
            return NO_TOKEN_IDS, np.empty(0, np.int32)
        is_outside = len(ids) > 0 and (ids.min() < 0 or ids.max() >= self.vocabulary)
        outside = (
            [int(i) for i in content if not 0 <= i < self.vocabulary and i != self.separator] if is_outside else []
        )
        if outside:
            raise BadContent(number, self._why_outside(outside[0]))
        return None, ids.astype(np.int32)

    def _why_outside(self, token: int) -> str:
        why = "the corpus was made with another tokenizer"
        if token < 0:
            why = (
                "ids below 0 are padding, or masks in the labels of training (-100, -1); name the column of the ids "
                "that a model is given (input_ids, not labels), and write its lists without them, as "
                "[i for i in ids if i >= 0] does"
            )
        return f"token id {token} is outside the model's vocabulary of {self.vocabulary}: {why}"

    def _documents(self, ids: Int32) -> list[tuple[int, Int32]]:
        """The documents of a record, and where in it each ends."""
        if self.separator is None:
            return [(len(ids), ids)]
        cuts = np.flatnonzero(ids == self.separator)
        stops = [*cuts.tolist(), len(ids)]
        return [(stop, ids[start:stop]) for start, stop in zip([0, *(cuts + 1).tolist()], stops, strict=True)]
