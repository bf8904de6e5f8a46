"""A frozen linear layer whose weight is decoded panel by panel, forward and backward.

Shapes: N rows, I in, O out, P a panel of the O rows of the weight.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.frozen import FrozenWeight, apply_transposed, apply_weight

Decode = Callable[[tuple[Tensor, ...], int, int, int, Tensor], Tensor]
"""(stored tensors, first row, row behind the last, I, flat float32 scratch) -> rows (P, I), float32, in the scratch."""

BLOCK = 64
"""Panels begin at multiples of so many weights, so that no block of a blockwise code straddles two of them."""

PANEL_BYTES = 8 << 20
"""Size of a decoded panel on a CPU. It stays in the third-level cache; below 4 MiB every product packs its rows again
and 1,536 inputs cost up to a half more, from 16 MiB on decoding a few tokens runs at the speed of main memory."""

DEVICE_PANEL_BYTES = 64 << 20
"""The same on accelerators, where a launch costs more than a byte."""


def panel_rows(out_features: int, in_features: int, device: torch.device) -> int:
    """Return how many rows of a weight are decoded at a time: all of a small one.

    Example:
        >>> panel_rows(1536, 576, torch.device("cpu")), panel_rows(49_152, 576, torch.device("cpu"))
        (1536, 3584)
    """
    size = PANEL_BYTES if device.type == "cpu" else DEVICE_PANEL_BYTES
    return min(out_features, max(1, size // (4 * in_features * BLOCK)) * BLOCK)


def _scratch(out_features: int, in_features: int, device: torch.device) -> tuple[Tensor, int]:
    """One buffer for all panels of a call, with room for a last block that is not full; and the rows of a panel."""
    rows = panel_rows(out_features, in_features, device)
    return torch.empty(rows * in_features + BLOCK, dtype=torch.float32, device=device), rows


def decoded_panels(
    decode: Decode, stored: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of rows of a weight (O, I) and those rows in a dtype, in one buffer that the next ones overwrite."""
    out_features, in_features = shape
    scratch, rows = _scratch(out_features, in_features, stored[0].device)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield slice(start, stop), decode(stored, start, stop, in_features, scratch).to(dtype)


class _PanelLinear(torch.autograd.Function):
    """Saves references to the stored tensors, and nothing of size N; see `panel_linear`."""

    @staticmethod
    def forward(
        x_NI: Tensor, bias_O: Tensor | None, decode: Decode, out_features: int, stored: tuple[Tensor, ...]
    ) -> Tensor:
        return apply_weight(x_NI, _weight(decode, (out_features, x_NI.shape[1]), stored), bias_O, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch names them)
        x_NI, _, ctx.decode, out_features, stored = inputs
        ctx.shape = (out_features, x_NI.shape[1])
        ctx.save_for_backward(*stored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        weight = _weight(ctx.decode, ctx.shape, ctx.saved_tensors)
        dx_NI = apply_transposed(dy_NO, weight, None, None) if needs_x else None
        return dx_NI, dy_NO.sum(0) if needs_bias else None, None, None, None


def _weight(decode: Decode, shape: tuple[int, int], stored: tuple[Tensor, ...]) -> FrozenWeight:
    """Return the weight as what decodes it."""
    return FrozenWeight(shape, panels=partial(decoded_panels, decode, stored, shape))


def panel_linear(
    x: Tensor, bias_O: Tensor | None, decode: Decode, out_features: int, stored: tuple[Tensor, ...]
) -> Tensor:
    """Apply a frozen linear layer whose weight exists only as stored tensors, never decoding more than a panel of it.

    Equals, and is tested against:

        W = decode(stored, 0, out_features, in_features, scratch).to(x.dtype)
        out = F.linear(x, W, bias)

    Args:
        x: Input, shape (..., I), of any floating dtype; under autocast it is cast as a linear layer's input is.
        bias_O: Bias, or None; it may ask for a gradient.
        decode: Returns some rows of the weight; a plain function without state.
        out_features: Rows of the weight.
        stored: What `decode` reads; gets no gradient.

    Returns:
        Tensor (..., O), dtype of `x`. Differentiable once, with respect to `x` and the bias.

    Cost:
        A linear layer's products, and one decoding of the weight (forward) and one more (backward); one panel (8 MiB on
        a CPU). Nothing is kept for backward but references to `stored`.

    Example:
        >>> def thirds(stored, start, stop, in_features, scratch):
        ...     rows = stored[0][start:stop]
        ...     return scratch[: rows.numel()].view(rows.shape).copy_(rows).div_(3)
        >>> panel_linear(torch.ones(1, 2), None, thirds, 2, (torch.tensor([[3, 6], [9, 12]]),))
        tensor([[3., 7.]])

    Source:
        Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (16-bit products over a weight that is decoded for
        each). Differs: decoded a panel at a time, and again in the backward.
    """
    device = x.device.type
    # Asking a device without autocast, such as meta, is an error.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    y_NO = _PanelLinear.apply(x.reshape(-1, x.shape[-1]), bias_O, decode, out_features, stored)
    return y_NO.view(*x.shape[:-1], out_features)
