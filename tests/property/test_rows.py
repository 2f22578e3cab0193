"""Row arithmetic: whatever the documents, and however the planning is cut, every token is in one row in one order, and
units put the contexts together again."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.capture.contexts import ContextPolicy, ContextRows, contexts_of_rows
from pipeline.corpus.documents import Sizes, document_keys
from pipeline.corpus.encode import TokensEncoder
from pipeline.corpus.formats.open import Corpus
from pipeline.corpus.formats.records import FILE_SHIFT, Chunk, Piece
from pipeline.corpus.recipe import Recipe
from pipeline.corpus.sources.files import CorpusFile
from pipeline.corpus.table_columns import context_starts, documents_table, row_column
from pipeline.errors import InputError
from workers.cluster.tasks import Here
from workers.plan.calls import Cuts
from workers.plan.table_plan import plan_table

BOS = 99


@dataclass(frozen=True)
class InMemory:
    """A format whose files are lists of token ids, cut into pieces of `records` records of 64 bytes."""

    documents: list[list[int]]
    records: int = 10**6

    def pieces(self, number: int, file: CorpusFile) -> list[Piece]:
        starts = range(0, len(self.documents), self.records)
        stops = [min(start + self.records, len(self.documents)) for start in starts]
        return [Piece(number, a, b, a, 64 * (b - a)) for a, b in zip(starts, stops, strict=True)]

    def read(self, file: CorpusFile, piece: Piece) -> Iterator[Chunk]:
        numbers = np.arange(piece.start, piece.stop)
        label = pa.array([str(n) for n in numbers], pa.string())
        yield Chunk(numbers, self.documents[piece.start : piece.stop], {"label": label})


@dataclass(frozen=True)
class RowTable:
    """A whole table, put together from its buckets."""

    columns: dict[str, np.ndarray]
    context_token: np.ndarray
    context_start: np.ndarray
    documents: pa.Table
    skipped: dict[str, int]

    @property
    def num_rows(self) -> int:
        return len(self.columns["token"])


BOS = 99


@dataclass(frozen=True)
class Case:
    documents: list[list[int]]
    policy: ContextPolicy
    seed: int

    def windows(self, document: int) -> list[list[int]]:
        """The contexts of a document, cut directly."""
        bos = [] if self.policy.bos is None else [BOS]
        step = self.policy.context - len(bos)
        ids = self.documents[document]
        return [bos + ids[start : start + step] for start in range(0, len(ids), step)]

    def table(self, max_rows: int | None = None, records: int = 10**6, cuts: Cuts | None = None) -> RowTable:
        corpus = Corpus((CorpusFile("memory", 64 * len(self.documents)),), InMemory(self.documents, records))
        recipe = Recipe(TokensEncoder(100, None), self.policy, self.seed, (), 100)
        plan = plan_table([corpus], recipe, max_rows, Here(), lambda done, total: None, cuts or Cuts())
        buckets = [bucket.documents for bucket in plan.buckets]
        before = list(accumulate((bucket.sizes for bucket in plan.buckets), initial=Sizes(0, 0, 0, 0)))
        starts = [context_starts(*pair) for pair in zip(buckets, before, strict=False)]
        return RowTable(
            columns={
                name: np.concatenate([row_column(d, name, b) for d, b in zip(buckets, before, strict=False)])
                for name in ("token", "position", "document", "context")
            },
            context_token=np.concatenate([d.tokens for d in buckets]),
            context_start=np.append(np.concatenate(starts), before[-1].context_tokens),
            documents=pa.concat_tables([documents_table(*pair) for pair in zip(buckets, before, strict=False)]),
            skipped=plan.skipped.counts,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bos = draw(st.sampled_from([BOS, None]))
    skip_first = draw(st.integers(0, 3))
    least = max(skip_first, int(bos is not None)) + 1
    context = draw(st.integers(max(2, least), 9))
    documents = draw(st.lists(st.lists(st.integers(0, 50), max_size=25), min_size=1, max_size=12))
    case = Case(documents, ContextPolicy(context, skip_first, bos), draw(st.integers(0, 3)))
    if not any(window[skip_first:] for i in range(len(documents)) for window in case.windows(i)):
        case.documents.append(list(range(12)))
    return case


@given(cases())
def test_every_token_is_in_one_row(case: Case) -> None:
    table, policy = case.table(), case.policy
    expected: dict[str, list[int]] = {"token": [], "position": [], "document": [], "context": []}
    contexts: list[list[int]] = []
    start, number = 0, 0
    for document, record in enumerate(table.documents.to_pylist()):
        assert (record["document"], record["row_start"]) == (document, start)
        assert record["source"] == f"memory:{record['label']}"
        for window in case.windows(int(record["label"])):
            rows = window[policy.skip_first :]
            if rows:
                expected["token"] += rows
                expected["position"] += range(policy.skip_first, len(window))
                expected["document"] += [document] * len(rows)
                expected["context"] += [number] * len(rows)
                contexts.append(window)
                number += 1
                start += len(rows)
        assert record["row_stop"] == start
    for name, values in expected.items():
        np.testing.assert_array_equal(table.columns[name], values, err_msg=name)
    assert {name: values.dtype.name for name, values in table.columns.items()} == {
        "token": "int32",
        "position": "int32",
        "document": "int64",
        "context": "int64",
    }
    assert [tokens.tolist() for tokens in context_tokens(table)] == contexts
    assert (table.context_token.dtype, table.context_start.dtype) == (np.int32, np.int64)


@given(cases())
def test_documents_without_rows_are_counted_and_the_others_are_there_once(case: Case) -> None:
    table = case.table()
    silent = {i for i in range(len(case.documents)) if not any(w[case.policy.skip_first :] for w in case.windows(i))}
    assert sum(table.skipped.values()) == len(silent)
    assert sorted(map(int, table.documents.column("label").to_pylist())) == sorted(
        set(range(len(case.documents))) - silent
    )


@given(cases(), st.data())
def test_fewer_rows_are_a_prefix_of_all_rows(case: Case, data: st.DataObject) -> None:
    table = case.table()
    max_rows = data.draw(st.integers(1, table.num_rows))
    fewer = case.table(max_rows)
    assert fewer.num_rows == max_rows
    for name, values in table.columns.items():
        np.testing.assert_array_equal(fewer.columns[name], values[:max_rows], err_msg=name)
    np.testing.assert_array_equal(fewer.context_token, table.context_token[: len(fewer.context_token)])
    np.testing.assert_array_equal(fewer.context_start[:-1], table.context_start[: len(fewer.context_start) - 1])
    assert fewer.context_token[-1] == fewer.columns["token"][-1]
    assert fewer.documents.column("row_stop")[-1].as_py() == max_rows
    assert fewer.documents.num_rows == fewer.columns["document"][-1] + 1
    with pytest.raises(InputError):
        case.table(table.num_rows + 1)


def context_tokens(table: RowTable) -> list[np.ndarray]:
    return np.split(table.context_token, table.context_start[1:-1])


def unit_contexts(table: RowTable, start: int, stop: int) -> list[ContextRows]:
    """As workers.harvest.harvester.read_contexts does."""
    position, context = table.columns["position"][start:stop], table.columns["context"][start:stop]
    return contexts_of_rows(position, context, context_tokens(table)[context[0] : context[-1] + 1])


@given(cases(), st.integers(1, 20))
def test_units_put_the_contexts_together_again(case: Case, rows_per_unit: int) -> None:
    table, policy = case.table(), case.policy
    windows = [w for s in table.documents.column("label").to_pylist() for w in case.windows(int(s))]
    windows = [window for window in windows if window[policy.skip_first :]]
    for start in range(0, table.num_rows, rows_per_unit):
        stop = min(start + rows_per_unit, table.num_rows)
        filled = []
        for context in unit_contexts(table, start, stop):
            rows = range(start + context.first_row, start + context.first_row + context.num_rows)
            filled += rows
            assert len(rows) > 0
            window = windows[table.columns["context"][rows[0]]]
            np.testing.assert_array_equal(context.tokens, window[: len(context.tokens)])
            np.testing.assert_array_equal(context.tokens[context.positions], table.columns["token"][rows])
            np.testing.assert_array_equal(context.positions, table.columns["position"][rows])
            assert context.positions[-1] == len(context.tokens) - 1
            assert len(context.tokens) <= policy.context
        assert sorted(filled) == list(range(start, stop))


@given(cases(), st.data())
def test_how_the_planning_is_cut_does_not_change_the_table(case: Case, data: st.DataObject) -> None:
    """Pieces, calls and buckets of any number, with and without a limit of rows, which is reached in rounds."""
    whole = case.table()
    max_rows = data.draw(st.none() | st.integers(1, whole.num_rows))
    one = case.table(max_rows)
    records = data.draw(st.integers(1, 12))
    cuts = Cuts(data.draw(st.sampled_from([1, 64, 200, 10**6])), data.draw(st.sampled_from([32, 64, 200, 10**6])))
    two = case.table(max_rows, records, cuts)
    for name, values in one.columns.items():
        np.testing.assert_array_equal(values, two.columns[name], err_msg=name)
        assert values.dtype == two.columns[name].dtype
    np.testing.assert_array_equal(one.context_token, two.context_token)
    np.testing.assert_array_equal(one.context_start, two.context_start)
    assert one.documents.equals(two.documents)
    assert one.skipped == two.skipped


@given(cases())
def test_documents_are_in_the_order_of_their_keys(case: Case) -> None:
    order = [int(label) for label in case.table().documents.column("label").to_pylist()]
    keys = document_keys(case.seed, np.arange(len(case.documents)))
    assert order == sorted(order, key=lambda number: int(keys[number]))


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_no_two_records_have_one_key(seed: int, file: int) -> None:
    records = np.concatenate([np.arange(1000), (file << FILE_SHIFT) + np.arange(1000, 2000)])
    keys = document_keys(seed, records)
    assert len(set(keys.tolist())) == 2000
    assert abs(np.mean(keys.astype(float)) / 2**64 - 0.5) < 0.05  # and they are spread over all there are


def test_seeds_give_different_orders() -> None:
    documents = [[i] for i in range(50)]
    orders = {
        tuple(Case(documents, ContextPolicy(4, 1, BOS), seed).table().documents.column("label").to_pylist())
        for seed in range(5)
    }
    assert len(orders) == 5
