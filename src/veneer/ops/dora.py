"""DoRA: a weight taken apart into magnitude and direction, the norm from the factors.

Shapes: N rows, I in, O out, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import reference
from veneer.ops.lora import autocasting, input_product, merged_weight, rank_gradient, up_gradient
from veneer.ops.product import IN_PASSING, merging_pays, product, product_onto, sum_product

_LEAST_RATIO = 1e-12
_ROWS = 128


def product_norm(weight_norm2_O: Tensor, projected_OR: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Return the row norms of `W + scaling · B A` without forming it.

    Equals, and is tested against, `ops.reference.product_norm`:

        ‖W + s B A‖² = ‖W‖² + 2 s · Σ_r B ∘ (W Aᵀ) + s² · Σ_r B ∘ (B A Aᵀ), row by row

    Args:
        weight_norm2_O: Squared row norms of W, see `weight_norm2`; constant while W is frozen.
        projected_OR: W Aᵀ.
        A_RI: Down projection; more axes than one behind the rank count as one.
        B_OR: Up projection.
        scaling: Factor of the update.

    Returns:
        Tensor (O,), dtype of B, at least float32. Where the update nearly cancels the weight, the relative error grows
        by ‖W‖² / ‖W + s B A‖².

    Cost:
        2·R²·(I + O) operations beside W Aᵀ, in the dtype of the factors, at least float32; nothing of size O·I.

    Example:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1)
        >>> product_norm(weight_norm2(W, (1,)), W @ A.T, A, B, 1.0).tolist()
        [1.0, 1.0]

    Source:
        Liu et al. 2024, arXiv:2402.09353, equation 5; expanded as in research: papers.md.
    """
    dtype = torch.promote_types(B_OR.dtype, torch.float32)
    A, B = A_RI.flatten(1).to(dtype), B_OR.to(dtype)
    # What both sums have in common: s · Σ_r B ∘ (2 W Aᵀ + s B A Aᵀ).
    added_O = torch.linalg.vecdot(B, torch.addmm(projected_OR.to(dtype), B, A @ A.T, beta=2, alpha=scaling))
    return torch.add(weight_norm2_O, added_O, alpha=scaling).clamp_min(0).sqrt().to(dtype)


