"""Order and packing are pure functions; every row stands exactly once."""

import time
from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batches import epoch_steps, make_batch, pack, row_order
from veneer.data.encode import EncodedRow

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths, st.integers(0, 9), st.integers(0, 3), st.integers(1, 200), st.integers(1, 100))
def test_each_row_once_within_the_budgets_and_the_same_each_time(lengths, seed, epoch, per_step, per_micro):
    budgets = {"tokens_per_step": per_step, "tokens_per_micro_batch": per_micro}
    steps = epoch_steps(lengths, seed=seed, epoch=epoch, **budgets)
    assert steps == epoch_steps(lengths, seed=seed, epoch=epoch, **budgets)
    assert Counter(row for step in steps for micro in step for row in micro) == Counter(range(len(lengths)))
    for step in steps:
        assert step
        for micro in step:
            assert sum(lengths[row] for row in micro) <= per_micro or len(micro) == 1
        total = sum(lengths[row] for micro in step for row in micro)
        assert total <= per_step + max(lengths)


@given(lengths, st.integers(0, 9), st.integers(1, 200), st.integers(1, 100))
def test_steps_are_those_of_the_plain_loop(lengths, seed, per_step, per_micro):
    order = row_order(len(lengths), seed, 2)
    total = sum(lengths)
    num_steps = -(-total // per_step)
    plain, before = [[] for _ in range(num_steps)], 0
    for row in order:
        plain[int((before + lengths[row] / 2) * num_steps / total)].append(row)
        before += lengths[row]
    expected = [pack(rows, lengths, per_micro) for rows in plain if rows]
    budgets = {"tokens_per_step": per_step, "tokens_per_micro_batch": per_micro}
    assert epoch_steps(np.array(lengths), seed=seed, epoch=2, **budgets) == expected


def test_the_steps_of_a_million_rows_take_seconds():
    lengths = np.random.default_rng(0).integers(20, 600, 1_000_000)
    start = time.perf_counter()
    steps = epoch_steps(lengths, seed=0, epoch=0, tokens_per_step=8192, tokens_per_micro_batch=4096)
    assert time.perf_counter() - start < 20  # about one second, on a machine that does nothing else
    assert sum(len(micro) for step in steps for micro in step) == 1_000_000


@given(st.integers(1, 50), st.integers(0, 5))
def test_epochs_and_seeds_give_other_orders(rows, seed):
    assert sorted(row_order(rows, seed, 0)) == list(range(rows))
    if rows > 20:
        assert len({tuple(row_order(rows, seed + s, e)) for s in range(2) for e in range(2)}) == 4


@given(lengths, st.integers(1, 100))
def test_packing_is_no_worse_than_twice_the_least(lengths, budget):
    bins = pack(range(len(lengths)), lengths, budget)
    total = sum(min(length, budget) for length in lengths)
    assert len(bins) <= max(1, 2 * -(-total // budget))
    assert all([-lengths[row] for row in one] == sorted(-lengths[row] for row in one) for one in bins)


def test_a_batch_keeps_rows_apart():
    rows = [
        EncodedRow("a:1", torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([False, False, True])),
        EncodedRow("a:2", torch.tensor([8, 9], dtype=torch.int32), torch.tensor([False, True])),
    ]
    batch = make_batch(rows)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    places, targets = batch.predictions()
    assert (places.tolist(), targets.tolist()) == ([1, 3], [7, 9])
