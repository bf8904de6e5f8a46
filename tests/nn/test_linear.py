"""What a training step gives an adapter counts in 16 bits, though it is less than a digit of what the base gives."""

import copy

import pytest
import torch
from torch import nn

from veneer.adapter import LowRank
from veneer.config import LoRAConfig
from veneer.nn import linear
from veneer.nn.attach import attach
from veneer.nn.linear import LoRALinear, frozen_projection, plain_forward
from veneer.nn.routing import Routing
from veneer.nn.slots import Slot
from veneer.ops.dora import dora_linear
from veneer.ops.experts import lora_experts
from veneer.ops.gates import ACTIVATIONS
from veneer.ops.projections import gated_projection, project
from veneer.storage.int8 import quantise_int8
from veneer.storage.nf4 import quantise_nf4
from veneer.storage.quantise import quantise_model

ROWS, INPUTS, OUTPUTS, RANK = 2048, 96, 128, 4


def drawn(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def adapted(base: nn.Module, dropout: float, dtype: torch.dtype, share: float = 1 / 512) -> LoRALinear:
    """A layer whose update is a share of what the dtype can tell apart."""
    size = share * torch.finfo(dtype).eps
    pair = LowRank(drawn(RANK, INPUTS, dtype=dtype), drawn(OUTPUTS, RANK, size=size, dtype=dtype), scaling=0.5)
    layer = LoRALinear(base, Routing())
    layer.put({"": Slot(pair, dropout=dropout)})
    return layer.train()


def exact_update(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    slot = layer.slot(0)
    A, B = (factor.detach() for factor in slot.factors(torch.float64))
    return slot.scaling * (x.double() @ A.T) @ B.T


def share_that_counts(got: torch.Tensor, base: torch.Tensor, update: torch.Tensor) -> float:
    """The slope of what was added on what should have been: 1 where nothing is lost on average."""
    return (((got.double() - base) * update).sum() / update.square().sum()).item()


def plain_base(with_bias: bool, dtype: torch.dtype) -> nn.Linear:
    base = nn.Linear(INPUTS, OUTPUTS, bias=with_bias, dtype=dtype).requires_grad_(False)
    base.weight.copy_(drawn(OUTPUTS, INPUTS, size=INPUTS**-0.5, dtype=dtype))
    if with_bias:
        base.bias.copy_(drawn(OUTPUTS, dtype=dtype))
    return base


def stored_base(storage: str, with_bias: bool, dtype: torch.dtype) -> nn.Module:
    store = {"plain": lambda base: base, "int8": quantise_int8, "nf4": quantise_nf4}[storage]
    return store(plain_base(with_bias, dtype))


WAYS = {
    "layer": lambda layer, x: layer(x),
    "reference": plain_forward,
    "fused": lambda layer, x: project(x, [frozen_projection(layer.base, x, layer.slot(0))])[0],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("way", "storage", "dropout"),
    [
        *((way, "plain", 0.0) for way in WAYS),
        ("layer", "plain", 1e-12),  # drops nothing, and goes the way of what does
        ("layer", "int8", 0.0),
        ("layer", "nf4", 0.0),
        ("fused", "int8", 0.0),
    ],
)
def test_a_small_update_counts(way, storage, dropout, with_bias, dtype):
    layer = adapted(stored_base(storage, with_bias, dtype), dropout, dtype)
    x = drawn(ROWS, INPUTS, dtype=dtype)
    weight = (
        torch.cat([rows.clone() for _, rows in layer.base.panels(dtype)]) if storage != "plain" else layer.base.weight
    )
    base = x.double() @ weight.double().T + (layer.bias.double() if with_bias else 0)
    update = exact_update(layer, x)
    assert abs(share_that_counts(WAYS[way](layer, x).detach(), base, update) - 1) < 0.25
    rounded_first = (layer.base(x).double() + update).to(dtype)
    assert share_that_counts(rounded_first, base, update) < 0.5


def test_its_input_gradient_counts_too():
    layer = adapted(plain_base(False, torch.bfloat16), 0.0, torch.bfloat16)
    x, dy = drawn(ROWS, INPUTS), drawn(ROWS, OUTPUTS)
    slot = layer.slot(0)
    A, B = (factor.detach() for factor in slot.factors(torch.float64))
    base, update = dy.double() @ layer.base.weight.double(), slot.scaling * (dy.double() @ B) @ A
    for way in ("layer", "fused"):
        leaf = x.clone().requires_grad_()
        WAYS[way](layer, leaf).backward(dy)
        assert abs(share_that_counts(leaf.grad, base, update) - 1) < 0.25


def test_behind_a_gate():
    layer = adapted(plain_base(False, torch.bfloat16), 0.0, torch.bfloat16)
    gate, up = drawn(ROWS, INPUTS).relu(), torch.ones(ROWS, INPUTS, dtype=torch.bfloat16)
    x = gate.double()
    got = gated_projection(gate, up, ACTIVATIONS["relu"], frozen_projection(layer.base, gate, layer.slot(0)))
    base, update = x @ layer.base.weight.double().T, exact_update(layer, x)
    assert abs(share_that_counts(got.detach(), base, update) - 1) < 0.25


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_of_each_expert(with_bias):
    W, A, B = drawn(2, OUTPUTS, INPUTS, size=INPUTS**-0.5), drawn(2, RANK, INPUTS), drawn(2, OUTPUTS, RANK, size=2**-16)
    x, bias = drawn(ROWS, INPUTS), drawn(2, OUTPUTS) if with_bias else None
    rows = torch.arange(ROWS) >= ROWS // 4
    got = lora_experts(x, W, bias, A, B, 0.5, [ROWS // 4, ROWS - ROWS // 4])
    each = W.double()[rows.long()]
    base = torch.einsum("ni,noi->no", x.double(), each) + (bias.double()[rows.long()] if with_bias else 0)
    update = 0.5 * torch.einsum("nor,nri,ni->no", B.double()[rows.long()], A.double()[rows.long()], x.double())
    assert abs(share_that_counts(got, base, update) - 1) < 0.25


def test_before_the_ratio_of_dora():
    W, A, B = drawn(OUTPUTS, INPUTS, size=INPUTS**-0.5), drawn(RANK, INPUTS), drawn(OUTPUTS, RANK, size=2**-16)
    x = drawn(ROWS, INPUTS)
    got = dora_linear(x, W, None, A, B, 0.5, torch.full((OUTPUTS,), 2.0))
    base, update = 2 * x.double() @ W.double().T, (x.double() @ A.double().T) @ B.double().T
    assert abs(share_that_counts(got, base, update) - 1) < 0.25


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_with_b_zero_16_bits_are_the_bases_bit_for_bit(way, storage, with_bias):
    layer = adapted(stored_base(storage, with_bias, torch.bfloat16), 0.0, torch.bfloat16, share=0.0)
    x = drawn(ROWS, INPUTS)
    assert torch.equal(WAYS[way](layer, x), copy.deepcopy(layer.base)(x))


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("storage", ["plain", "int8"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"dropout": 0.5}, {"use_dora": True, "dropout": 0.5}])
@pytest.mark.parametrize("rows", [1, 600])
def test_what_stands_behind_may_write_into_the_output(rows, settings, storage, with_bias):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20, bias=with_bias), nn.ReLU(inplace)).requires_grad_(False)
        if storage != "plain":
            quantise_model(model, storage)
        attachment = attach(model.train(), LoRAConfig(rank=2, target_modules=["0"], **settings))
        with torch.no_grad():
            attachment.slot(attachment.targets[0]).lora_B.normal_()
        x = torch.randn(rows, 24, requires_grad=True)
        model(x).square().sum().backward()
        found.append([x.grad, *(one.grad for one in attachment.parameters().values())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_where_zeros_are_not_told_the_norm_is_taken_once(storage, monkeypatch):
    """As on a GPU, which would have to be waited for: neither the weight nor dropout's numbers are taken in vain."""
    base = stored_base(storage, True, torch.float32)
    layer = LoRALinear(base, Routing())
    pair = LowRank(drawn(RANK, INPUTS).float(), drawn(OUTPUTS, RANK).float(), 0.5, magnitude=torch.ones(OUTPUTS))
    slot = Slot(pair, dropout=0.5)
    slot.weight_norm2 = torch.ones(OUTPUTS, dtype=torch.float64)
    layer.put({"": slot})
    monkeypatch.setattr(linear, "tells_zeros", lambda _: False)
    for name in ("weight_product", "draw_dropout"):
        monkeypatch.setattr(linear, name, lambda *_: pytest.fail("computed in vain"))
    assert layer.train()(drawn(ROWS, INPUTS).float()).shape == (ROWS, OUTPUTS)
