"""Rotary positions equal their reference; their backward turns back."""

import pytest
import torch

from veneer.ops import reference
from veneer.ops.rotary import rotate


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("turning", [8, 4, 2])
def test_equals_its_reference_with_gradient(turning):
    """Any cosines and sines, halves that differ too: the formula says nothing about angles."""
    cos, sin, slope = draw(5, turning), draw(5, turning) * 2, draw(5, 3, 8)
    found = []
    for function in (reference.rotate, rotate):
        x = draw(5, 3, 8).requires_grad_()
        out = function(x, cos, sin)
        out.backward(slope)
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0])


def test_takes_strided_heads_and_gives_contiguous_ones():
    x = draw(3, 5, 8).transpose(0, 1)
    cos, sin = draw(5, 8), draw(5, 8)
    out = rotate(x, cos, sin)
    assert out.is_contiguous()
    torch.testing.assert_close(out, reference.rotate(x, cos, sin))


def test_nothing_of_the_size_of_its_input_is_kept():
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotate(draw(5, 3, 8).requires_grad_(), draw(5, 8), draw(5, 8))
    assert [tuple(one.shape) for one in saved] == [(5, 8), (5, 8)]
