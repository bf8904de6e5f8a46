"""Gates: an activation of one half of the features, times the other half.

Shapes: N rows, F features of a gate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A gate's function and its gradient.

    Args:
        forward: Returns `f(x)`.
        backward: Given d, x and out, writes `d · f'(x)` into out, which may be d itself.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda d, x, out: _aten.silu_backward(d, x, grad_input=out)),
    "gelu_tanh": Activation(
        _gelu_tanh, lambda d, x, out: _aten.gelu_backward(d, x, approximate="tanh", grad_input=out)
    ),
    "gelu": Activation(F.gelu, lambda d, x, out: _aten.gelu_backward(d, x, grad_input=out)),
    "relu": Activation(F.relu, lambda d, x, out: _aten.threshold_backward(d, x, 0, grad_input=out)),
}
"""The functions that gates of transformers' models use, by name."""


class _SplitGate(torch.autograd.Function):
    """Keeps gate and up; see `split_gate`."""

    @staticmethod
    def forward(both_NF: Tensor, activation: Activation) -> Tensor:
        gate_NF, up_NF = both_NF.chunk(2, dim=-1)
        return activation.forward(gate_NF).mul_(up_NF)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch names them)
        both_NF, ctx.activation = inputs
        ctx.save_for_backward(both_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_NF: Tensor) -> tuple[Tensor, None]:
        (both_NF,) = ctx.saved_tensors
        gate_NF, up_NF = both_NF.chunk(2, dim=-1)
        dboth_NF = torch.empty_like(both_NF)
        dgate_NF, dup_NF = dboth_NF.chunk(2, dim=-1)
        torch.mul(ctx.activation.forward(gate_NF), dh_NF, out=dup_NF)
        torch.mul(dh_NF, up_NF, out=dgate_NF)
        ctx.activation.backward(dgate_NF, gate_NF, dgate_NF)
        return dboth_NF, None


def split_gate(both_NF: Tensor, activation: Activation) -> Tensor:
    """Return `f(gate) · up`, the gate being the first half of the features and up the second.

    Equals, and is tested against:

        gate, up = both.chunk(2, -1); out = f(gate) * up

    Args:
        both_NF: Gate and up side by side, shape (..., 2F).
        activation: One of `ACTIVATIONS`.

    Returns:
        Tensor (..., F), dtype of `both`. Differentiable once.

    Cost:
        Two passes over (N, F) forward, four backward. Kept for backward: `both` alone, where torch keeps `f(gate)` too,
        and joins the gradients of the halves by a copy.

    Example:
        >>> split_gate(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), ACTIVATIONS["relu"]).tolist()
        [[0.0, 8.0]]

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    return _SplitGate.apply(both_NF, activation)
