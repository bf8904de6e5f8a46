"""Reading and writing weights: the same laws for every way of storing them."""

from collections.abc import Callable

import pytest
import torch
from tests.storage.foreign import int8_tensor_linear, linear_4bit, linear_8bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import BaseModelError, ConfigError
from veneer.storage.int8 import quantise_int8
from veneer.storage.nf4 import quantise_nf4
from veneer.storage.registry import STORAGES, read_weight, storage_of, write_weight

MODULES: dict[str, tuple[str, Callable[[], nn.Module], float]] = {
    # name: (storage, module, largest error of a weight in (-1, 1) that is written)
    "linear": ("plain", lambda: nn.Linear(70, 6), 0.0),
    "float64": ("plain", lambda: nn.Linear(70, 6).double(), 0.0),
    "bfloat16": ("plain", lambda: nn.Linear(70, 6).to(torch.bfloat16), 2**-9),
    "float16": ("plain", lambda: nn.Linear(70, 6).half(), 2**-12),
    "embedding": ("plain", lambda: nn.Embedding(9, 5), 0.0),
    "conv": ("plain", lambda: nn.Conv2d(3, 4, 3), 0.0),
    "transposed conv": ("plain", lambda: nn.ConvTranspose1d(3, 4, 3), 0.0),
    "Conv1D": ("plain", lambda: Conv1D(5, 7), 0.0),
    "norm": ("plain", lambda: nn.LayerNorm(5), 0.0),
    "int8": ("int8", lambda: quantise_int8(nn.Linear(70, 6)), 0.5 / 127),
    "nf4": ("nf4", lambda: quantise_nf4(nn.Linear(70, 6)), 0.16),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: linear_8bit(70, 6), 0.5 / 127),
    "bitsandbytes 8 bit, used": ("bitsandbytes", lambda: linear_8bit(70, 6, used=True), 0.5 / 127),
    "bitsandbytes nf4": ("bitsandbytes", lambda: linear_4bit(70, 6), 0.153),
    "bitsandbytes nf4, nested": ("bitsandbytes", lambda: linear_4bit(70, 6, nested=True), 0.16),
    "bitsandbytes nf4, odd": ("bitsandbytes", lambda: linear_4bit(7, 5, nested=True), 0.16),
    "torchao": ("torchao", lambda: int8_tensor_linear(70, 6), 0.5 / 127),
}
every = pytest.mark.parametrize("name", MODULES)


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@every
def test_the_storage_is_known(name):
    storage, make, _ = MODULES[name]
    found = storage_of(make())
    assert found is not None
    assert found.name == storage


def test_every_storage_has_a_module_here():
    assert {one.name for one in STORAGES} == {storage for storage, _, _ in MODULES.values()}


@every
def test_what_is_read_is_fresh_and_wide(name):
    module = MODULES[name][1]()
    weight = read_weight(module)
    assert weight.dtype == (torch.float64 if name == "float64" else torch.float32)
    assert type(weight) is torch.Tensor
    assert not weight.requires_grad
    assert weight.is_contiguous()
    weight.add_(1)
    assert torch.equal(read_weight(module), weight - 1) or (read_weight(module) - weight + 1).abs().max() < 1e-6


@every
def test_what_is_written_is_read_within_one_rounding(name):
    _, make, error = MODULES[name]
    module = make()
    before = tensors(module)
    generator = torch.Generator().manual_seed(0)
    new = torch.rand(read_weight(module).shape, generator=generator, dtype=read_weight(module).dtype) * 2 - 1
    write_weight(module, new)
    assert (read_weight(module) - new).abs().max() <= error * (1 + 1e-5)
    assert all(one is other for one, other in zip(before, tensors(module), strict=True))


@every
def test_writing_what_was_read_changes_next_to_nothing(name):
    module = MODULES[name][1]()
    write_weight(module, torch.randn(read_weight(module).shape) * 0.02)
    weight = read_weight(module)
    write_weight(module, weight)
    # Only scales that are rounded themselves move: by a two-hundred-and-fiftieth of the spread of the absmax.
    tolerance = 4e-4 if "nested" in name or "odd" in name or name == "nf4" else 1e-8
    assert (read_weight(module) - weight).abs().max() <= tolerance


@every
def test_other_shapes_and_integers_are_refused_before_anything_changes(name):
    module = MODULES[name][1]()
    weight = read_weight(module)
    for wrong in (weight.unsqueeze(0), weight[..., :-1], weight.new_zeros(()), weight.to(torch.int32)):
        with pytest.raises(ConfigError, match="floating, got"):
            write_weight(module, wrong)
    assert torch.equal(read_weight(module), weight)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_anything_changes(name, bad):
    module = MODULES[name][1]()
    weight = read_weight(module)
    broken = weight.clone()
    broken.view(-1)[3] = bad
    with pytest.raises(BaseModelError, match="1 value that is not finite"):
        write_weight(module, broken)
    assert torch.equal(read_weight(module), weight)


def test_float16_that_overflows_is_refused():
    layer = nn.Linear(2, 1).half()
    with pytest.raises(BaseModelError, match=r"torch.float16, holds 1 value .*\(inf\) at \[0, 1\]"):
        write_weight(layer, torch.tensor([[1.0, 1e5]]))


def test_plain_weights_are_rounded_to_nearest():
    layer = nn.Linear(2, 1).to(torch.bfloat16)
    write_weight(layer, torch.tensor([[1 + 2**-8 + 2**-12, 1 + 2**-8 - 2**-12]]))
    assert layer.weight.tolist() == [[1 + 2**-7, 1.0]]


def test_a_weight_that_trains_can_be_written():
    layer = nn.Linear(2, 1)
    write_weight(layer, torch.ones(1, 2))
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None


def test_modules_without_a_known_weight_are_refused():
    eight_bits = nn.Linear(2, 2, bias=False).to(torch.float8_e4m3fn)
    for module in (nn.GELU(), nn.Sequential(nn.Linear(1, 1)), eight_bits):
        assert storage_of(module) is None
        with pytest.raises(BaseModelError, match="no weight in a way that is known"):
            read_weight(module)
        with pytest.raises(BaseModelError, match="no weight in a way that is known"):
            write_weight(module, torch.ones(1))


def test_weights_without_values_are_refused():
    with pytest.raises(BaseModelError, match="meta device"):
        write_weight(nn.Linear(2, 1, device="meta"), torch.ones(1, 2))
