"""Stand-ins with the layout of bitsandbytes 0.50 and torchao 0.18, which need not be installed.

They hold what those packages document, and nothing of what they do; `test_foreign.py` checks them against the packages
where they are installed.
"""

from types import SimpleNamespace

import torch
from torch import nn

from veneer.storage.nf4 import CODEBOOK


class Params4bit(nn.Parameter):
    """Codes, two in a byte, as a column; `quant_state` says what they mean."""

    quant_state: SimpleNamespace | None = None


class Int8Params(nn.Parameter):
    """Codes, one in a byte; `SCB` is the absmax of each row until the first forward."""

    SCB: torch.Tensor | None = None


class Linear4bit(nn.Linear):
    pass


class LinearNF4(Linear4bit):
    pass


class Linear8bitLt(nn.Linear):
    pass


class Int8Tensor(torch.Tensor):
    """Codes and scales behind a tensor that looks like a floating one."""

    @staticmethod
    def __new__(cls, qdata, scale, dtype=torch.float32, **changes):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata, scale, dtype=torch.float32, **changes):
        self.qdata, self.scale = qdata, scale
        self.block_size, self.zero_point = [1, qdata.shape[1]], torch.zeros_like(scale, dtype=torch.int8)
        self.reduce_range, self.act_pre_scale = False, None
        vars(self).update(changes)

    def __repr__(self):
        return "Int8Tensor(…)"

    def dequantize(self):
        return (self.qdata * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


class OtherTensor(Int8Tensor):
    """A kind that can be read and not written."""


for one in (Params4bit, Int8Params, Linear4bit, LinearNF4, Linear8bitLt):
    one.__module__ = "bitsandbytes.nn.modules"
for one in (Int8Tensor, OtherTensor):
    one.__module__ = "torchao.quantization"

DYNAMIC = torch.cat([-torch.logspace(-6, 0, 127, 2), torch.zeros(2), torch.logspace(-6, 0, 127, 2)]).sort().values
"""An uneven 8-bit code; that of bitsandbytes has other values."""


def linear_8bit(inputs: int, outputs: int, used: bool = False) -> nn.Module:
    layer = Linear8bitLt(inputs, outputs)
    absmax = torch.rand(outputs) + 0.5
    layer.weight = Int8Params(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False)
    layer.weight.SCB = None if used else absmax
    layer.state = SimpleNamespace(SCB=absmax if used else None)
    return layer


def linear_4bit(inputs: int, outputs: int, nested: bool = False) -> nn.Module:
    layer = LinearNF4(inputs, outputs)
    num_blocks = -(-inputs * outputs // 64)
    packed = torch.randint(0, 256, (-(-inputs * outputs // 2), 1), dtype=torch.uint8)
    state2 = SimpleNamespace(code=DYNAMIC, absmax=torch.full((1,), 0.1), blocksize=256)
    layer.weight = Params4bit(packed, requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(
        absmax=torch.randint(0, 256, (num_blocks,), dtype=torch.uint8) if nested else torch.rand(num_blocks) + 0.1,
        shape=torch.Size([outputs, inputs]),
        code=CODEBOOK.clone(),
        blocksize=64,
        offset=torch.tensor(0.5) if nested else None,
        state2=state2 if nested else None,
    )
    return layer


def int8_tensor_linear(inputs: int, outputs: int, kind: type[Int8Tensor] = Int8Tensor, **changes) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    weight = kind(codes, torch.rand(outputs, 1) / 127, **changes)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
