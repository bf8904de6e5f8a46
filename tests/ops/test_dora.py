"""Magnitudes: the norm from the factors is the norm of the sum, the fast layer equals its reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import reference
from veneer.ops.dora import column_dots, dora_linear, magnitude_ratio, product_norm, weight_norm2
from veneer.ops.dropout import Dropout
from veneer.ops.frozen import FrozenWeight
from veneer.ops.projections import Projection, project

sizes = st.integers(1, 7)


def draw(seed: int, *shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@given(sizes, sizes, sizes, st.floats(-3, 3), st.integers(0, 50))
def test_the_norm_from_the_factors_is_the_norm_of_the_sum(inputs, outputs, rank, scaling, seed):
    W, A, B = draw(seed, (outputs, inputs), (rank, inputs), (outputs, rank))
    got = product_norm(weight_norm2(W, (1,)), W @ A.T, A, B, scaling)
    # Where the update nearly cancels the weight, a small difference of large numbers is left.
    size = (W.norm(dim=1) + abs(scaling) * (B @ A).norm(dim=1)).max()
    torch.testing.assert_close(got, reference.product_norm(W, A, B, scaling), rtol=1e-6, atol=1e-7 * size.item())


def test_a_row_that_is_cancelled_stays_zero():
    W = torch.ones(2, 3)
    norm = product_norm(weight_norm2(W, (1,)), W @ W[:1].T, W[:1], -torch.ones(2, 1), 1.0)
    assert norm.tolist() == [0.0, 0.0]
    assert magnitude_ratio(torch.ones(2), norm).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "ratio"), [(300, None), (5, 0.0), (1, None)])
def test_equals_the_reference_with_gradients(with_bias, rows, ratio):
    """Merged or beside the weight; a ratio of zero has a gradient too."""
    *tensors, weights = draw(0, (rows, 3), (4, 3), (4,), (2, 3), (4, 2), (4,), (rows, 4))
    if ratio is not None:
        tensors[5][1] = ratio
    x, W, bias, A, B, ratio_O = (one.requires_grad_() for one in tensors)
    chosen = bias if with_bias else None
    wanted = [x, W, *([bias] if with_bias else []), A, B, ratio_O]
    grads = []
    for function in (dora_linear, reference.dora_linear):
        out = function(x, W, chosen, A, B, 0.7, ratio_O)
        grads.append([out, *torch.autograd.grad((out * weights).sum(), wanted)])
    assert grads[0][-1].all()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_by_differences(rows):
    shapes = (rows, 2), (3, 2), (3,), (2, 2), (3, 2), (3,)
    x, W, bias, A, B, ratio = (one.requires_grad_() for one in draw(1, *shapes))
    assert torch.autograd.gradcheck(lambda *inputs: dora_linear(*inputs[:5], 0.5, inputs[5]), (x, W, bias, A, B, ratio))


def in_panels(W: torch.Tensor, size: int) -> FrozenWeight:
    """A weight that exists a few rows at a time, in memory that the next ones overwrite."""

    def panels(dtype):
        room = torch.empty(size, W.shape[1], dtype=dtype)
        for start in range(0, len(W), size):
            part = W[start : start + size]
            yield slice(start, start + len(part)), room[: len(part)].copy_(part)

    return FrozenWeight(W.shape, panels=panels)


@given(st.integers(1, 40), sizes, sizes, sizes, st.integers(0, 7), st.booleans(), st.booleans(), st.integers(0, 50))
def test_a_frozen_weight_equals_the_reference_with_gradients(rows, inputs, outputs, rank, size, with_bias, drops, seed):
    """Dense or in panels, merged or beside the weight, which the number of rows and dropout decide."""
    shapes = (rows, inputs), (outputs,), (rank, inputs), (outputs, rank), (outputs,)
    W, weights, *tensors = draw(seed, (outputs, inputs), (rows, outputs), *shapes)
    x, bias, A, B, ratio = (one.requires_grad_() for one in tensors)
    ratio.data = ratio.data.sign() * (0.1 + ratio.data.abs())
    bias.requires_grad_(False)
    chosen = bias if with_bias else None
    weight = in_panels(W, size) if size else FrozenWeight(W.shape, W)
    grads = []
    dropout = Dropout(20_000, seed) if drops else None
    left = x if dropout is None else x * dropout.kept(x) * dropout.factor
    expected = ratio * (x @ W.T + reference.lora_delta(left, A, B, 0.7))
    for out in (
        *project(x, [Projection(weight, chosen, (A, B), 0.7, dropout, ratio)]),
        expected if chosen is None else expected + chosen,
    ):
        grads.append([out.detach(), *torch.autograd.grad((out * weights).sum(), [x, A, B, ratio])])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_weight_in_panels_in_sixteen_bits():
    W, x, A, B, ratio = draw(3, (48, 64), (30, 64), (4, 64), (48, 4), (48,))
    ratio = 1 + ratio / 8
    expected = reference.dora_linear(x, W, None, A, B, 0.7, ratio)
    one = Projection(in_panels(W.bfloat16(), 20), None, (A.bfloat16(), B.bfloat16()), 0.7, ratio=ratio)
    (got,) = project(x.bfloat16(), [one])
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


def test_in_sixteen_bits_a_ratio_within_half_a_digit_of_one_counts():
    """Of decoded weights, whose digits are as good as random."""
    W, x, A = draw(4, (64, 256), (200, 256), (1, 256))
    factors, once = (A.bfloat16(), torch.zeros(64, 1).bfloat16()), torch.ones(64)
    found = [
        project(x.bfloat16(), [Projection(in_panels(W, 20), None, factors, ratio=ratio)])[0].double()
        for ratio in (once, once + 1e-3)
    ]
    expected = 1e-3 * (x.bfloat16().double() @ W.T)
    slope = ((found[1] - found[0]) * expected).sum() / expected.square().sum()
    assert 0.8 < slope < 1.2


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 300])
def test_sums_of_products_a_few_rows_at_a_time(rows):
    a, b = draw(2, (rows, 3), (rows, 3))
    torch.testing.assert_close(column_dots(a, b), (a * b).sum(0))
