"""Batches: every context is in one place of one of them, their shapes are few, and little of them is padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from pipeline.capture import batches
from pipeline.capture.batches import BATCH_COST, Batch, batch_size, batches_of, full_shapes
from pipeline.capture.contexts import ContextRows

LENGTHS = st.lists(st.integers(1, 600), max_size=100)
BATCH_TOKENS = st.integers(1, 8192)


def contexts_of(lengths: list[int]) -> list[ContextRows]:
    return [ContextRows(1 + np.arange(n, dtype=np.int32), np.arange(n), 0) for n in lengths]


@given(LENGTHS, BATCH_TOKENS)
def test_every_context_is_in_one_place_of_one_batch(lengths: list[int], batch_tokens: int) -> None:
    contexts = contexts_of(lengths)
    made = batches_of(contexts, batch_tokens, 600)
    assert sorted(id(c) for batch in made for _, c in batch.places()) == sorted(map(id, contexts))
    for batch in made:
        tokens = batch.tokens()
        assert (tokens.dtype, tokens.shape) == (np.int64, (batch.lines, batch.length))
        assert batch.padding == (tokens == 0).sum()
        assert tokens.size <= batch_tokens or batch.lines == 1
        left = tokens.ravel().copy()
        for place, context in batch.places():
            assert place // batch.length == (place + len(context.tokens) - 1) // batch.length  # in one line
            np.testing.assert_array_equal(left[place : place + len(context.tokens)], context.tokens)
            left[place : place + len(context.tokens)] = 0
        assert not left.any()


@given(LENGTHS, BATCH_TOKENS)
def test_transformers_sees_each_context_as_a_sequence(lengths: list[int], batch_tokens: int) -> None:
    """What it makes its masks from: positions that do not go on by one begin another sequence."""
    for batch in batches_of(contexts_of(lengths), batch_tokens, 600):
        ids = batch.position_ids()
        if ids is None:
            assert all(len(line) <= 1 for line in batch.contents)
            continue
        sequence = find_packed_sequence_indices(torch.from_numpy(ids)).ravel().tolist()
        flat, owner = ids.ravel(), np.full(batch.positions, -1)
        for number, (place, context) in enumerate(batch.places()):
            positions = slice(place, place + len(context.tokens))
            np.testing.assert_array_equal(flat[positions], np.arange(len(context.tokens)))
            owner[positions] = number
        for line in range(batch.lines):
            part = slice(line * batch.length, (line + 1) * batch.length)
            pairs = set(zip(sequence[part], owner[part].tolist(), strict=True))
            assert len(pairs) == len({s for s, _ in pairs}) == len({o for _, o in pairs})  # one to one


@given(LENGTHS, BATCH_TOKENS, st.randoms(use_true_random=False))
def test_the_order_of_the_contexts_does_not_change_the_shapes(
    lengths: list[int], batch_tokens: int, rng: object
) -> None:
    shuffled = list(lengths)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = (batches_of(contexts_of(n), batch_tokens, 600) for n in (lengths, shuffled))
    assert [(b.lines, b.length) for b in one] == [(b.lines, b.length) for b in two]


@given(LENGTHS, BATCH_TOKENS)
def test_shapes_are_few_and_whole_batches_come_first(lengths: list[int], batch_tokens: int) -> None:
    made = batches_of(contexts_of(lengths), batch_tokens, 600)
    full = full_shapes(batch_tokens, 600)
    assert {batch.length for batch in made} <= {length for _, length in full} == {256, 600}
    for length in (256, 600):
        sizes = [batch.lines for batch in made if batch.length == length]
        whole = batch_size(batch_tokens, length)
        assert whole & (whole - 1) == 0
        assert all(size & (size - 1) == 0 for size in sizes)
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) - sum(len(b.contents) for b in made if b.length == length) < max(sizes, default=1)


@given(st.integers(1, 63), st.integers(1, 600))
def test_what_is_left_of_a_unit_runs_the_cheapest_way(lines: int, length: int) -> None:
    """Against every way to put the lines into batches of powers of two."""

    def cheapest(left: int) -> int:
        if left <= 0:
            return 0
        return min(
            2**n * length + BATCH_COST + cheapest(left - 2**n) for n in range(7) if 2**n <= left or 2**n < 2 * left
        )

    made = list(batches._sizes(lines, length, 64))
    assert sum(made) >= lines
    if lines < 20:  # the other way takes long
        assert sum(size * length + BATCH_COST for size in made) == cheapest(lines)


def test_lines_with_one_context_need_no_mask_and_come_first() -> None:
    made = batches_of(contexts_of([600] * 5 + [200] * 6), 1200, 600)
    assert [batch.is_packed for batch in made] == [False, False, True, True]


def test_contexts_too_long_for_a_mask_have_lines_of_their_own() -> None:
    made = batches_of(contexts_of([60_000, 16_385, 9_000, 8_000, 100, 90]), 16_384, 65_536)
    assert [(b.lines, b.length, b.is_packed) for b in made] == [
        (1, 65_536, False),
        (1, 24_576, False),
        (1, 16_384, False),
        (1, 8_192, True),
    ]


@pytest.mark.parametrize(("low", "high", "context"), [(20, 101, 1024), (20, 101, 128), (10, 1025, 1024)])
def test_little_of_a_unit_is_padding(low: int, high: int, context: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).integers(low, high, 1000), context).tolist()
    made: list[Batch] = batches_of(contexts_of(lengths), 4096, context)
    assert sum(b.padding for b in made) < 0.05 * sum(b.positions for b in made)
