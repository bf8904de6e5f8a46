"""Singular values of a module's update, from its factors alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.tools.spectrum import Spectrum, spectrum


def pair(outs: int, ins: int, rank: int, scaling: float = 1.0, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, ins, generator=generator), torch.randn(outs, rank, generator=generator), scaling)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(-3, 3), st.integers(0, 99))
def test_they_are_those_of_the_delta(outs, ins, rank, scaling, seed):
    one = pair(outs, ins, rank, scaling, seed)
    found, expected = spectrum(one), torch.linalg.svdvals(one.delta())
    assert len(found.values) == min(outs, ins, rank)
    assert list(found.values) == pytest.approx(expected[: len(found.values)].tolist(), rel=1e-9, abs=1e-9)
    assert found.norm == pytest.approx(torch.linalg.norm(one.delta()).item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("experts", ((3, 2, 5), (3, 4, 2))),
        ("conv", ((4, 3, 3, 3), (6, 2, 1, 1))),
        ("conv_transpose", ((2, 3, 3), (4, 2, 1))),
        ("embedding", ((2, 9), (4, 2))),
    ],
)
def test_of_stacks_they_are_those_of_every_matrix(form, shapes):
    A, B = (torch.randn(shape) for shape in shapes)
    one = LowRank(A, B, 0.5, form)
    found = spectrum(one)
    assert found.norm == pytest.approx(one.delta().norm().item(), rel=1e-9)
    if form == "experts":
        each = torch.cat([torch.linalg.svdvals(delta)[:2] for delta in one.delta()]).sort(descending=True).values
        assert list(found.values) == pytest.approx(each.tolist(), rel=1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_both_ranks_lie_between_one_and_the_count(values):
    one = Spectrum(tuple(values))
    assert 1 - 1e-9 <= one.stable_rank <= one.effective_rank * (1 + 1e-9) <= len(values) * (1 + 1e-9)
    assert one.rank_for(1 - 1e-12) <= len(values)
    kept = sorted(values, reverse=True)[: one.rank_for(0.9)]
    assert math.fsum(value**2 for value in kept) >= 0.9 * math.fsum(value**2 for value in values) * (1 - 1e-9)


def test_equal_values_count_whole_and_zeros_do_not():
    one = Spectrum((2.0, 2.0, 2.0, 0.0))
    assert (one.stable_rank, one.effective_rank) == pytest.approx((3, 3))
    assert (one.used, one.rank_for(0.99)) == (3, 3)
    nothing = Spectrum((0.0, 0.0))
    assert (nothing.norm, nothing.stable_rank, nothing.effective_rank, nothing.used, nothing.rank_for(0.9)) == (0,) * 5
    tiny = Spectrum((3e-200, 3e-200))  # squares of it are zero
    assert tiny.effective_rank == pytest.approx(2)


def test_products_out_of_range_are_a_typed_error():
    huge = torch.full((1, 2), 1e300, dtype=torch.float64)
    with pytest.raises(AdapterError, match="leave the range"):
        spectrum(LowRank(huge, huge.T.contiguous(), 1.0))
