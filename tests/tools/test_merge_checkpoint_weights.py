"""The fast sum is float64's, every element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.tools import merge_checkpoint_weights as module
from veneer.tools.merge_checkpoint_weights import _target, _unlike, add_update, converted, workers
from veneer.tools.merge_weights import merge_weight, round_once

SHAPES = {  # form: shapes of A, B and of the weight
    "linear": ((4, 30), (21, 4), (21, 30)),
    "transposed": ((4, 30), (21, 4), (30, 21)),
    "embedding": ((4, 30), (21, 4), (30, 21)),
    "conv": ((4, 5, 3, 3), (6, 2, 1, 1), (6, 5, 3, 3)),
    "conv_transpose": ((4, 5, 3), (6, 2, 1), (10, 3, 3)),
    "experts": ((3, 2, 8), (3, 6, 2), (3, 6, 8)),
    "experts stored (E, I, O)": ((3, 2, 8), (3, 6, 2), (3, 8, 6)),
}
SIXTEEN = (torch.bfloat16, torch.float16)


def both(weight, dtype, pair, swapped=False):
    """What add_update writes, and what merge_weight does."""
    expected, out = torch.empty(weight.shape, dtype=dtype), torch.empty(weight.shape, dtype=dtype)
    views = (weight.mT, expected.mT) if swapped else (weight, expected)
    change = merge_weight(*views, nn.Module(), _target("x", pair), pair)
    with workers(2) as pool:
        found = add_update(weight, out, pair, "x", pool, swapped=swapped)
        in_place = weight.clone()
        if weight.dtype == dtype:
            add_update(in_place, in_place, pair, "x", pool, swapped=swapped)
            assert torch.equal(in_place, out)
    return out, expected, found, change


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("stored", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_every_form_gives_float64s_sum_rounded_once(form, stored, dtype):
    shape_A, shape_B, shape = SHAPES[form]
    pair = LowRank(torch.randn(shape_A), torch.randn(shape_B) * 0.1, 0.7, form.split()[0])
    out, expected, found, change = both((torch.randn(shape) * 0.1).to(stored), dtype, pair, " " in form)
    assert torch.equal(out, expected)
    assert found.largest == pytest.approx(change.largest, rel=1e-5)
    assert found.relative == pytest.approx(change.relative, rel=1e-5)


@given(
    st.sampled_from(SIXTEEN),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(-20, 3),
    st.integers(0, 2**31),
)
def test_the_sum_is_float64s_whatever_the_sizes_and_scales(dtype, factors, rows, columns, rank, power, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator).to(dtype)
    A = torch.randn(rank, columns, generator=generator).to(factors)
    B = (torch.randn(rows, rank, generator=generator) * 2.0**power).to(factors)
    out, expected, _, _ = both(W, dtype, LowRank(A, B, 0.37))
    assert torch.equal(out, expected)


def test_the_scaling_is_applied_to_the_product_as_the_reference_does():
    """0.61328125 + 0.37 · b · a lies on a tie or beside it, as the scaling is applied to the product or to b."""
    generator = torch.Generator().manual_seed(39)
    W = torch.randn(39, 39, generator=generator).bfloat16()
    A = torch.randn(1, 39, generator=generator).bfloat16()
    B = (torch.randn(39, 1, generator=generator) * 4).bfloat16()
    after, before = W.double() + 0.37 * (B.double() @ A.double()), W.double() + (0.37 * B.double()) @ A.double()
    assert not torch.equal(round_once(after, torch.bfloat16), round_once(before, torch.bfloat16))
    out, expected, _, _ = both(W, torch.bfloat16, LowRank(A, B, 0.37))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_sums_beside_a_tie_go_where_float64_says(dtype):
    # 1 + half a unit is the tie; the update is it, just below it, and just above it by less than float32 shows.
    half = torch.finfo(dtype).eps / 2
    tiny = torch.tensor([0.0, 2**-40, -(2**-40), 2**-30, -(2**-30), 2**-24, -(2**-24)], dtype=torch.float64)
    B = torch.stack([torch.full_like(tiny, half), tiny], 1)
    pair = LowRank(torch.ones(2, 8, dtype=torch.float64), B, 1.0)
    out, expected, _, _ = both(torch.ones(7, 8, dtype=dtype), dtype, pair)
    assert torch.equal(out, expected)
    assert (out[1] > 1).all()
    assert (out[2] == 1).all()
    assert torch.equal(out[:, 0], round_once(1 + half + tiny, dtype))


def test_the_sum_in_float32_alone_would_not_do():
    W, A, B = (torch.randn(200, 400) * 0.02).half(), torch.randn(8, 400), torch.randn(200, 8) * 0.01
    out, expected, _, _ = both(W, torch.float16, LowRank(A, B, 1.0))
    assert torch.equal(out, expected)
    assert not torch.equal((W.float() + B @ A).half(), expected)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_values_out_of_range_are_refused_and_those_just_within_are_not(dtype):
    most = torch.finfo(dtype).max
    W = torch.full((4, 8), most / 2, dtype=torch.float64).to(dtype)
    pair = LowRank(torch.ones(1, 8), torch.full((4, 1), most / 2), 1.0)
    out, expected, _, _ = both(W, dtype, pair)
    assert torch.equal(out, expected)
    with workers(1) as pool, pytest.raises(AdapterError, match="x: the merged weight reaches"):
        add_update(W, W.clone(), LowRank(pair.lora_A, pair.lora_B * 1.01, 1.0), "x", pool)
    with workers(1) as pool, pytest.raises(AdapterError, match="x: the merged weight is not finite"):
        add_update(torch.full_like(W, torch.nan), W.clone(), pair, "x", pool)


def test_an_update_of_zero_leaves_every_bit():
    W = torch.randn(5, 7).bfloat16()
    out, _, found, _ = both(W, W.dtype, LowRank(torch.zeros(2, 7), torch.zeros(5, 2), 1.0))
    assert torch.equal(out, W)
    assert found.largest == 0


def test_a_magnitude_and_lower_precision_of_products_go_the_exact_way():
    W, A, B = torch.randn(6, 8).bfloat16(), torch.randn(2, 8), torch.randn(6, 2)
    out, expected, _, _ = both(W, W.dtype, LowRank(A, B, 1.0, magnitude=torch.rand(6)))
    assert torch.equal(out, expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        out, expected, _, _ = both(W, W.dtype, LowRank(A, B, 1.0))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(out, expected)


def test_what_rounding_lost_is_what_a_look_at_all_of_it_gives(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 1)
    pair = LowRank(torch.randn(2, 50), torch.randn(40, 2) * 0.001, 1.0)
    _, _, found, change = both(torch.randn(40, 50).bfloat16(), torch.bfloat16, pair)
    assert found.rounding_loss == pytest.approx(change.rounding_loss, rel=1e-4)
    assert found.unchanged == pytest.approx(change.unchanged, abs=1e-3)


@pytest.mark.parametrize("columns", [3, 4, 8])
def test_numbers_that_differ_are_found(columns):
    low = torch.zeros(5, columns, dtype=torch.bfloat16)
    high = low.clone()
    high[1, 2], high[4, 0] = 1, 2
    assert [tuple(one.tolist()) for one in _unlike(low, high)] == [(1, 4), (2, 0)]


def test_conversion_rounds_once_and_refuses_what_does_not_fit():
    values = torch.randn(1000, dtype=torch.float64)
    assert torch.equal(converted(values, torch.bfloat16, "x"), round_once(values, torch.bfloat16))
    with pytest.raises(AdapterError, match=r"x: reaches 1e\+06, and torch.float16 ends at 65504"):
        converted(torch.tensor([1e6]), torch.float16, "x")
    assert converted(torch.tensor([torch.inf]), torch.float16, "x").isinf().all()


def test_the_callers_threads_are_as_before():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), workers(2):
        _ = 1 / 0
    assert torch.get_num_threads() == before
