"""Order of examples and cutting of batches: every index once, limits kept, by the step alone."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.batching import (
    GROUP_TOKENS,
    Example,
    batch_indices,
    collate,
    cut_by_length,
    cyclic_indices,
    epoch_order,
    micro_batches,
    pad,
)
from fastrlhf.models import IGNORE

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def size_of(lengths: list[int], padded: bool) -> int:
    """What a group of these lengths counts as."""
    return max(lengths) * len(lengths) if padded else sum(lengths)


@given(
    lengths=LENGTHS,
    max_tokens=st.integers(1, 200),
    overhead=st.integers(0, 100),
    padded=st.booleans(),
)
def test_a_cut_by_length_covers_each_index_once_within_the_limit(
    lengths: list[int], max_tokens: int, overhead: int, padded: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GROUP_TOKENS, "cpu", overhead)
        groups = cut_by_length(lengths, max_tokens, "cpu", padded=padded)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert size_of([lengths[i] for i in group], padded) <= max_tokens or len(group) == 1
    # Like lengths stand together: the groups' ranges of lengths do not overlap.
    sizes = [[lengths[i] for i in group] for group in groups]
    assert all(min(a) >= max(b) for a, b in pairwise(sizes))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    max_tokens=st.integers(1, 200),
    overhead=st.integers(0, 100),
    padded=st.booleans(),
)
def test_no_other_cut_costs_less(
    lengths: list[int], max_tokens: int, overhead: int, padded: bool
) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(size_of(group, padded) + overhead for group in groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GROUP_TOKENS, "cpu", overhead)
        found = cut_by_length(lengths, max_tokens, "cpu", padded=padded)
    ordered = sorted(lengths, reverse=True)
    every = [
        [ordered[a:b] for a, b in pairwise((0, *inner, len(ordered)))]
        for n in range(len(ordered))
        for inner in combinations(range(1, len(ordered)), n)
    ]
    allowed = [
        groups
        for groups in every
        if all(len(group) == 1 or size_of(group, padded) <= max_tokens for group in groups)
    ]
    assert cost([[lengths[i] for i in group] for group in found]) == min(map(cost, allowed))


@given(n=st.integers(0, 50), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_fix(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == epoch_order(n, seed, epoch)).all()


def test_other_epochs_and_seeds_have_other_orders() -> None:
    orders = {tuple(epoch_order(30, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 12),
    epoch=st.integers(0, 3),
    window=st.integers(1, 4),
)
def test_batches_of_an_epoch(lengths: list[int], batch_size: int, epoch: int, window: int) -> None:
    batches = batch_indices(lengths, batch_size, 7, epoch, window)
    flat = [int(i) for batch in batches for i in batch]
    assert len(set(flat)) == len(flat)
    if len(lengths) < batch_size:
        assert sorted(flat) == list(range(len(lengths)))
    else:
        assert len(batches) == len(lengths) // batch_size
        assert {len(batch) for batch in batches} == {batch_size}
    again = batch_indices(lengths, batch_size, 7, epoch, window)
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


def test_a_window_sorts_by_length_what_is_batched_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 256).tolist()

    def padding(window: int) -> int:
        batches = batch_indices(lengths, 16, 0, 0, window)
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert padding(16) < padding(1) / 5
    # The batches themselves are shuffled: short ones do not all come first.
    longest = [max(lengths[i] for i in b) for b in batch_indices(lengths, 16, 0, 0, 16)]
    assert longest != sorted(longest)


@given(n=st.integers(1, 20), count=st.integers(1, 30), steps=st.integers(1, 6))
def test_cyclic_indices_go_round_and_round(n: int, count: int, steps: int) -> None:
    drawn = [i for step in range(steps) for i in cyclic_indices(n, count, step, seed=3)]
    assert len(drawn) == count * steps
    for first in range(0, len(drawn), n):
        one_round = drawn[first : first + n]
        assert len(set(one_round)) == len(one_round)  # no item twice before all had their turn
        assert one_round == epoch_order(n, 3, first // n)[: len(one_round)].tolist()


def test_cyclic_indices_of_nothing() -> None:
    assert cyclic_indices(0, 5, 0, 0) == []
    assert cyclic_indices(5, 0, 0, 0) == []


def test_pad_on_the_right() -> None:
    padded, lengths = pad([[1, 2, 3], [4]], 9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths.tolist() == [3, 1]
    assert padded.dtype == lengths.dtype == torch.int64


def test_collate_asks_for_what_stands_from_the_start_on() -> None:
    examples = [Example((5, 6, 7, 8), start=2), Example((5, 6)), Example((3, 4, 2), start=3)]
    input_ids, labels = collate(examples, pad_id=0)
    assert input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0], [3, 4, 2, 0]]
    no = IGNORE
    assert labels.tolist() == [[no, no, 7, 8], [no, 6, no, no], [no, no, no, no]]
    assert [e.targets for e in examples] == [2, 1, 0]


def test_the_first_token_is_never_predicted() -> None:
    _, labels = collate([Example((5, 6), start=0)], pad_id=0)
    assert labels.tolist() == [[IGNORE, 6]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 8, 1000])
def test_micro_batches_hold_each_example_once(max_tokens: int, packed: bool) -> None:
    examples = [Example(tuple(range(1, n + 2))) for n in (3, 1, 7, 2)]
    seen = {}
    for indices, input_ids, labels in micro_batches(examples, max_tokens, pad_id=0, packed=packed):
        for row, index in enumerate(indices):
            n = len(examples[index].tokens)
            assert tuple(input_ids[row, :n].tolist()) == examples[index].tokens
            seen[index] = int((labels[row] != IGNORE).sum())
    assert seen == {i: e.targets for i, e in enumerate(examples)}
