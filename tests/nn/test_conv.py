"""An adapted convolution: one kernel or three, padded by torch's own amounts, and what stays as torch does it."""

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.factors import compute_delta
from veneer.nn import conv as conv_module

SAME = {"padding": "same"}


def adapted(conv: nn.Module, rank: int = 2, **options: object) -> nn.Sequential:
    model = nn.Sequential(conv).requires_grad_(False)
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=rank, alpha=3, target_modules=["0"], **options))
    slot = attachment.slot(attachment.targets[0])
    with torch.no_grad():
        slot.lora_B.normal_()
        if slot.magnitude is not None:
            slot.magnitude.mul_(1 + torch.rand_like(slot.magnitude))
    return model


def merged(model: nn.Sequential, x: Tensor) -> Tensor:
    layer = model[0]
    slot, base = layer.slot(0), layer.base
    with torch.no_grad():
        kernel = base.weight + compute_delta("conv", slot.lora_A, slot.lora_B, slot.scaling).to(base.weight.dtype)
        if slot.magnitude is not None:
            axes = tuple(range(1, kernel.ndim))
            kernel = kernel * (slot.magnitude / kernel.square().sum(axes).sqrt()).view(-1, *(1,) * len(axes))
        return base._conv_forward(x, kernel, base.bias)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv1d(3, 4, 4, **SAME),
        lambda: nn.Conv1d(3, 4, 3, dilation=2, **SAME),
        lambda: nn.Conv2d(2, 4, (4, 3), **SAME),
        lambda: nn.Conv2d(4, 4, (2, 3), groups=2, padding_mode="circular", **SAME),
        lambda: nn.Conv2d(2, 4, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
        lambda: nn.Conv3d(2, 3, (1, 2, 4), padding_mode="replicate", **SAME),
        lambda: nn.Conv2d(2, 4, 3, padding="valid"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("size", [5, 7])
def test_every_padding_equals_the_merged_kernel(conv, use_dora, size):
    torch.manual_seed(0)
    base = conv().double()
    model = adapted(base, use_dora=use_dora)
    x = torch.randn(2, base.in_channels, *(size,) * (base.weight.ndim - 2), dtype=torch.float64)
    assert conv_module._folds(base, x)
    torch.testing.assert_close(model(x), merged(model, x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_few_positions_and_many_agree(use_dora):
    """Three convolutions of a large kernel at one position, one of the sum at many: the same layer."""
    torch.manual_seed(0)
    base = nn.Conv2d(16, 16, 3).double()
    model = adapted(base, use_dora=use_dora)
    few, many = torch.randn(1, 16, 3, 3, dtype=torch.float64), torch.randn(2, 16, 9, 9, dtype=torch.float64)
    assert not conv_module._folds(base, few)
    assert conv_module._folds(base, many)
    slot = model[0].slot(0)
    for x in (few, many):
        torch.testing.assert_close(model(x), merged(model, x))
    gradients = []
    for x in (many[:1, :, :3, :3], many[:, :, :3, :3].repeat(1, 1, 3, 3)[:1]):
        out = model(x)
        gradients.append(torch.autograd.grad(out[:, :, :1, :1].sum(), [slot.lora_A, slot.lora_B]))
    for few_gradient, many_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(few_gradient, many_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_16_bits_are_not_summed(dtype):
    """An update below half a step of every weight would be rounded away, where it alone is what is left of a sum."""
    model = adapted(nn.Conv1d(4, 4, 1, groups=2, bias=False), rank=2)
    layer = model[0]
    with torch.no_grad():
        layer.base.weight.fill_(1.0)
        layer.slot(0).lora_A.copy_(torch.tensor([1.0, -1.0])[None, :, None].expand(2, 2, 1))
        layer.slot(0).lora_B.fill_(2.0**-13)
    model.to(dtype)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[None, :, None].expand(2, 4, 8)
    assert not conv_module._folds(layer.base, x)
    assert not layer.base(x).any()
    torch.testing.assert_close(model(x).float(), torch.full((2, 4, 8), 2 * layer.slot(0).scaling * 2.0**-13))


def test_a_watched_convolution_is_called():
    model = adapted(nn.Conv1d(3, 4, 3))
    calls = []
    model[0].base.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(model(x), merged(model, x))
    assert calls


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_comes_behind_may_write_into_the_output(use_dora):
    model = adapted(nn.Conv2d(9, 40, 3, bias=False), rank=1, use_dora=use_dora)
    x = torch.randn(2, 9, 12, 12)
    assert conv_module._folds(model[0].base, x)
    model.append(nn.ReLU(inplace=True))
    model(x).sum().backward()
    assert bool(model[0].slot(0).lora_A.grad.any())
