"""Laying out the table of rows: documents cut into contexts, in the order of their keys.

The order is that of a 64-bit key, a function of the seed and the record's number alone. So the table is the same
however the corpus is cut into pieces and the keys into ranges, and each range can be laid out apart from the others:
`cut` makes contexts of documents in the order they are read, `split` parts them by key, `in_order` joins what was read
of one range, and the table's columns follow from that and the sizes of the ranges before it.

Everything here is on flat arrays: nothing is done token by token or document by document where it can be helped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.capture.contexts import ContextPolicy
from pipeline.corpus.chats.messages import check_role_names
from pipeline.corpus.encode import EMPTY, Encoded
from pipeline.corpus.token_labels import TokenLabels, joined_labels

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

TOO_SHORT = "too short to give a row"
NO_ROWS = "no row of the roles asked for"
ONLY_EXCLUDED = "nothing but excluded tokens"
LEFT_OUT = pa.schema([("key", pa.uint64()), ("record", pa.int64()), ("source", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Sizes:
    documents: int
    contexts: int
    context_tokens: int
    rows: int

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(
            self.documents + other.documents,
            self.contexts + other.contexts,
            self.context_tokens + other.context_tokens,
            self.rows + other.rows,
        )


@dataclass(frozen=True)
class Documents:
    """Documents cut into contexts. Every document has a row, every context too, and ends with one."""

    keys: Keys
    contexts: Int64
    """Contexts of each document."""
    about: pa.Table
    """source, and the labels; a line a document."""
    context_lengths: Int64
    tokens: npt.NDArray[np.int32]
    """The tokens of all contexts."""
    is_row: Bool
    """True for each token that is a row."""
    roles: npt.NDArray[np.int8] | None
    """For each token an index into `role_names`."""
    role_names: tuple[str, ...]
    left_out: pa.Table
    """Records that gave no rows, as LEFT_OUT."""
    labels: TokenLabels = field(default_factory=TokenLabels)
    """The labels of each token, from spans."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.keys), len(self.context_lengths), len(self.tokens), int(self.is_row.sum()))


