"""What is dropped is the same whenever it is asked, and as much as was asked for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.dropout import Dropout, draw_dropout


@given(
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(1, 65535),
    st.integers(0, 2**62),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_it_is_the_same_each_time_in_any_dtype_and_has_the_shape(rows, inputs, level, seed, dtype):
    x = torch.empty(rows, inputs, dtype=dtype)
    kept = Dropout(level, seed).kept(x)
    assert (kept.shape, kept.dtype) == (x.shape, dtype)
    assert torch.equal(kept.double(), Dropout(level, seed).kept(x.double()))
    assert set(kept.flatten().tolist()) <= {0.0, 1.0}


def test_the_callers_random_numbers_and_threads_make_no_difference():
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        found.append(Dropout(9_000, seed=5).kept(torch.empty(300, 70)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("probability", [1 / 65536, 0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_were_asked_for(probability):
    count = 1 << 20
    once = draw_dropout(probability)
    dropped = count - int(once.kept(torch.empty(count)).sum())
    assert abs(dropped - count * probability) <= 6 * math.sqrt(count * probability * (1 - probability))
    assert once.factor == pytest.approx(1 / (1 - probability), rel=1e-4)


def test_places_of_a_draw_and_calls_do_not_depend_on_each_other():
    torch.manual_seed(0)
    first, second = (draw_dropout(0.5).kept(torch.empty(1 << 18, 4)).double() - 0.5 for _ in range(2))
    columns = torch.cat([first, second], 1)
    together = (columns.T @ columns).div_(len(columns)).fill_diagonal_(0)
    assert together.abs().max() <= 6 * 0.25 / math.sqrt(len(columns))


def test_seeds_come_from_torchs_random_numbers():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(draw_dropout(0.1))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("probability", "level"), [(0.0, 0), (1e-9, 1), (0.25, 16384), (1 - 1e-9, 65535)])
def test_nothing_but_zero_is_never_and_nothing_is_always(probability, level):
    assert draw_dropout(probability).level == level
    assert bool(Dropout(0, 3).kept(torch.empty(1000)).all())
