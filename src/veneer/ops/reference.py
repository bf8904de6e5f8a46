"""Every operation in its plainest form: the specification that the fast paths must equal.

Shapes: N rows, I in, O out, R rank, S rows of all E experts in their order, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

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


def rows_of_experts(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, each with its rows.

    Example:
        >>> list(rows_of_experts([2, 0, 3]))
        [(0, slice(0, 2, None)), (2, slice(2, 5, None))]
    """
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def linear_experts(x_SI: Tensor, W_EOI: Tensor, bias_EO: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Return `x Wᵀ + bias` with each expert's weight for its own rows, shape (S, O)."""
    weights = W_EOI.unbind()  # once: an index would give each expert's gradient the size of the stack
    biases = [None] * len(weights) if bias_EO is None else bias_EO.unbind()
    return torch.cat([F.linear(x_SI[rows], weights[one], biases[one]) for one, rows in rows_of_experts(counts)])


def lora_experts(
    x_SI: Tensor,
    W_EOI: Tensor,
    bias_EO: Tensor | None,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    counts: Sequence[int],
) -> Tensor:
    """Return `lora_linear` with each expert's weight and factors for its own rows, shape (S, O)."""
    z_SR = linear_experts(x_SI, A_ERI, None, counts)
    return linear_experts(x_SI, W_EOI, bias_EO, counts) + scaling * linear_experts(z_SR, B_EOR, None, counts)


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


def lora_conv(
    x: Tensor,
    W: Tensor,
    bias_O: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    ratio_O: Tensor | None,
    convolve: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return `ratio · (conv(x, W) + scaling · conv1x1(conv(x, A), B)) + bias`, shape (N, O, …).

    `convolve` takes an input and a kernel: it knows stride, padding, dilation and groups.
    """
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    out = convolve(x, W) + scaling * pointwise(convolve(x, A), B, groups=len(A) // B.shape[1])
    axis = (-1, *(1,) * (x.ndim - 2))
    out = out if ratio_O is None else ratio_O.view(axis) * out
    return out if bias_O is None else out + bias_O.view(axis)


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


def causal_attention(q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Return the attention of one sequence, shape (S, H, E): each token sees the last `window` up to itself."""
    group, length = q_SHE.shape[1] // k_SKE.shape[1], q_SHE.shape[0]
    k_SHE, v_SHE = (part.repeat_interleave(group, dim=1) for part in (k_SKE, v_SKE))
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    unseen_SS = (distance_SS < 0) | (distance_SS >= (window or length))
    scores_HSS = torch.einsum("she,lhe->hsl", q_SHE, k_SHE) * scaling
    return torch.einsum("hsl,lhe->she", scores_HSS.masked_fill(unseen_SS, float("-inf")).softmax(-1), v_SHE)
