"""The convolution in one step equals the plain formula, gradients included, whichever way they are taken."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops import reference
from veneer.ops.conv import lora_conv
from veneer.ops.dora import is_far_from_zero
from veneer.ops.geometry import Geometry

CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
WIDE = (2, 9, 11, 3, 1, 1)
"""Samples, inputs, outputs, kernel's size, ranks and groups with which the factors' gradients are taken apart."""


def make(
    samples: int, inputs: int, outputs: int, taps: int, rank: int, groups: int, axes: int = 1, seed: int = 0
) -> list[Tensor]:
    """Return x, W, bias, A, B and a ratio; inputs, outputs and ranks are of one group."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (samples, inputs * groups, *(5,) * axes),
        (outputs * groups, inputs, *(taps,) * axes),
        (outputs * groups,),
        (rank * groups, inputs, *(taps,) * axes),
        (outputs * groups, rank, *(1,) * axes),
        (outputs * groups,),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def geometry_of(axes: int, groups: int, stride: int = 1, padding: int = 1, dilation: int = 1) -> Geometry:
    return Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)


def plainly(
    x: Tensor,
    W: Tensor,
    bias_O: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    ratio_O: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    stride, padding, dilation, groups = geometry

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        return CONVOLVE[x.ndim - 3](x, kernel, None, stride, padding, dilation, groups)

    return reference.lora_conv(x, W, bias_O, A, B, scaling, ratio_O, convolve)


def check(tensors: list[Tensor], geometry: Geometry, *, bias: bool, ratio: bool, frozen: tuple[int, ...] = ()) -> None:
    for place, one in enumerate(tensors):
        one.requires_grad_(place not in frozen)
    x, W, bias_O, A, B, ratio_O = tensors
    given_bias, given_ratio = (bias_O if bias else None), (ratio_O if ratio else None)
    wanted = [one for one in (x, W, given_bias, A, B, given_ratio) if one is not None and one.requires_grad]
    results = []
    for function in (lora_conv, plainly):
        out = function(x, W, given_bias, A, B, 0.7, given_ratio, geometry)
        factors = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
        results.append([out, *torch.autograd.grad((out * factors).sum(), wanted)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@given(
    st.tuples(st.integers(1, 2), *(st.integers(1, 3),) * 4, st.integers(1, 2)),
    st.integers(1, 3),
    st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_reference_with_gradients(sizes, axes, how, bias, ratio, frozen):
    geometry = geometry_of(axes, sizes[-1], *how)
    check(make(*sizes, axes=axes), geometry, bias=bias, ratio=ratio, frozen=(1,) if frozen else ())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize("frozen", [(1,), (0, 1), (1, 3), (1, 4), (1, 5), (1, 2)])
def test_large_frozen_kernels_with_gradients_of_the_factors_apart(axes, bias, ratio, frozen):
    check(make(*WIDE, axes=axes), geometry_of(axes, 1, 2), bias=bias, ratio=ratio, frozen=frozen)


def test_a_ratio_of_zero_has_a_gradient():
    tensors = make(*WIDE)
    tensors[-1][1] = 0.0
    assert not is_far_from_zero(tensors[-1])
    check(tensors, geometry_of(1, 1), bias=True, ratio=True, frozen=(1,))
    assert torch.autograd.grad(lora_conv(*tensors[:5], 0.7, tensors[5], geometry_of(1, 1)).sum(), tensors[5])[0].all()


@pytest.mark.parametrize("sizes", [WIDE, (2, 2, 3, 2, 2, 2)])
def test_gradients_by_differences(sizes):
    tensors = [one.requires_grad_(place != 1) for place, one in enumerate(make(*sizes))]
    geometry = geometry_of(1, sizes[-1])
    assert torch.autograd.gradcheck(lambda *one: lora_conv(*one[:5], 0.5, one[5], geometry), tensors)


@pytest.mark.parametrize("bias", [True, False])
def test_what_comes_behind_may_write_into_the_output(bias):
    """As torch's own convolution lets it: ReLU in place."""
    x, W, bias_O, A, B, ratio = make(*WIDE)
    leaves = [one.requires_grad_() for one in (A, B, ratio)]
    given_bias = bias_O if bias else None
    found = []
    for function in (lora_conv, plainly):
        out = function(x, W, given_bias, A, B, 0.7, ratio, geometry_of(1, 1))
        found.append(torch.autograd.grad(out.relu_().sum(), leaves))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_is_kept_of_the_outputs_size_without_a_ratio():
    x, W, bias_O, A, B, _ = make(*WIDE)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        out = lora_conv(x, W, bias_O, A.requires_grad_(), B.requires_grad_(), 0.7, None, geometry_of(1, 1))
    assert out.shape not in kept
    assert x.shape in kept
