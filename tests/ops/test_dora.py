"""Magnitudes: the norm from the factors is the norm of the sum, the fast layer equals its reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import reference
from veneer.ops.dora import column_dots, dora_linear, magnitude_ratio, product_norm, weight_norm2

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


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 300])
def test_sums_of_products_a_few_rows_at_a_time(rows):
    a, b = draw(2, (rows, 3), (rows, 3))
    torch.testing.assert_close(column_dots(a, b), (a * b).sum(0))
