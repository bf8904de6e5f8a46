"""Convolutions on matrix tiles are torch's, gradients of the input included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import conv_tiles, tiles
from veneer.ops.conv import Geometry

needs_tiles = pytest.mark.skipif(
    not tiles.has_tiles(), reason="the processor has no matrix tiles, or no C compiler is there"
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def tasks(draw):
    """An input, a kernel, padding and dilation, in one to three directions."""
    axes = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    least = [
        max(1, apart * (size - 1) + 1 - 2 * more) for apart, size, more in zip(dilation, kernel, padding, strict=True)
    ]
    sizes = [draw(st.integers(one, one + (60 if axes == 1 else 9))) for one in least]
    inputs, outputs, samples = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    return drawn(samples, inputs, *sizes), drawn(outputs, inputs, *kernel, seed=1), padding, dilation


@needs_tiles
@given(tasks())
def test_equals_torchs(task):
    x, kernel, padding, dilation = task
    geometry = Geometry((1,) * len(padding), padding, dilation, 1)
    exact = geometry.convolve(x.double(), kernel.double())
    found = conv_tiles.convolve(x, kernel, padding, dilation)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * kernel[0].numel())


@needs_tiles
@pytest.mark.parametrize("padding", [(1, 1), (0, 2), (2, 0), (3, 3)])
def test_gradient_of_the_input(padding, monkeypatch):
    x, kernel = drawn(2, 64, 12, 13), drawn(80, 64, 3, 3, seed=1)
    geometry, wide = (Geometry((1, 1), padding, (1, 1), 1) for _ in range(2))
    dy = drawn(*geometry.convolve(x, kernel).shape, seed=2)
    exact = wide.input_gradient(dy.double(), x.double(), kernel.double())
    called = []
    own = conv_tiles.convolve
    monkeypatch.setattr(conv_tiles, "convolve", lambda *given: called.append(1) or own(*given))
    found = geometry.input_gradient(dy, x, kernel)
    assert len(called) == (max(padding) <= 2)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


@needs_tiles
def test_what_is_torchs_stays_so():
    x, kernel = drawn(2, 64, 12, 12), drawn(64, 64, 3, 3, seed=1)
    fits = conv_tiles.convolves
    assert fits(x, kernel, (1, 1), (1, 1))
    assert not fits(x.double(), kernel.double(), (1, 1), (1, 1))
    assert not fits(x, kernel[:63], (1, 1), (1, 1))
    assert not fits(x, kernel, (-1, 1), (1, 1))
    assert not fits(x[:, :, :6, :6], kernel, (0, 0), (1, 1)), "sixteen places"
    assert not fits(x[:, :, :2], kernel, (0, 0), (1, 1))
    assert not fits(x.clone().requires_grad_(), kernel, (1, 1), (1, 1))
    assert not fits(drawn(2, 64, 300, 3), kernel, (1, 1), (1, 1)), "two thirds more places than outputs"
    dy = drawn(2, 64, 6, 6)
    strided = Geometry((2, 2), (1, 1), (1, 1), 1)
    torch.testing.assert_close(
        strided.input_gradient(dy, x, kernel).double(),
        strided.input_gradient(dy.double(), x.double(), kernel.double()),
        rtol=1e-4,
        atol=1e-3,
    )
