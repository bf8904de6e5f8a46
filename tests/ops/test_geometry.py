"""A geometry knows the sizes of what torch computes with it, and how to go back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops.geometry import Geometry

axes = st.lists(
    st.tuples(st.integers(5, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)),
    min_size=1,
    max_size=3,
)


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(axes, st.integers(1, 2))
def test_sizes_and_gradients_are_those_of_torch(axes, groups):
    sizes, taps, *how = zip(*axes, strict=True)
    geometry = Geometry(*how, groups)
    x, kernel = drawn((2, 2 * groups, *sizes)).requires_grad_(), drawn((3 * groups, 2, *taps), 1).requires_grad_()
    out = geometry.convolve(x, kernel)
    assert out.shape[2:] == geometry.places(sizes, taps)
    dy = drawn(out.shape, 2)
    dx, dkernel = torch.autograd.grad(out, (x, kernel), dy)
    torch.testing.assert_close(geometry.input_gradient(dy, x, kernel), dx)
    torch.testing.assert_close(geometry.kernel_gradient(dy, x, kernel), dkernel)


@given(axes)
def test_a_kernel_turned_round_gives_the_gradient_of_the_input(axes):
    sizes, taps, _, padding, dilation = zip(*axes, strict=True)
    padding = tuple(
        min(one) for one in zip(padding, (d * (t - 1) for d, t in zip(dilation, taps, strict=True)), strict=True)
    )
    geometry = Geometry((1,) * len(sizes), padding, dilation, 1)
    x, kernel = drawn((2, 2, *sizes)), drawn((3, 2, *taps), 1)
    dy = drawn((2, 3, *geometry.places(sizes, taps)), 2)
    turned = kernel.transpose(0, 1).flip(tuple(range(2, kernel.ndim)))
    torch.testing.assert_close(geometry.turned(taps).convolve(dy, turned), geometry.input_gradient(dy, x, kernel))
