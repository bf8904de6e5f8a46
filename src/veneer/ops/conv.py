"""A convolution and its low-rank update in one step, with a hand-written backward.

Shapes: N a batch, I and O channels, g groups, R rank, k… a kernel, P positions of the output, K = I/g · k….
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.factors import FORMS
from veneer.ops import conv_tiles
from veneer.ops.dora import is_far_from_zero
from veneer.ops.geometry import Geometry

_BLOCK = 1 << 18
"""Numbers that are multiplied at a time, so that the products stay in the cache: 1 MB in float32."""


def _convolved(x: Tensor, kernel: Tensor, bias_O: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution, computed where that is quicker; no gradient."""
    if conv_tiles.convolves(x, kernel, geometry):
        return conv_tiles.convolve(x, kernel, bias_O, geometry)
    return geometry.convolve(x, kernel, bias_O)


def _input_gradient(dy: Tensor, x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the input, computed where that is quicker."""
    if conv_tiles.convolves(dy, kernel, geometry, turned=True):
        return conv_tiles.convolve(dy, kernel, None, geometry, turned=True)
    return geometry.input_gradient(dy, x, kernel)


def _sums_kernels(W: Tensor, A: Tensor, groups: int) -> bool:
    """Tell whether the factors' gradients are quicker taken from that of the whole kernel than from convolutions.

    That takes O·K operations a position, the factors 3·R·(K + O), where 3 is how much slower skinny ones are. Grouped
    kernels of a few ranks are slow whatever their number of operations (docs/log.md).
    """
    outputs, inputs, rank = W.shape[0], W[0].numel(), A.shape[0]
    return groups > 1 or inputs * outputs <= 3 * rank * (inputs + outputs)


def _merged_kernel(W: Tensor, A: Tensor, B: Tensor, scaling: float, ratio_O: Tensor | None) -> Tensor:
    """Return `ratio · (W + s B A)` in W's shape."""
    if ratio_O is not None:
        W, B = _each(W, ratio_O), _each(B, ratio_O)
    if len(A) == B.shape[1]:
        return torch.addmm(W.flatten(1), B.flatten(1), A.flatten(1), alpha=scaling).view_as(W)
    return torch.add(W, FORMS["conv"].delta(A, B), alpha=scaling)


def _each(kernel: Tensor, factor_O: Tensor) -> Tensor:
    """Multiply what makes each output channel by a factor of its own."""
    return kernel * factor_O.view(-1, *(1,) * (kernel.ndim - 1))


def _down_gradient(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of A in `conv1x1(conv(x, A), B)`, without groups: a skinny convolution."""
    dz = (B.flatten(1).T @ dy.flatten(2)).unflatten(2, dy.shape[2:])
    return geometry.kernel_gradient(dz, x, A)


def _up_gradient(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of B in `conv1x1(conv(x, A), B)`, without groups: a skinny convolution."""
    z_NRP = geometry.convolve(x, A).flatten(2)
    return torch.bmm(dy.flatten(2), z_NRP.mT).sum(0).view_as(B)


def _channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return `(a * b).sum` over all axes but the channels', a few samples at a time."""
    samples = max(1, _BLOCK * len(a) // max(1, a.numel()))
    pairs = zip(a.flatten(2).split(samples), b.flatten(2).split(samples), strict=True)
    return torch.stack([torch.linalg.vecdot(a_NOP, b_NOP).sum(0) for a_NOP, b_NOP in pairs]).sum(0)


class _How(NamedTuple):
    """What is no tensor."""

    scaling: float
    geometry: Geometry
    keeps_output: bool


class _LoRAConv(torch.autograd.Function):
    """Saves the input and, with a ratio, the output without bias; see `lora_conv`. No groups, a frozen kernel."""

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        bias_O: Tensor | None,
        A: Tensor,
        B: Tensor,
        ratio_O: Tensor | None,
        how: _How,
    ) -> tuple[Tensor, Tensor | None]:
        if ratio_O is None:  # torch's: an update of zero changes no bit
            return how.geometry.convolve(x, _merged_kernel(W, A, B, how.scaling, None), bias_O), None
        kernel = _merged_kernel(W, A, B, how.scaling, ratio_O)
        if not how.keeps_output:
            return _convolved(x, kernel, bias_O, how.geometry), None
        v = _convolved(x, kernel, None, how.geometry)
        # Never the output itself: what comes behind a convolution often writes into it.
        return v.clone() if bias_O is None else v + bias_O.view(-1, *(1,) * (v.ndim - 2)), v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, W, _, A, B, ratio_O, ctx.how = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W, A, B, ratio_O, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, W, A, B, ratio_O, v = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        scaling, geometry, _ = ctx.how
        dx = dA = dB = None
        if needs_x:
            dx = _input_gradient(dy, x, _merged_kernel(W, A, B, scaling, ratio_O), geometry)
        scale_O = B.new_full((len(B),), scaling) if ratio_O is None else ratio_O * scaling
        if needs_A:
            dA = _down_gradient(dy, x, A, _each(B, scale_O), geometry)
        if needs_B:
            dB = _each(_up_gradient(dy, x, A, B, geometry), scale_O)
        dratio_O = None if v is None else _channel_dots(dy, v) / ratio_O
        dbias_O = dy.flatten(2).sum((0, 2)) if needs_bias else None
        return dx, None, dbias_O, dA, dB, dratio_O, None


def lora_conv(
    x: Tensor,
    W: Tensor,
    bias_O: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    ratio_O: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Apply a convolution with its low-rank update, each output channel scaled by a ratio where there is one (DoRA).

    Equals, and is tested against, `ops.reference.lora_conv`:

        out = ratio * (conv(x, W) + scaling * conv1x1(conv(x, A), B)) + bias

    Args:
        x: Input, shape (N, I, …), padded already where that is not with zeros.
        W: Kernel of the base layer, (O, I/g, k…).
        bias_O: Its bias, or None.
        A: Kernels (R, I/g, k…), the ranks of a group together; dtype of `x`.
        B: Kernels (O, R/g, 1…).
        scaling: Factor of the update.
        ratio_O: `ops.dora.magnitude_ratio`, or None.
        geometry: How kernels go over the input.

    Returns:
        Tensor (N, O, …). Differentiable once where kernels are large.

    Cost:
        Forward and input gradient: one convolution each with `ratio · (W + s B A)`, formed on the fly. The factors'
        gradients: two convolutions with R channels and 4·N·P·R·O operations, with `x` kept for backward and, with a
        ratio, a tensor of the output's size. Or, for grouped and small kernels, one that trains itself, and a ratio of
        zero or on a GPU: torch's own gradient of the whole kernel, which is kept too.

    Example:
        >>> once = Geometry((1,), (0,), (1,), 1)
        >>> x, W, A, B = torch.ones(1, 2, 3), torch.ones(4, 2, 1), torch.ones(1, 2, 1), torch.ones(4, 1, 1)
        >>> lora_conv(x, W, None, A, B, 0.5, None, once)[0, 0].tolist()
        [3.0, 3.0, 3.0]

    Source:
        microsoft/LoRA `loralib/layers.py`, ConvLoRA; DoRA: Liu et al. 2024, arXiv:2402.09353, section 4.3. Differs: one
        convolution with the sum of the kernels each way, after Cherniuk et al. 2023, RunLoRA, arXiv:2312.03415.
    """
    keeps_output = ratio_O is not None and ratio_O.requires_grad and torch.is_grad_enabled()
    if (
        W.requires_grad
        or _sums_kernels(W, A, geometry.groups)
        # The ratio's gradient is taken from the output divided by it.
        or (keeps_output and not is_far_from_zero(ratio_O))  # type: ignore[arg-type]
    ):
        return geometry.convolve(x, _merged_kernel(W, A, B, scaling, ratio_O), bias_O)
    return _LoRAConv.apply(x, W, bias_O, A, B, ratio_O, _How(scaling, geometry, keeps_output))[0]
