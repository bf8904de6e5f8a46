"""Root-mean-square norms that keep their input and one number a row for backward.

Shapes: N rows, D their size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import native
from veneer.ops.keeping import Keep, room


class RMSNorm(NamedTuple):
    """What an RMS norm computes with, all of it frozen.

    Args:
        weight_D: The gain, less `offset`.
        epsilon: Added to the mean square.
        offset: Added to the weight: 1 in Gemma's models, whose weights are stored around zero.
    """

    weight_D: Tensor
    epsilon: float
    offset: float = 0.0

    def gain(self, dtype: torch.dtype) -> Tensor:
        """Return what the normalised rows are multiplied by."""
        gain_D = self.weight_D.to(dtype)
        return gain_D + self.offset if self.offset else gain_D


def _wide(x_ND: Tensor) -> Tensor:
    return x_ND.float() if x_ND.dtype.itemsize < 4 else x_ND


def normalise(x_ND: Tensor, norm: RMSNorm, keep: Keep | None = None) -> tuple[Tensor, Tensor]:
    """Return `x / rms(x) · gain` and `1 / rms(x)` of each row (N, 1); no gradient of its own."""
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    room_N1 = room(keep, (*x_ND.shape[:-1], 1), x_ND, dtype)
    if _suits(norm, x_ND):
        y_ND, gain_D = torch.empty_like(x_ND), norm.gain(dtype)
        native.run("norm", x_ND, x_ND, gain_D, norm.epsilon, y_ND, room_N1, room_N1.numel(), len(gain_D))
        return y_ND, room_N1
    wide_ND = _wide(x_ND)
    mean_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True, out=room_N1).square_().div_(x_ND.shape[-1])
    inverse_N1 = mean_N1.add_(norm.epsilon).rsqrt_()
    return _scaled(wide_ND, inverse_N1, norm).to(x_ND.dtype), inverse_N1


def renormalise(x_ND: Tensor, inverse_N1: Tensor, norm: RMSNorm) -> Tensor:
    """Return the output again from what was kept."""
    if _suits(norm, x_ND):
        y_ND, gain_D = torch.empty_like(x_ND), norm.gain(inverse_N1.dtype)
        native.run("norm_again", x_ND, x_ND, gain_D, inverse_N1, y_ND, inverse_N1.numel(), len(gain_D))
        return y_ND
    return _scaled(_wide(x_ND), inverse_N1, norm).to(x_ND.dtype)


def _suits(norm: RMSNorm, *rows: Tensor) -> bool:
    return native.suits(*rows) and all(one.is_contiguous() for one in (norm.weight_D, *rows))


def _scaled(wide_ND: Tensor, inverse_N1: Tensor, norm: RMSNorm) -> Tensor:
    return (wide_ND * inverse_N1).mul_(norm.gain(wide_ND.dtype))


def norm_gradient(dy_ND: Tensor, x_ND: Tensor, inverse_N1: Tensor, norm: RMSNorm) -> Tensor:
    """Return the gradient of the input: `g / rms - x · Σ(g x) / (D rms³)` with `g = gain · dy`."""
    if _suits(norm, x_ND, dy_ND):
        dx_ND, gain_D = torch.empty_like(x_ND), norm.gain(inverse_N1.dtype)
        native.run("norm_gradient", x_ND, dy_ND, x_ND, gain_D, inverse_N1, dx_ND, inverse_N1.numel(), len(gain_D))
        return dx_ND
    wide_ND = _wide(x_ND)
    g_ND = _wide(dy_ND) * norm.gain(wide_ND.dtype)
    slope_N1 = torch.linalg.vecdot(g_ND, wide_ND).unsqueeze(-1) * inverse_N1.pow(3).div_(-x_ND.shape[-1])
    return g_ND.mul_(inverse_N1).addcmul_(wide_ND, slope_N1).to(x_ND.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and `1 / rms`; see `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm: RMSNorm, keep: Keep | None) -> Tensor:
        y_ND, inverse_N1 = normalise(x_ND, norm, keep)
        ctx.save_for_backward(x_ND, inverse_N1)
        ctx.norm = norm
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND, inverse_N1 = ctx.saved_tensors
        return norm_gradient(dy_ND, x_ND, inverse_N1, ctx.norm), None, None


def rms_norm(x: Tensor, norm: RMSNorm, keep: Keep | None = None) -> Tensor:
    """Scale rows to a root mean square of one, then by a frozen gain.

    Equals, and is tested against, `ops.reference.rms_norm`:

        out = x / sqrt(mean(x**2, -1) + epsilon) * (weight + offset)

    Args:
        x: Rows, shape (..., D).
        norm: Weight, epsilon and offset; they get no gradient.
        keep: Gives room for what backward needs.

    Returns:
        Tensor of the shape and dtype of `x`; 16-bit rows are computed in float32. Differentiable once.

    Cost:
        A pass forward and one backward, three and five where the kernels in C are missing; kept: `x` and one number a
        row.

    Example:
        >>> rms_norm(torch.tensor([[4.0, 4.0]]), RMSNorm(torch.full((2,), 3.0), 0.0)).round(decimals=4).tolist()
        [[3.0, 3.0]]

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return _RMSNorm.apply(x, norm, keep)
