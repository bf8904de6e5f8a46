"""Convolutions on matrix tiles are float32's: as near to the exact one as torch's, whatever the geometry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import conv_tiles, tiles
from veneer.ops.conv import lora_conv
from veneer.ops.geometry import Geometry

pytestmark = pytest.mark.skipif(
    not tiles.has_tiles(), reason="the processor has no matrix tiles, or no C compiler is there"
)
ONCE = Geometry((1, 1), (1, 1), (1, 1), 1)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(samples, channels, outputs, sizes, taps, geometry, *, with_bias=True):
    """Both ways against float64, where torch's own float32 may be a third as far off."""
    x, kernel = drawn(samples, channels, *sizes), drawn(outputs, channels, *taps, seed=1)
    bias = drawn(outputs, seed=2) if with_bias else None
    exact = geometry.convolve(x.double(), kernel.double(), None if bias is None else bias.double())
    near(conv_tiles.convolve(x, kernel, bias, geometry), geometry.convolve(x, kernel, bias), exact)
    if max(geometry.stride) == 1:
        dy = drawn(*exact.shape, seed=3)
        exact = geometry.input_gradient(dy.double(), x.double(), kernel.double())
        found = conv_tiles.convolve(dy, kernel, None, geometry, turned=True)
        near(found, geometry.input_gradient(dy, x, kernel), exact)


def near(found, torchs, exact):
    assert found.shape == exact.shape
    allowed = 3 * (torchs.double() - exact).abs().mean() + 1e-6 * exact.abs().mean()
    assert (found.double() - exact).abs().mean() <= allowed
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@given(
    st.tuples(st.integers(1, 3), st.sampled_from((1, 3, 31, 33, 70)), st.sampled_from((1, 15, 17, 33, 70))),
    st.lists(
        st.tuples(st.integers(5, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_exact_convolution_as_nearly_as_torch(channels, axes, strides, with_bias):
    if len(axes) == 3:  # a plane will do
        axes = [(min(size, 9), *rest) for size, *rest in axes]
    sizes, taps, stride, padding, dilation = zip(*axes, strict=True)
    geometry = Geometry(stride if strides else (1,) * len(axes), padding, dilation, 1)
    check(*channels, sizes, taps, geometry, with_bias=with_bias)


@pytest.mark.parametrize(
    ("samples", "channels", "outputs", "sizes", "taps"),
    [
        (1, 64, 32, (40_000,), (3,)),
        (1, 1024, 1000, (600,), (3,)),
        (1, 320, 64, (64, 64), (3, 3)),
        (1, 64, 64, (12, 40, 40), (3, 3, 3)),
        (2, 64, 64, (3, 400), (1, 9)),
    ],
    ids=["a long line", "a kernel that is not held at once", "many strips", "planes", "few lines"],
)
def test_more_than_fits_at_a_time(samples, channels, outputs, sizes, taps):
    check(samples, channels, outputs, sizes, taps, Geometry(*((n,) * len(sizes) for n in (1, 1, 1)), 1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_sample_depends_on_its_own_numbers_alone_however_many_threads(turned):
    x, kernel, before = drawn(5, 64, 20, 33), drawn(64, 64, 3, 3, seed=1), torch.get_num_threads()
    whole = conv_tiles.convolve(x, kernel, None, ONCE, turned=turned)
    assert torch.equal(conv_tiles.convolve(x[3:], kernel, None, ONCE, turned=turned), whole[3:])
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(conv_tiles.convolve(x, kernel, None, ONCE, turned=turned), whole)
    finally:
        torch.set_num_threads(before)


def test_no_number_is_quietly_made_one():
    x = drawn(1, 64, 32, 32)
    x[0, 5, 10, 20] = torch.nan
    found = conv_tiles.convolve(x, drawn(64, 64, 3, 3, seed=1), None, ONCE)
    assert found[0, :, 9:12, 19:22].isnan().all()
    assert found.isnan().sum() == 64 * 9


def taken(x, kernel, geometry=ONCE, **how):
    return conv_tiles.convolves(x, kernel, geometry, **how)


def test_takes_what_fills_the_tiles_and_no_other():
    x, kernel = drawn(4, 64, 32, 32), drawn(96, 64, 3, 3)
    assert taken(x, kernel)
    assert taken(drawn(4, 96, 32, 32), kernel, turned=True)
    assert taken(x, kernel, ONCE._replace(stride=(2, 2)))
    assert not taken(x, kernel, ONCE._replace(stride=(2, 2)), turned=True)
    assert not taken(x, kernel, ONCE._replace(groups=2))
    assert not taken(x.double(), kernel.double())
    assert not taken(x.contiguous(memory_format=torch.channels_last), kernel)
    assert not taken(x, kernel.contiguous(memory_format=torch.channels_last))
    assert not taken(x[:, :40].contiguous(), kernel[:, :40].contiguous())
    assert not taken(x[..., :8].contiguous(), kernel)
    assert not taken(x[:0], kernel)
    assert not taken(x[:1, :, :7].contiguous(), kernel)
    assert not taken(x.clone().requires_grad_(), kernel)
    with torch.no_grad():
        assert taken(x.clone().requires_grad_(), kernel)


@pytest.mark.parametrize("ratio", [True, False])
def test_an_adapted_convolution_is_computed_on_tiles_where_no_bit_must_stay(ratio, monkeypatch):
    seen = []
    convolve = conv_tiles.convolve
    monkeypatch.setattr(conv_tiles, "convolve", lambda *given, **how: (seen.append(how), convolve(*given, **how))[1])
    x, W, A, B = drawn(4, 64, 32, 32), drawn(64, 64, 3, 3, seed=1), drawn(4, 64, 3, 3, seed=2), torch.zeros(64, 4, 1, 1)
    leaves = [one.requires_grad_() for one in (x, A, B, torch.ones(64))]
    out = lora_conv(x, W, None, A, B, 0.5, leaves[-1] if ratio else None, ONCE)
    plain = ONCE.convolve(x, W)
    if ratio:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(out, plain)
    out.backward(torch.ones_like(out))
    assert seen == ([{}] if ratio else []) + [{"turned": True}]
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain.sum(), x)[0], rtol=1e-4, atol=1e-3)
