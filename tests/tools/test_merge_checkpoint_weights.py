"""The fast sum is float64's, every element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.tools import merge_checkpoint_weights as module
from veneer.tools.merge_checkpoint_weights import _target, add_update, converted, plan_update, workers
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
    found = add_update(weight, out, pair, "x", swapped=swapped)
    in_place = weight.clone()
    if weight.dtype == dtype:
        add_update(in_place, in_place, pair, "x", swapped=swapped)
        assert torch.equal(in_place, out)
    return out, expected, found, change


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("stored", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_every_form_gives_float64s_sum_rounded_once(form, stored, dtype, monkeypatch):
    shape_A, shape_B, shape = SHAPES[form]
    pair = LowRank(torch.randn(shape_A), torch.randn(shape_B) * 0.1, 0.7, form.split()[0])
    monkeypatch.setattr(module, "SAMPLED", 1)
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
    with pytest.raises(AdapterError, match="x: the merged weight reaches"):
        add_update(W, W.clone(), LowRank(pair.lora_A, pair.lora_B * 1.01, 1.0), "x")
    for worst in (torch.nan, torch.inf, -torch.inf):
        spoilt, wrong = W.clone(), pair.lora_B.clone()
        spoilt[2, 5] = wrong[2, 0] = worst
        with pytest.raises(AdapterError, match="x: the merged weight is not finite"):
            add_update(spoilt, W.clone(), pair, "x")
        with pytest.raises(AdapterError, match="x: the merged weight is not finite"):
            add_update(W, W.clone(), LowRank(pair.lora_A, wrong, 1.0), "x")


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-8, 1e-3, 1.0])
def test_every_number_of_16_bits_is_added_to_as_float64_does(dtype, scale):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    held = every[every.float().abs() < torch.finfo(dtype).max / 2]
    W = held[: len(held) // 256 * 256].reshape(256, -1).T.contiguous()  # neighbours in columns: rows of all sizes
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(3, 256, generator=generator, dtype=torch.float64)
    B = torch.randn(len(W), 3, generator=generator, dtype=torch.float64) * scale
    out, expected, _, _ = both(W, dtype, LowRank(A, B, 1.0))
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("pieces", [True, False])
def test_values_on_ties_and_a_little_beside_them(dtype, pieces, monkeypatch):
    """Every sum is a tie of two neighbours, or so near that only float64 tells."""
    if pieces:
        monkeypatch.setattr(module, "PIECE", 100)
    bits = torch.randint(0x0500, 0x6000, (64, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(3))
    W = (bits | (torch.arange(32) % 2 * -(2**15)).to(torch.int16)).view(dtype)
    next_up = (W.view(torch.int16) + 1).view(dtype).double()
    half = (next_up - W.double()) / 2
    for beside in (0.0, 2.0**-30, -(2.0**-30), 2.0**-50, -(2.0**-50)):
        # One product for each element: rank 32, the identity.
        pair = LowRank(torch.eye(32, dtype=torch.float64), half * (1 + beside), 1.0)
        out, expected, _, _ = both(W, dtype, pair)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
        assert torch.equal(out, round_once(W.double() + half * (1 + beside), dtype))


@given(st.sampled_from(SIXTEEN), st.integers(0, 2**31), st.data())
def test_factors_of_any_size_that_float32_does_not_hold(dtype, seed, data):
    generator = torch.Generator().manual_seed(seed)
    powers = st.sampled_from((-320, -149, -130, -60, 0, 60, 127, 200, 1000))
    rank = data.draw(st.integers(1, 4))
    A = torch.randn(rank, 12, generator=generator, dtype=torch.float64)
    B = torch.randn(8, rank, generator=generator, dtype=torch.float64)
    for one in range(rank):
        power = data.draw(powers)
        A[one] = torch.ldexp(A[one], torch.tensor(power))
        B[:, one] = torch.ldexp(B[:, one], torch.tensor(-power - data.draw(st.integers(0, 20))))
    W = torch.randn(8, 12, generator=generator).to(dtype)
    W[0] = torch.tensor(data.draw(st.sampled_from((0.0, 1e-5, 6e-8, 1e-38, 300.0)))).to(dtype)
    out, expected, _, _ = both(W, dtype, LowRank(A, B, 1.0))
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("form", [name for name in SHAPES if name != "conv_transpose"])
@pytest.mark.parametrize("piece", [1, 40, 64, 1000])
def test_pieces_are_added_wherever_they_are_cut(form, piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    shape_A, shape_B, shape = SHAPES[form]
    pair = LowRank(torch.randn(shape_A), torch.randn(shape_B) * 0.1, 0.7, form.split()[0])
    out, expected, _, _ = both((torch.randn(shape) * 0.1).bfloat16(), torch.bfloat16, pair, " " in form)
    assert torch.equal(out, expected)


def test_a_piece_is_whole_until_the_call_after_the_next(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8)
    W, pair = torch.randn(6, 8).bfloat16(), LowRank(torch.randn(2, 8), torch.randn(6, 2), 1.0)
    update = plan_update(W.shape, W.dtype, W.dtype, pair, "x")
    first = update.add(W[0], 0)
    kept = first.clone()
    second = update.add(W[1], 8)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()


def test_an_update_of_zero_leaves_every_bit():
    W = torch.randn(5, 7).bfloat16()
    out, _, found, _ = both(W, W.dtype, LowRank(torch.zeros(2, 7), torch.zeros(5, 2), 1.0))
    assert torch.equal(out, W)
    assert found.largest == 0


def test_a_magnitude_goes_the_exact_way():
    W, A, B = torch.randn(6, 8).bfloat16(), torch.randn(2, 8), torch.randn(6, 2)
    out, expected, _, _ = both(W, W.dtype, LowRank(A, B, 1.0, magnitude=torch.rand(6)))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("sampled", "near"), [(1, 1e-4), (8, 0.3)])
def test_what_a_look_at_some_of_it_finds_is_near_what_all_of_it_gives(monkeypatch, sampled, near):
    monkeypatch.setattr(module, "SAMPLED", sampled)
    monkeypatch.setattr(module, "PIECE", 2000)
    pair = LowRank(torch.randn(2, 50), torch.randn(4000, 2) * 0.01, 1.0)
    _, _, found, change = both(torch.randn(4000, 50).bfloat16(), torch.bfloat16, pair)
    assert found.rounding_loss == pytest.approx(change.rounding_loss, rel=near)
    assert found.unchanged == pytest.approx(change.unchanged, rel=near)
    assert found.relative == pytest.approx(change.relative, rel=near)
    assert found.largest == pytest.approx(change.largest, rel=max(near, 0.6 * (sampled > 1)))
    assert found.largest <= change.largest * (1 + 1e-5)


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