def document_keys(seed: int, records: Int64) -> Keys:
    """The key of each record: uint64, no two alike under one seed (splitmix64's finaliser, twice, is a bijection)."""
    with np.errstate(over="ignore"):
        salt = _mix(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(_mix(records.astype(np.uint64)) ^ salt)


def _mix(values: Keys) -> Keys:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def cut(
    encoded: Encoded, records: Int64, keys: Keys, about: pa.Table, policy: ContextPolicy, roles: Sequence[str]
) -> Documents:
    """Cut documents into contexts. `roles`: those whose tokens are rows; all, if there are none.

    A context is BOS, if contexts begin with one, and at most `context` - 1 tokens of one document.
    """
    lengths, tokens, of_tokens = encoded.lengths, encoded.tokens, encoded.roles
    lead = int(policy.bos is not None)
    step = policy.context - lead
    windows = -(-lengths // step)  # of each document
    document = np.repeat(np.arange(len(lengths)), windows)
    number = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)  # within its document
    context_lengths = np.minimum(step, lengths[document] - number * step) + lead
    starts = np.cumsum(context_lengths) - context_lengths
    if policy.bos is not None:  # in front of each window; windows of a document follow one another as its tokens do
        tokens = np.insert(tokens, starts - np.arange(len(starts)), policy.bos)
    position = np.arange(len(tokens)) - np.repeat(starts, context_lengths)
    is_row = position >= policy.skip_first
    labels = encoded.labels.with_none_at(starts - np.arange(len(starts))) if lead else encoded.labels
    if of_tokens is not None:
        if lead:  # BOS counts with the token after it
            of_tokens = np.insert(
                of_tokens, starts - np.arange(len(starts)), of_tokens[starts - np.arange(len(starts))]
            )
        if roles:
            is_row &= np.array([name in roles for name in encoded.role_names] or [False])[of_tokens]
    only_excluded = np.zeros(len(lengths), dtype=bool)  # of documents without a row: whether that is why
    if policy.excluded:
        only_excluded[np.repeat(document, context_lengths)[is_row]] = True
        is_row &= ~np.isin(tokens, policy.excluded)
    last = np.maximum.reduceat(np.where(is_row, position, -1), starts) if len(starts) else starts
    kept = position <= np.repeat(last, context_lengths)  # what follows the last row is not run
    has_rows = last >= 0
    contexts = np.bincount(document[has_rows], minlength=len(lengths))
    taken = np.flatnonzero(contexts)
    return Documents(
        keys=keys[taken],
        contexts=contexts[taken],
        about=about.take(pa.array(taken)),
        context_lengths=(last + 1)[has_rows],
        tokens=tokens[kept],
        is_row=is_row[kept],
        roles=None if of_tokens is None else of_tokens[kept],
        role_names=tuple(encoded.role_names),
        left_out=_left_out(encoded, records, keys, about, contexts, lead, policy, only_excluded),
        labels=labels[kept],
    )


def _left_out(
    encoded: Encoded,
    records: Int64,
    keys: Keys,
    about: pa.Table,
    contexts: Int64,
    lead: int,
    policy: ContextPolicy,
    only_excluded: Bool,
) -> pa.Table:
    def reason(i: int) -> str:
        if i in encoded.bad:
            return encoded.bad[i]
        if encoded.lengths[i] == 0:
            return EMPTY
        if encoded.lengths[i] + lead <= policy.skip_first:
            return TOO_SHORT
        return ONLY_EXCLUDED if only_excluded[i] else NO_ROWS

    silent = np.flatnonzero(contexts == 0)
    reasons = [reason(i) for i in silent.tolist()]
    sources = about.column("source").take(pa.array(silent)).combine_chunks()
    return left_out(keys[silent], records[silent], sources, reasons)


def left_out(keys: Keys, records: Int64, sources: Any, reasons: Sequence[str]) -> pa.Table:
    columns = [pa.array(keys, pa.uint64()), pa.array(records, pa.int64()), pa.array(sources, pa.string()), reasons]
    return pa.table(columns, schema=LEFT_OUT)


def split(documents: Documents, bounds: Sequence[int]) -> list[Documents]:
    """Part documents by key: the i-th part has the keys from bounds[i] up to, not including, bounds[i + 1]."""
    edges = np.array([min(b, 2**64 - 1) for b in bounds[1:-1]], dtype=np.uint64)
    which = np.searchsorted(edges, documents.keys, side="right")
    which_left_out = np.searchsorted(edges, documents.left_out.column("key").to_numpy(), side="right")
    return [
        replace(
            _take(documents, np.flatnonzero(which == i)),
            left_out=documents.left_out.take(pa.array(np.flatnonzero(which_left_out == i))),
        )
        for i in range(len(bounds) - 1)
    ]


def joined(parts: Sequence[Documents], role_names: Sequence[str]) -> Documents:
    """Put documents one after the other, their roles numbered by `role_names`."""
    check_role_names(role_names)
    roles = [_renumbered(part, role_names) for part in parts if part.roles is not None]
    return Documents(
        keys=np.concatenate([part.keys for part in parts]),
        contexts=np.concatenate([part.contexts for part in parts]),
        about=pa.concat_tables([part.about for part in parts], promote_options="permissive"),
        context_lengths=np.concatenate([part.context_lengths for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        is_row=np.concatenate([part.is_row for part in parts]),
        roles=np.concatenate(roles) if roles else None,
        role_names=tuple(role_names),
        left_out=pa.concat_tables([part.left_out for part in parts]),
        labels=joined_labels([part.labels for part in parts], [len(part.tokens) for part in parts]),
    )


def _renumbered(part: Documents, role_names: Sequence[str]) -> npt.NDArray[np.int8]:
    codes = np.array([role_names.index(name) for name in part.role_names] or [0], dtype=np.int8)
    return codes[part.roles]


def in_order(parts: Sequence[Documents], role_names: Sequence[str]) -> Documents:
    """All documents of one key range, in the order of their keys."""
    together = joined(parts, role_names)
    return _take(together, np.argsort(together.keys, kind="stable"))  # documents of one record share its key


def _take(documents: Documents, order: Int64) -> Documents:
    contexts = _ranges(documents.contexts, order)
    of_document = (
        np.add.reduceat(documents.context_lengths, starts_of(documents.contexts)) if len(documents.keys) else order
    )
    tokens = _slices(of_document, order)
    return replace(
        documents,
        keys=documents.keys[order],
        contexts=documents.contexts[order],
        about=documents.about.take(pa.array(order)),
        context_lengths=documents.context_lengths[contexts],
        tokens=_gathered(documents.tokens, tokens),
        is_row=_gathered(documents.is_row, tokens),
        roles=None if documents.roles is None else _gathered(documents.roles, tokens),
        labels=documents.labels.map(lambda codes: _gathered(codes, tokens)),
    )


def rows_of_contexts(documents: Documents) -> Int64:
    rows: Int64 = np.add.reduceat(documents.is_row, starts_of(documents.context_lengths), dtype=np.int64)
    return rows


def starts_of(lengths: Int64) -> Int64:
    return np.cumsum(lengths) - lengths


def _ranges(lengths: Int64, order: Int64) -> Int64:
    """The indices of the members of each group of `order`; groups lie one after the other with these lengths."""
    chosen = lengths[order]
    shift = starts_of(lengths)[order] - starts_of(chosen)
    return np.repeat(shift, chosen) + np.arange(int(chosen.sum()))


def _slices(lengths: Int64, order: Int64) -> list[tuple[int, int]]:
    starts = starts_of(lengths)[order]
    return list(zip(starts.tolist(), (starts + lengths[order]).tolist(), strict=True))


def _gathered(values: Any, slices: Sequence[tuple[int, int]]) -> Any:
    """Slice by slice rather than by an array of indices, which would be as large as the tokens eight bytes each."""
    return np.concatenate([values[:0], *(values[start:stop] for start, stop in slices)])


def first_rows(documents: Documents, num_rows: int) -> Documents:
    """The documents up to the given number of rows, the last of them cut behind its last row. What was left out counts
    up to the last document."""
    rows = rows_of_contexts(documents)
    ends = np.cumsum(rows)
    assert 0 < num_rows <= ends[-1]
    contexts = int(np.searchsorted(ends, num_rows)) + 1
    start = int(documents.context_lengths[: contexts - 1].sum())
    last_rows = np.flatnonzero(documents.is_row[start : start + int(documents.context_lengths[contexts - 1])])
    tokens = start + int(last_rows[num_rows - int(ends[contexts - 1] - rows[contexts - 1]) - 1]) + 1
    context_lengths = documents.context_lengths[:contexts].copy()
    context_lengths[-1] = tokens - start
    last_context = np.cumsum(documents.contexts)
    number = int(np.searchsorted(last_context, contexts)) + 1
    of_document = documents.contexts[:number].copy()
    of_document[-1] -= last_context[number - 1] - contexts
    seen = documents.left_out.column("key").to_numpy() < documents.keys[number - 1]
    return replace(
        documents,
        keys=documents.keys[:number],
        contexts=of_document,
        about=documents.about.slice(0, number),
        context_lengths=context_lengths,
        tokens=documents.tokens[:tokens],
        is_row=documents.is_row[:tokens],
        roles=None if documents.roles is None else documents.roles[:tokens],
        labels=documents.labels[:tokens],
        left_out=documents.left_out.filter(pa.array(seen)),
    )
