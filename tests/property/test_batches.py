"""Batches: every context is in one of them, their shapes are few, and little of them is padding."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import BATCH_COST, MENU, Batch, batch_size, batches_of, shapes
from pipeline.rows import ContextRows

LENGTHS = st.lists(st.integers(1, 256), max_size=200)


def contexts_of(lengths: list[int]) -> list[ContextRows]:
    return [ContextRows(1 + np.arange(n, dtype=np.int32), np.arange(n), 0) for n in lengths]


@given(LENGTHS, st.integers(1, 8192))
def test_every_context_is_in_one_line_of_one_batch(lengths: list[int], batch_tokens: int) -> None:
    contexts = contexts_of(lengths)
    batches = batches_of(contexts, batch_tokens, 256)
    assert sorted(id(c) for batch in batches for c in batch.contexts) == sorted(map(id, contexts))
    for batch in batches:
        tokens = batch.tokens()
        assert (tokens.dtype, tokens.shape) == (np.int64, (batch.lines, batch.length))
        assert tokens.size == batch.positions
        assert batch.padding == (tokens == 0).sum()
        assert tokens.size <= batch_tokens or batch.lines == 1
        for line, context in zip(tokens, batch.contexts, strict=False):
            np.testing.assert_array_equal(line[: len(context.tokens)], context.tokens)
            assert not line[len(context.tokens) :].any()
        assert not tokens[len(batch.contexts) :].any()


@given(LENGTHS, st.integers(1, 8192), st.randoms(use_true_random=False))
def test_the_order_of_the_contexts_does_not_change_the_shapes(
    lengths: list[int], batch_tokens: int, rng: object
) -> None:
    shuffled = list(lengths)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = (batches_of(contexts_of(n), batch_tokens, 256) for n in (lengths, shuffled))
    assert [(b.lines, b.length) for b in one] == [(b.lines, b.length) for b in two]


@pytest.mark.parametrize(
    ("batch_tokens", "context"), [*product([1, 100, 4096, 65536, 10**6], [2, 9, 31, 32, 128, 1000, 1024, 8192, 131072])]
)
def test_there_are_few_shapes(batch_tokens: int, context: int) -> None:
    menu = shapes(batch_tokens, context)
    assert len(menu) <= MENU
    assert menu == sorted(set(menu))
    assert menu[-1] == (context, batch_size(batch_tokens, context))  # the shape that layers are compiled for
    assert all(length % 8 == 0 or length == context for length, _ in menu)
    assert all(lines == 1 or length * lines <= batch_tokens for length, lines in menu)


def test_lengths_grow_by_an_eighth_at_most_in_contexts_of_1024() -> None:
    lengths = sorted({length for length, _ in shapes(4096, 1024)})
    assert all(b - a <= max(8, a / 8) for a, b in pairwise(lengths))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=7), st.sampled_from([64, 200, 400]))
def test_no_other_way_is_cheaper(lengths: list[int], batch_tokens: int) -> None:
    """Against all ways to cut the sorted contexts into runs."""
    menu = shapes(batch_tokens, 100)
    ordered = sorted(lengths, reverse=True)

    def cheapest(first: int) -> int:
        if first >= len(ordered):
            return 0
        ways = [(a * b + BATCH_COST, b) for a, b in menu if a >= ordered[first]]
        return min(cost + cheapest(first + lines) for cost, lines in ways)

    def cost(batches: list[Batch]) -> int:
        return sum(batch.positions + BATCH_COST for batch in batches)

    assert cost(batches_of(contexts_of(lengths), batch_tokens, 100)) == cheapest(0)


def test_short_documents_in_long_contexts_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(20, 101, 1000).tolist()
    batches = batches_of(contexts_of(lengths), 4096, 1024)
    assert sum(b.padding for b in batches) < 0.1 * sum(b.positions for b in batches)
