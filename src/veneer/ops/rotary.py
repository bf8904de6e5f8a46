"""Rotary positions whose backward is the rotation the other way: nothing is kept.

Shapes: T tokens, H heads, E head size, C the part of it that turns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import native
from veneer.ops.keeping import Keep, room


def _rotated(x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor, keep: Keep | None = None, *, back: bool) -> Tensor:
    size = cos_TC.shape[-1]
    half = size // 2
    out_THE = room(keep, x_THE.shape, x_THE)
    if native.suits(x_THE, cos_TC, sin_TC) and cos_TC.is_contiguous() and sin_TC.is_contiguous():
        sizes = (*x_THE.shape, size, x_THE.stride(0), x_THE.stride(1), int(back))
        native.run("rotate", x_THE, x_THE, cos_TC, sin_TC, out_THE, *sizes)
        return out_THE
    cos_T1C, sin_T1C = cos_TC.unsqueeze(1), sin_TC.unsqueeze(1)
    low, high = slice(0, half), slice(half, size)
    for mine, other, sign in ((low, high, -1), (high, low, 1)):
        # out = x cos + (-x_high, x_low) sin; its transpose takes the other half's sine, with the other sign.
        sine = sin_T1C[..., other] if back else sin_T1C[..., mine]
        part = torch.mul(x_THE[..., mine], cos_T1C[..., mine], out=out_THE[..., mine])
        part.addcmul_(x_THE[..., other], sine, value=-sign if back else sign)
    if size < x_THE.shape[-1]:
        out_THE[..., size:] = x_THE[..., size:]
    return out_THE


class _Rotate(torch.autograd.Function):
    """See `rotate`."""

    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor, keep: Keep | None) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _rotated(x_THE, cos_TC, sin_TC, keep, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor, None, None, None]:
        return _rotated(dy_THE, *ctx.saved_tensors, back=True), None, None, None


def rotate(x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor, keep: Keep | None = None) -> Tensor:
    """Turn the first C numbers of each head by the angles of its position.

    Equals, and is tested against, `ops.reference.rotate`:

        low, high = x[..., : C // 2], x[..., C // 2 : C]
        out = cat([x[..., :C] * cos + cat([-high, low]) * sin, x[..., C:]])

    Args:
        x_THE: Queries or keys.
        cos_TC: Cosines, the same for every head; they get no gradient.
        sin_TC: Sines.
        keep: Gives room for the output.

    Returns:
        Tensor (T, H, E), contiguous. Differentiable once.

    Cost:
        One pass each way, or four over half of the input where the kernels in C are missing; only cosines and sines are
        kept.

    Example:
        >>> rotate(torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 2), torch.ones(1, 2)).tolist()
        [[[0.0, 1.0]]]

    Source:
        Su et al. 2021, arXiv:2104.09864, equation 34; halves instead of pairs, as in transformers.
    """
    return _Rotate.apply(x_THE, cos_TC, sin_TC, keep)
