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

from veneer.ops import native

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A gate's function and its gradient.

    Args:
        forward: Returns `f(x)`.
        backward: Given d, x and out, writes `d · f'(x)` into out, which may be d itself.
        kernel: What the kernels in C call it, or None where they have none.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernel: str | None = None


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda d, x, out: _aten.silu_backward(d, x, grad_input=out), "silu"),
    "gelu_tanh": Activation(
        _gelu_tanh, lambda d, x, out: _aten.gelu_backward(d, x, approximate="tanh", grad_input=out), "gelu_tanh"
    ),
    "gelu": Activation(F.gelu, lambda d, x, out: _aten.gelu_backward(d, x, grad_input=out)),
    "relu": Activation(F.relu, lambda d, x, out: _aten.threshold_backward(d, x, 0, grad_input=out)),
}
"""The functions that gates of transformers' models use, by name."""


def gated(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    """Return `f(gate) · up`; no gradient of its own.

    Cost:
        One pass over each, two where the kernels in C are missing or have no such function.

    Example:
        >>> gated(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0]), ACTIVATIONS["relu"]).tolist()
        [0.0, 8.0]
    """
    stride = _stride(gate_NF, up_NF, activation)
    if stride is None:
        return activation.forward(gate_NF).mul_(up_NF)
    out_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype)
    size = gate_NF.shape[-1]
    native.run(f"gate_{activation.kernel}", out_NF, gate_NF, up_NF, out_NF, out_NF.numel() // size, size, stride)
    return out_NF


def gated_gradient(
    dout_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: Activation, into: tuple[Tensor, Tensor]
) -> None:
    """Write the gradients of gate and up, `dout · up · f'(gate)` and `dout · f(gate)`, into two tensors.

    Args:
        dout_NF: The gradient of the output.
        gate_NF: The gate.
        up_NF: What it multiplies.
        activation: Its function.
        into: For gate and for up; the first may be `dout`.

    Cost:
        One pass over all of them, five where the kernels in C are missing or have no such function.

    Example:
        >>> gate, up, into = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0]), (torch.empty(2), torch.empty(2))
        >>> gated_gradient(torch.ones(2), gate, up, ACTIVATIONS["relu"], into)
        >>> [one.tolist() for one in into]
        [[0.0, 4.0], [0.0, 2.0]]
    """
    dgate_NF, dup_NF = into
    stride, to_stride = _stride(gate_NF, up_NF, activation), _stride(dgate_NF, dup_NF, activation)
    alike = native.suits(gate_NF, dout_NF, dgate_NF) and dout_NF.is_contiguous()
    if stride is not None and to_stride is not None and alike:
        size = gate_NF.shape[-1]
        sizes = (dout_NF.numel() // size, size, stride, to_stride)
        native.run(f"gate_gradient_{activation.kernel}", gate_NF, dout_NF, gate_NF, up_NF, dgate_NF, dup_NF, *sizes)
        return
    torch.mul(activation.forward(gate_NF), dout_NF, out=dup_NF)
    torch.mul(dout_NF, up_NF, out=dgate_NF)
    activation.backward(dgate_NF, gate_NF, dgate_NF)


def _stride(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> int | None:
    """Return how far the rows of both lie apart; None where the kernels do not take them."""
    if activation.kernel is None or not gate_NF.numel() or not native.suits(gate_NF, up_NF):
        return None
    if gate_NF.is_contiguous() and up_NF.is_contiguous():
        return gate_NF.shape[-1]
    return gate_NF.stride(0) if gate_NF.ndim == 2 and gate_NF.stride() == up_NF.stride() else None


class _SplitGate(torch.autograd.Function):
    """Keeps gate and up; see `split_gate`."""

    @staticmethod
    def forward(both_NF: Tensor, activation: Activation) -> Tensor:
        gate_NF, up_NF = both_NF.chunk(2, dim=-1)
        return gated(gate_NF, up_NF, activation)

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
        gated_gradient(dh_NF, gate_NF, up_NF, ctx.activation, (dgate_NF, dup_NF))
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
        That of `gated` and `gated_gradient`. Kept for backward: `both` alone, where torch keeps `f(gate)` too,
        and joins the gradients of the halves by a copy.

    Example:
        >>> split_gate(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), ACTIVATIONS["relu"]).tolist()
        [[0.0, 8.0]]

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    return _SplitGate.apply(both_NF, activation)
