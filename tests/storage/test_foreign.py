"""Weights of bitsandbytes and torchao: stand-ins of their layout, and the packages themselves where installed."""

from importlib.util import find_spec

import pytest
import torch
from tests.storage.foreign import OtherTensor, int8_tensor_linear, linear_4bit, linear_8bit
from torch import nn

from veneer.errors import ConfigError
from veneer.storage.registry import read_weight, storage_of, write_weight

bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def test_8_bit_codes_mean_fractions_of_the_absmax():
    layer = linear_8bit(5, 3)
    expected = layer.weight.double() * layer.weight.SCB.double()[:, None] / 127
    torch.testing.assert_close(read_weight(layer).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_codes_mean_values_of_the_code_times_the_absmax(nested):
    layer = linear_4bit(7, 11, nested)
    state = layer.weight.quant_state
    weight = read_weight(layer).view(-1)
    for place in (0, 1, 63, 64, 76):
        byte = int(layer.weight[place // 2, 0])
        absmax = state.absmax[place // 64]
        if nested:
            absmax = state.state2.code[int(absmax)] * state.state2.absmax[0] + state.offset
        expected = state.code[byte & 15 if place % 2 else byte >> 4] * absmax
        assert weight[place].item() == pytest.approx(expected.item(), rel=1e-6)


def test_layers_not_quantised_yet_are_plain():
    eight, four = linear_8bit(5, 3), linear_4bit(5, 3)
    eight.weight = type(eight.weight)(torch.randn(3, 5))
    four.weight = type(four.weight)(torch.randn(3, 5))
    assert [storage_of(one).name for one in (eight, four)] == ["plain", "plain"]


def test_layers_repacked_for_a_cpu_are_refused():
    layer = linear_4bit(5, 3)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="LinearNF4 was repacked"):
        read_weight(layer)
    with pytest.raises(ConfigError, match="LinearNF4 was repacked"):
        write_weight(layer, torch.zeros(3, 5))


@pytest.mark.parametrize(
    "changes",
    [
        {"reduce_range": True},
        {"act_pre_scale": torch.ones(1)},
        {"zero_point": torch.ones(3, 1, dtype=torch.int8)},
        {"block_size": [3, 5]},
    ],
)
def test_other_tensors_of_torchao_are_read_and_not_written(changes):
    layer = int8_tensor_linear(5, 3, **changes)
    assert torch.equal(read_weight(layer), layer.weight.dequantize())
    with pytest.raises(ConfigError, match="Int8Tensor cannot be written"):
        write_weight(layer, torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="OtherTensor cannot be written"):
        write_weight(int8_tensor_linear(5, 3, OtherTensor), torch.zeros(3, 5))


def test_a_tensor_of_torchao_that_cannot_be_read_is_an_error_of_ours(monkeypatch):
    def refuse(self):
        raise NotImplementedError("no such layout")

    monkeypatch.setattr(OtherTensor, "dequantize", refuse)
    with pytest.raises(ConfigError, match=r"OtherTensor \(no such layout\)"):
        read_weight(int8_tensor_linear(5, 3, OtherTensor))


@bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("stored_as", [torch.uint8, torch.bfloat16])
def test_4_bit_as_the_package_does_it(nested, kind, stored_as):
    package = pytest.importorskip("bitsandbytes")
    layers = [
        package.nn.Linear4bit(130, 64, quant_type=kind, compress_statistics=nested, quant_storage=stored_as)
        for _ in range(2)
    ]
    weight = layers[1].weight.data.clone()
    ours, theirs = (layer.to("cpu") for layer in layers)
    write_weight(ours, weight)
    for layer in (ours, theirs):
        decoded = package.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(read_weight(layer), decoded)
    if not nested:  # nested: our codes are chosen after the absmax is rounded, theirs before
        assert torch.equal(ours.weight.data.view(torch.uint8), theirs.weight.data.view(torch.uint8))
    assert (read_weight(ours) - weight).norm() <= (read_weight(theirs) - weight).norm() * 1.0001


@bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_8_bit_as_the_package_does_it():
    package = pytest.importorskip("bitsandbytes")
    layer = package.nn.Linear8bitLt(130, 64, has_fp16_weights=False, bias=False)
    weight = layer.weight.data.clone()
    layer = layer.to("cpu")
    assert (read_weight(layer) - weight).abs().max() <= 0.75 * weight.abs().max() / 127  # it rounds to float16 first
    for _ in range(2):  # before and after the first forward, which moves the scales
        write_weight(layer, weight)
        x = torch.randn(4, 130)
        torch.testing.assert_close(layer(x), x @ read_weight(layer).T, rtol=0.05, atol=0.05)


@torchao
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_as_torchao_does_it(dtype):
    package = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(128, 64, dtype=dtype))
    package.quantize_(model, package.Int8WeightOnlyConfig())
    layer = model[0]
    stored = layer.weight
    torch.testing.assert_close(read_weight(layer), stored.dequantize().float(), rtol=2**-8, atol=0)
    new = torch.randn(64, 128)
    write_weight(layer, new)
    assert layer.weight is stored
    assert (read_weight(layer) - new).abs().max() <= 0.51 * new.abs().max() / 127
    x = torch.randn(4, 128, dtype=dtype)
    expected = x.float() @ read_weight(layer).T + layer.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.5)
