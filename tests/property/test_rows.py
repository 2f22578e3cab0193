"""Row arithmetic: whatever the documents, every token is in one row, and units put the contexts together again."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.documents import Skipped
from pipeline.errors import InputError
from pipeline.rows import ContextPolicy, ContextRows, RowTable, batches_of, build_rows, contexts_of_rows

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

    def table(self, max_rows: int | None = None) -> RowTable:
        numbers = [str(i) for i in range(len(self.documents))]
        return build_rows(
            pa.table({"text": numbers, "source": numbers, "label": numbers}),
            Skipped(),
            lambda texts: [self.documents[int(text)] for text in texts],
            self.policy,
            seed=self.seed,
            max_rows=max_rows,
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
    prefixes, start, number = [], 0, 0
    for document, record in enumerate(table.documents.to_pylist()):
        assert (record["document"], record["row_start"]) == (document, start)
        assert record["label"] == record["source"]
        for window in case.windows(int(record["source"])):
            rows = window[policy.skip_first :]
            if rows:
                expected["token"] += rows
                expected["position"] += range(policy.skip_first, len(window))
                expected["document"] += [document] * len(rows)
                expected["context"] += [number] * len(rows)
                prefixes.append(window[: policy.skip_first])
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
    np.testing.assert_array_equal(table.prefix, np.asarray(prefixes).reshape(number, policy.skip_first))


@given(cases())
def test_documents_without_rows_are_counted_and_the_others_are_there_once(case: Case) -> None:
    table = case.table()
    silent = {i for i in range(len(case.documents)) if not any(w[case.policy.skip_first :] for w in case.windows(i))}
    assert sum(table.skipped.counts.values()) == len(silent)
    assert sorted(map(int, table.documents.column("source").to_pylist())) == sorted(
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
    np.testing.assert_array_equal(fewer.prefix, table.prefix[: len(fewer.prefix)])
    assert fewer.documents.column("row_stop")[-1].as_py() == max_rows
    assert fewer.documents.num_rows == fewer.columns["document"][-1] + 1
    with pytest.raises(InputError):
        case.table(table.num_rows + 1)


def unit_contexts(table: RowTable, policy: ContextPolicy, start: int, stop: int) -> list[ContextRows]:
    """As workers.harvester.read_contexts does."""
    lead = max(0, start - policy.context)
    token, context = table.columns["token"][lead:stop], table.columns["context"][lead:stop]
    return contexts_of_rows(token, context, table.prefix[context[0] : context[-1] + 1], start - lead)


@given(cases(), st.integers(1, 20))
def test_units_put_the_contexts_together_again(case: Case, rows_per_unit: int) -> None:
    table, policy = case.table(), case.policy
    windows = [w for s in table.documents.column("source").to_pylist() for w in case.windows(int(s))]
    windows = [window for window in windows if window[policy.skip_first :]]
    for start in range(0, table.num_rows, rows_per_unit):
        stop = min(start + rows_per_unit, table.num_rows)
        filled = []
        for context in unit_contexts(table, policy, start, stop):
            rows = range(start + context.first_row, start + context.first_row + context.num_rows)
            filled += rows
            assert len(rows) > 0
            window = windows[table.columns["context"][rows[0]]]
            np.testing.assert_array_equal(context.tokens, window[: len(context.tokens)])
            np.testing.assert_array_equal(context.tokens[context.first_position :], table.columns["token"][rows])
            np.testing.assert_array_equal(
                range(context.first_position, len(context.tokens)), table.columns["position"][rows]
            )
            assert len(context.tokens) <= policy.context
        assert sorted(filled) == list(range(start, stop))


@given(cases(), st.integers(1, 60))
def test_batches_hold_every_context_once_within_the_limit(case: Case, batch_tokens: int) -> None:
    table = case.table()
    contexts = unit_contexts(table, case.policy, 0, table.num_rows)
    batches = batches_of(contexts, batch_tokens, case.policy.context)
    assert sorted(id(c) for batch in batches for c in batch.contexts) == sorted(map(id, contexts))
    for batch in batches:
        tokens = batch.tokens()
        assert tokens.dtype == np.int64
        assert tokens.shape == (len(batch.contexts), batch.length)
        assert tokens.size <= batch_tokens or len(batch.contexts) == 1
        for line, context in zip(tokens, batch.contexts, strict=True):
            np.testing.assert_array_equal(line[: len(context.tokens)], context.tokens)
            assert not line[len(context.tokens) :].any()


@given(st.lists(st.integers(1, 256), max_size=200), st.integers(1, 8192))
def test_batches_have_few_shapes_and_little_padding(lengths: list[int], batch_tokens: int) -> None:
    contexts = [ContextRows(np.ones(n, np.int32), 0, 0) for n in lengths]
    batches = batches_of(contexts, batch_tokens, 256)
    assert {batch.length for batch in batches} <= set(range(32, 257, 32))
    assert all(len(batch.contexts).bit_count() == 1 for batch in batches)
    assert sum(batch.tokens().size for batch in batches) <= sum(lengths) + 31 * len(lengths)


@given(cases())
def test_the_seed_alone_orders_the_documents(case: Case) -> None:
    one, two = case.table(), case.table()
    assert one.documents.equals(two.documents)
    for name, values in one.columns.items():
        np.testing.assert_array_equal(values, two.columns[name])


def test_seeds_give_different_orders() -> None:
    documents = [[i] for i in range(50)]
    orders = {
        tuple(Case(documents, ContextPolicy(4, 1, BOS), seed).table().documents.column("source").to_pylist())
        for seed in range(5)
    }
    assert len(orders) == 5
