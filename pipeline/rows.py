"""From documents to the table of rows, and from a unit's rows back to the contexts to run.

A context is BOS, where the tokenizer has one, and then tokens of one document, at most `context` in all. `position`
counts from 0 at the context's first token. The first `skip_first` positions are run but are not rows; their tokens are
kept as the context's prefix, so that every context can be put together again from the table alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.documents import Skipped
from pipeline.errors import InputError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

LENGTHS = 8
"""Lengths to which contexts are padded: eighths of the longest."""

ENCODE_DOCUMENTS = 1024
"""Documents handed to the tokenizer at once: enough to keep its threads busy."""


@dataclass(frozen=True)
class ContextPolicy:
    """How documents are cut into contexts."""

    context: int
    """Most tokens of a context, BOS included."""
    skip_first: int
    """Leading positions that are no rows (1: BOS, whose activations are an attention sink of 100 times the norm)."""
    bos: int | None
    """The BOS token, or None for a tokenizer without one."""

    def __post_init__(self) -> None:
        if self.context <= max(self.skip_first, int(self.bos is not None)):
            raise InputError(f"corpus.context {self.context} leaves no rows after skip_first {self.skip_first}")


@dataclass(frozen=True)
class RowTable:
    """The planned rows; arrays as `storage.create.Table` takes them."""

    columns: dict[str, npt.NDArray[Any]]
    """token, position int32; document, context int64; each [num_rows]."""
    prefix: Int32
    """[num_contexts, skip_first]."""
    documents: pa.Table
    """document, row_start, row_stop, source, and labels; in the order of the rows."""
    skipped: Skipped

    @property
    def num_rows(self) -> int:
        return len(self.columns["token"])


def build_rows(
    documents: pa.Table,
    skipped: Skipped,
    encode: Callable[[list[str]], list[list[int]]],
    policy: ContextPolicy,
    *,
    seed: int,
    max_rows: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RowTable:
    """Lay out the rows of `documents` (columns text, source, labels) in a seeded random order of documents.

    `encode` maps texts to token ids without special tokens. Stops at `max_rows`, in the middle of a context if need
    be. Documents too short to give a row are counted in `skipped`. Raises InputError when there are fewer rows than
    `max_rows`, or none.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(documents.num_rows)
    tokens: list[Int32] = []
    prefixes: list[Int32] = []
    lengths: list[int] = []  # rows of each context
    context_document: list[int] = []
    kept: list[int] = []  # source record of each document that has rows
    num_rows = 0
    for source, ids in _encoded(documents, order, encode):
        rows_before = num_rows
        for window in _windows(np.asarray(ids, dtype=np.int32), policy):
            row_tokens = window[policy.skip_first :]
            if max_rows is not None:
                row_tokens = row_tokens[: max_rows - num_rows]
            if len(row_tokens) == 0:
                continue
            tokens.append(row_tokens)
            prefixes.append(window[: policy.skip_first])
            lengths.append(len(row_tokens))
            context_document.append(len(kept))
            num_rows += len(row_tokens)
        if num_rows > rows_before:
            kept.append(source)
        else:
            skipped.add("too short to give a row", documents.column("source")[source].as_py())
        progress(num_rows, max_rows or 0)
        if num_rows == max_rows:
            break
    if num_rows == 0:
        raise InputError("the corpus gives no rows: every document is too short")
    if max_rows is not None and num_rows < max_rows:
        raise InputError(
            f"corpus.rows asks for {max_rows:,} rows and the corpus has {num_rows:,}: ask for at most that many, "
            "or leave corpus.rows out to take them all"
        )
    per_context = np.asarray(lengths)
    context = np.repeat(np.arange(len(lengths), dtype=np.int64), per_context)
    document = np.asarray(context_document, dtype=np.int64)[context]
    first_row = np.cumsum(per_context) - per_context
    position = np.arange(num_rows) - first_row[context] + policy.skip_first
    starts = np.searchsorted(document, np.arange(len(kept) + 1))
    table = documents.drop_columns(["text"]).take(pa.array(kept, pa.int64()))
    ranges = {"document": np.arange(len(kept)), "row_start": starts[:-1], "row_stop": starts[1:]}
    return RowTable(
        columns={
            "token": np.concatenate(tokens),
            "position": position.astype(np.int32),
            "document": document,
            "context": context,
        },
        prefix=np.stack(prefixes) if policy.skip_first else np.zeros((len(lengths), 0), dtype=np.int32),
        documents=pa.table({**{k: pa.array(v, pa.int64()) for k, v in ranges.items()}, **_columns(table)}),
        skipped=skipped,
    )