def weight_norm2(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the squared norms of a weight over its inputs' axes, in float64: differences of them are taken later.

    Example:
        >>> weight_norm2(torch.ones(2, 4), (1,)).tolist()
        [4.0, 4.0]
    """
    return torch.linalg.vector_norm(weight, dim=axes, dtype=torch.float64).square()


def magnitude_ratio(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """Return `magnitude / norm`; a row whose norm is zero stays zero.

    Example:
        >>> magnitude_ratio(torch.ones(2), torch.tensor([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    return magnitude_O / torch.where(norm_O > 0, norm_O, torch.inf)


def tells_zeros(device: torch.device) -> bool:
    """Tell whether `is_far_from_zero` is asked there: a GPU would have to be waited for, and a compiler to stop.

    Example:
        >>> tells_zeros(torch.device("cpu")), tells_zeros(torch.device("meta"))
        (True, False)
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def is_far_from_zero(ratio_O: Tensor) -> bool:
    """Tell whether one can divide by all ratios, where that can be told; else no.

    Example:
        >>> is_far_from_zero(torch.tensor([1.0, 2.0])), is_far_from_zero(torch.tensor([1.0, 0.0]))
        (True, False)
    """
    return tells_zeros(ratio_O.device) and float(ratio_O.detach().abs().min()) > _LEAST_RATIO


def column_dots(a_NO: Tensor, b_NO: Tensor) -> Tensor:
    """Return `(a * b).sum(0)`, a few rows at a time, so that the sums stay in the cache; in float32 or wider.

    Example:
        >>> column_dots(torch.ones(300, 2), torch.ones(300, 2)).tolist()
        [300.0, 300.0]
    """
    dtype = torch.promote_types(a_NO.dtype, torch.float32)
    sums_PO = a_NO.new_zeros(min(_ROWS, len(a_NO)), a_NO.shape[1], dtype=dtype)
    for a_PO, b_PO in zip(a_NO.split(_ROWS), b_NO.split(_ROWS), strict=True):
        sums_PO[: len(a_PO)].addcmul_(a_PO, b_PO)
    return sums_PO.sum(0).to(a_NO.dtype)


class _DoRALinear(torch.autograd.Function):
    """Saves the input, `x Aᵀ` where it was formed, and the output without bias, before the ratio; see `dora_linear`."""

    @staticmethod
    def forward(
        x_NI: Tensor,
        W_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scaling: float,
        ratio_O: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z_NR = None
        if merging_pays(x_NI.shape[0], W_OI.shape, W_OI.dtype, IN_PASSING):
            u_NO = product(x_NI, merged_weight(W_OI, A_RI, B_OR, scaling))
        else:
            z_NR = product(x_NI, A_RI)
            u_NO = product_onto(product(z_NR * scaling, B_OR), x_NI, W_OI)
        return u_NO * ratio_O if bias_O is None else torch.addcmul(bias_O, u_NO, ratio_O), u_NO, z_NR

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        x_NI, W_OI, _, A_RI, B_OR, ctx.scaling, ratio_O = inputs
        ctx.mark_non_differentiable(*(one for one in output[1:] if one is not None))
        # Else autograd would fill a tensor of the output's size with zeros for what has no gradient.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_NI, W_OI, A_RI, B_OR, ratio_O, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_NO is None:
            return (None,) * 7
        x_NI, W_OI, A_RI, B_OR, ratio_O, u_NO, z_NR = ctx.saved_tensors
        needs_x, needs_W, needs_bias, needs_A, needs_B, _, needs_ratio = ctx.needs_input_grad
        dratio_O = column_dots(dy_NO, u_NO) if needs_ratio else None
        dbias_O = dy_NO.sum(0) if needs_bias else None
        du_NO = dy_NO * ratio_O
        dz_NR = rank_gradient(du_NO, B_OR, ctx.scaling) if needs_x or needs_A else None
        dx_NI = input_product(du_NO, dz_NR, W_OI, A_RI, B_OR, ctx.scaling) if needs_x and dz_NR is not None else None
        dA_RI = sum_product(dz_NR, x_NI) if needs_A and dz_NR is not None else None
        z_NR = product(x_NI, A_RI) if needs_B and z_NR is None else z_NR
        dB_OR = up_gradient(z_NR, du_NO, ctx.scaling) if needs_B else None
        dW_OI = du_NO.T @ x_NI if needs_W else None
        return dx_NI, dW_OI, dbias_O, dA_RI, dB_OR, None, dratio_O


def dora_linear(
    x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float, ratio_O: Tensor
) -> Tensor:
    """Apply a linear layer with its low-rank update, each output scaled by `magnitude / norm`.

    Equals, and is tested against, `ops.reference.dora_linear`:

        out = ratio * (x @ W.T + scaling * x @ A.T @ B.T) + bias

    Args:
        x_NI: Input.
        W_OI: Weight of the base layer.
        bias_O: Its bias, or None; it is not scaled.
        A_RI: Down projection.
        B_OR: Up projection.
        scaling: Factor of the update.
        ratio_O: `magnitude_ratio`.

    Returns:
        Tensor (N, O), dtype of `x`. Differentiable once.

    Cost:
        As `ops.lora.lora_linear`, three passes over (N, O), and a tensor of that size kept for the ratio's gradient. A
        frozen layer of many rows is quicker by `ops.projections.project`, which takes a ratio too.

    Example:
        >>> x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.zeros(4, 1)
        >>> dora_linear(x, W, None, A, B, 0.5, torch.full((4,), 2.0))[0].tolist()
        [6.0, 6.0, 6.0, 6.0]

    Source:
        Liu et al. 2024, arXiv:2402.09353, section 4.3 (the norm is a constant for the gradient).
    """
    if autocasting(x_NI):
        # In the dtype that autocast gives a linear layer's output.
        out_NO = reference.lora_linear(x_NI, W_OI, None, A_RI, B_OR, scaling)
        out_NO = ratio_O.to(out_NO.dtype) * out_NO
        return out_NO if bias_O is None else out_NO + bias_O.to(out_NO.dtype)
    ratio_O = ratio_O.to(x_NI.dtype)
    return _DoRALinear.apply(x_NI, W_OI, bias_O, A_RI, B_OR, scaling, ratio_O)[0]
