"""Int8 linear layers: the rounding, the products, and what a module has to survive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.errors import BaseModelError, ConfigError
from veneer.storage.int8 import Int8Linear, quantise_int8, read_int8, write_int8
from veneer.storage.rounding import exact_scale

sizes = st.integers(1, 70)
magnitudes = st.sampled_from([1e-38, 1e-30, 1.0, 1e4, 1e38])


def linear(inputs: int, outputs: int, seed: int = 0, magnitude: float = 1.0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(outputs, inputs, generator=generator).sub_(0.5).mul_(magnitude))
    return layer


def scales(layer: Int8Linear) -> torch.Tensor:
    return layer.scale_bits_O.view(torch.float32)


@given(sizes, sizes, st.integers(0, 99), magnitudes)
def test_each_weight_is_within_half_a_scale(inputs, outputs, seed, magnitude):
    layer = linear(inputs, outputs, seed, magnitude)
    quantised = quantise_int8(layer)
    error = (read_int8(quantised).double() - layer.weight.double()).abs()
    assert (error <= scales(quantised).double()[:, None] / 2 * (1 + 1e-5)).all()
    expected = exact_scale(layer.weight.abs().amax(1)).double()
    absmax = layer.weight.abs().amax(1).double()
    assert torch.equal(scales(quantised).double(), expected)
    assert (expected >= absmax / 127 * (1 - 1e-6)).all()
    assert ((expected <= absmax / 127 * (1 + 2**-16)) | (expected == 2.0**-120)).all()


@given(sizes, sizes, st.integers(0, 99), magnitudes)
def test_coding_what_was_decoded_changes_nothing(inputs, outputs, seed, magnitude):
    layer = quantise_int8(linear(inputs, outputs, seed, magnitude))
    again = copy.deepcopy(layer)
    write_int8(again, read_int8(layer))
    assert torch.equal(layer.codes_OI, again.codes_OI)
    assert torch.equal(layer.scale_bits_O, again.scale_bits_O)
    exact = layer.codes_OI.double() * scales(layer).double()[:, None]
    assert torch.equal(read_int8(layer).double(), exact)


def test_the_largest_floats_stay_finite():
    layer = linear(3, 1)
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[largest, -largest, 0.0]]))
    weight = read_int8(quantise_int8(layer))
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-4, atol=0)


def test_rows_of_zeros_stay_zeros():
    layer = linear(5, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    weight = read_int8(quantise_int8(layer))
    assert torch.equal(weight[1], torch.zeros(5))
    assert weight.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_place(bad):
    layer = linear(5, 3)
    with torch.no_grad():
        layer.weight[2, 4] = bad
    with pytest.raises(BaseModelError, match=r"\(3, 5\) of an Int8Linear holds 1 value .* at \[2, 4\]"):
        quantise_int8(layer)


def test_float64_beyond_float32_is_refused():
    layer = linear(2, 2).double()
    with torch.no_grad():
        layer.weight[0, 0] = 1e300
    with pytest.raises(BaseModelError, match="not finite"):
        quantise_int8(layer)


def test_a_layer_without_inputs_is_refused():
    with pytest.raises(ConfigError, match="0 and 3"):
        Int8Linear(0, 3)


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (49_152, 576)])
def test_bytes_are_one_for_each_weight_and_four_for_each_row(shape):
    outputs, inputs = shape
    layer = Int8Linear(inputs, outputs)
    assert layer.stored_bytes == pytest.approx(outputs * inputs * (1 + 4 / inputs), rel=1e-9)
    assert sum(one.nbytes for one in layer.buffers()) == layer.stored_bytes
    assert list(layer.parameters()) == []


def test_the_bias_is_a_frozen_copy_and_there_is_no_weight():
    plain = linear(4, 3).eval()
    layer = quantise_int8(plain)
    assert torch.equal(layer.bias, plain.bias)
    assert layer.bias is not plain.bias
    assert not layer.bias.requires_grad
    assert not layer.training
    with pytest.raises(AttributeError, match="weight"):
        layer.weight  # noqa: B018
    assert quantise_int8(linear(4, 3, bias=False)).bias is None


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    plain = linear(70, 3)
    expected = read_int8(quantise_int8(plain))
    torch.set_default_dtype(default)
    try:
        weight = read_int8(quantise_int8(plain))
        out = quantise_int8(plain)(torch.ones(2, 70, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight, expected)
    assert out.dtype == torch.float32


def test_16_bit_layers_are_rounded_from_their_own_values():
    plain = linear(40, 6).to(torch.bfloat16)
    assert torch.equal(read_int8(quantise_int8(plain)), read_int8(quantise_int8(copy.deepcopy(plain).float())))


def test_equals_a_linear_layer_over_the_decoded_weight():
    layer = quantise_int8(linear(9, 5))
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(layer(x), F.linear(x, read_int8(layer), layer.bias), rtol=1e-5, atol=1e-5)