def _encoded(
    documents: pa.Table, order: Int64, encode: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(order), ENCODE_DOCUMENTS):
        numbers = order[start : start + ENCODE_DOCUMENTS]
        texts = documents.column("text").take(pa.array(numbers)).to_pylist()
        yield from zip(numbers.tolist(), encode(texts), strict=True)


def _windows(ids: Int32, policy: ContextPolicy) -> Iterator[Int32]:
    bos = np.asarray([] if policy.bos is None else [policy.bos], dtype=np.int32)
    step = policy.context - len(bos)
    for start in range(0, len(ids), step):
        yield np.concatenate([bos, ids[start : start + step]])


def _columns(table: pa.Table) -> dict[str, Any]:
    return {name: table.column(name) for name in table.column_names}


@dataclass(frozen=True)
class ContextRows:
    """A context to run for a unit: its tokens, and which of them are rows of the unit."""

    tokens: Int32
    """Prefix and rows, from position 0 to the last position the unit needs."""
    first_position: int
    """The first position that is a row of the unit; all later ones of `tokens` are too."""
    first_row: int
    """That row, counted from the unit's first row."""

    @property
    def num_rows(self) -> int:
        return len(self.tokens) - self.first_position


def contexts_of_rows(token: Int32, context: Int64, prefix: Int32, first: int) -> list[ContextRows]:
    """Put together the contexts of a row range's tail.

    `token` and `context` cover a range of rows that begins early enough to hold the whole start of every context that
    touches row `first` (an offset into the range) or a later one; `prefix` holds the prefixes of contexts
    context[0] ... context[-1]. Contexts that end before `first` are left out. A context is cut at the range's end:
    attention is causal, so what follows cannot change the rows before it.
    """
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(context)) + 1, [len(context)]])
    found = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop <= first:
            continue
        lead = prefix[int(context[start]) - int(context[0])]
        found.append(
            ContextRows(
                tokens=np.concatenate([lead, token[start:stop]]),
                first_position=len(lead) + max(0, first - start),
                first_row=max(0, start - first),
            )
        )
    return found


@dataclass(frozen=True)
class Batch:
    """Contexts that run together, padded to one length."""

    contexts: list[ContextRows]
    length: int

    def tokens(self) -> Int64:
        """int64 [contexts, length]. Padding (token 0) stands on the right, where causal attention keeps it from every
        row, so that no attention mask is needed."""
        tokens = np.zeros((len(self.contexts), self.length), dtype=np.int64)
        for line, context in zip(tokens, self.contexts, strict=True):
            line[: len(context.tokens)] = context.tokens
        return tokens


def batches_of(contexts: Sequence[ContextRows], batch_tokens: int, context: int) -> list[Batch]:
    """Group contexts of at most `context` tokens into batches of at most `batch_tokens` positions (or one context).

    The batches depend on the arguments alone, and have few shapes: lengths are rounded up to eighths of `context`, and
    the number of contexts is a power of two. Each new shape costs a matrix library its preparation and the memory for
    it (oneDNN kept 40 MB a unit of real text), a compiler half a minute, and what rounding adds to the short contexts
    is less than batches of mixed lengths did.
    """
    step = max(1, context // LENGTHS)
    by_length: dict[int, list[ContextRows]] = {}
    for member in contexts:
        rounded = min(-(-len(member.tokens) // step) * step, context)
        by_length.setdefault(max(rounded, len(member.tokens)), []).append(member)
    batches = []
    for length, members in sorted(by_length.items(), reverse=True):
        most = batch_size(batch_tokens, length)
        while members:
            size = min(most, _power_of_two(len(members)))
            batches.append(Batch(members[:size], length))
            members = members[size:]
    return batches


def batch_size(batch_tokens: int, length: int) -> int:
    """How many contexts of a length make a full batch: a power of two."""
    return _power_of_two(max(1, batch_tokens // length))


def _power_of_two(number: int) -> int:
    """The largest power of two that is not more than a positive number."""
    return 1 << (number.bit_length() - 1)
