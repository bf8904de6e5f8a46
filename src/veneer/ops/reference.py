"""Every operation in its plainest form: the specification that the fast paths must equal.

Shapes: N rows, I in, O out, R rank, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> Tensor:
    """Return `x Wᵀ + bias + scaling · x Aᵀ Bᵀ`, shape (N, O)."""
    return F.linear(x_NI, W_OI, bias_O) + scaling * (x_NI @ A_RI.T @ B_OR.T)


def lora_delta(x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Return `scaling · x Aᵀ Bᵀ`, shape (N, O)."""
    return scaling * (x_NI @ A_RI.T @ B_OR.T)


def linear_cross_entropy(x_ND: Tensor, W_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """Return the summed cross-entropy of `softmax(x Wᵀ + bias)` against the targets, a scalar."""
    return F.cross_entropy(F.linear(x_ND, W_VD, bias_V), targets_N, reduction="sum")


def product_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Return the norm of each row of `W + scaling · B A`, shape (O,)."""
    return torch.linalg.norm(W_OI + scaling * (B_OR @ A_RI), dim=1)


def dora_linear(
    x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float, ratio_O: Tensor
) -> Tensor:
    """Return `ratio · (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias`, shape (N, O)."""
    out_NO = ratio_O * (F.linear(x_NI, W_OI) + scaling * (x_NI @ A_RI.T @ B_OR.T))
    return out_NO if bias_O is None else out_NO + bias_O


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """Return `x / sqrt(mean(x²) + epsilon) · (weight + offset)`, the mean over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight_D + offset)


def rotate(x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Return heads of which the first C numbers are turned by the angles of their positions, shape (T, H, E)."""
    size = cos_TC.shape[-1]
    turned, rest = x_THE[..., :size], x_THE[..., size:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos_TC[:, None] + torch.cat([-high, low], dim=-1) * sin_TC[:, None]
    return torch.cat([turned, rest], dim=-1)
