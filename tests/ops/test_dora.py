"""Magnitudes: the norm from the factors is the norm of the sum, the fast layer equals its reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import reference
from veneer.ops.dora import dora_linear, magnitude_ratio, product_norm, weight_norm2

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
def test_equals_the_reference_with_gradients(with_bias):
    tensors = draw(0, (5, 3), (4, 3), (4,), (2, 3), (4, 2), (4,), (5, 4))
    x, W, bias, A, B, ratio = (one.requires_grad_() for one in tensors[:6])
    chosen = bias if with_bias else None
    wanted = [x, W, *([bias] if with_bias else []), A, B, ratio]
    grads = []
    for function in (dora_linear, reference.dora_linear):
        out = function(x, W, chosen, A, B, 0.7, ratio)
        grads.append([out, *torch.autograd.grad((out * tensors[6]).sum(), wanted)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_by_differences():
    x, W, bias, A, B, ratio = (one.requires_grad_() for one in draw(1, (3, 2), (3, 2), (3,), (2, 2), (3, 2), (3,)))
    assert torch.autograd.gradcheck(lambda *inputs: dora_linear(*inputs[:5], 0.5, inputs[5]), (x, W, bias, A, B, ratio))
