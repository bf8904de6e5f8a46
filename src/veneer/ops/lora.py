"""A linear layer and its low-rank update in one step, with a hand-written backward.

Shapes: N rows, I in, O out, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import native, reference
from veneer.ops.product import laid_out, merging_pays, product, product_onto, sum_product


def autocasting(x: Tensor) -> bool:
    """Tell whether autocast acts on a tensor's device; asking a device without autocast, such as meta, is an error.

    Example:
        >>> autocasting(torch.ones(1)), autocasting(torch.ones(1, device="meta"))
        (False, False)
    """
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def merged_weight(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, ratio_O: Tensor | None = None) -> Tensor:
    """Return `ratio · W + s B A` in W's layout, transposed or not; no gradient of its own.

    Cost:
        One pass over W in float32 on the CPU; a copy, a product onto it and, with a ratio, one more pass where the
        kernels in C are missing.

    Example:
        >>> merged_weight(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1), 0.5, torch.tensor([2.0])).tolist()
        [[2.5, 2.5]]
    """
    if W_OI.dtype == torch.float32 and W_OI.is_contiguous() and native.suits(W_OI, A_RI, B_OR):
        given = [one.contiguous() for one in (A_RI, B_OR)]
        ratio: Tensor | int = 0 if ratio_O is None else ratio_O.float().contiguous()
        out_OI = torch.empty_like(W_OI)
        native.run("merged", W_OI, W_OI, *given, ratio, float(scaling), out_OI, *W_OI.shape, len(A_RI))
        return out_OI
    if ratio_O is not None:
        W_OI = (W_OI * ratio_O[:, None]).to(W_OI.dtype)
    if W_OI.T.is_contiguous():
        return torch.addmm(W_OI.T, A_RI.T, B_OR.T, alpha=scaling).T
    return torch.addmm(W_OI, B_OR, A_RI, alpha=scaling)


def linear_product(
    x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Return `x (W + s B A)ᵀ + bias` in the cheaper order, and `x Aᵀ` where it was formed; no gradient of its own.

    The large product is torch's own: while B is zero, the output is the base's, bit for bit.
    """
    if merging_pays(x_NI.shape[0], W_OI.shape, W_OI.dtype):
        return F.linear(x_NI, merged_weight(W_OI, A_RI, B_OR, scaling), bias_O), None
    z_NR = product(x_NI, A_RI)
    if W_OI.dtype.itemsize < 4:
        return product_onto(product(z_NR * scaling, B_OR), x_NI, W_OI, bias_O), z_NR
    return F.linear(x_NI, W_OI, bias_O).addmm_(z_NR, B_OR.T, alpha=scaling), z_NR


def input_product(dy_NO: Tensor, dz_NR: Tensor, W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Return `dy (W + s B A)` in the cheaper order; `dz` is `s · dy B`."""
    if merging_pays(dy_NO.shape[0], W_OI.shape, W_OI.dtype):
        return product(dy_NO, merged_weight(W_OI, A_RI, B_OR, scaling).T)
    return product_onto(dz_NR @ A_RI, dy_NO, W_OI.T)


def rank_gradient(dy_NO: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Return `s · dy B`, the gradient of `x Aᵀ`, shape (N, R)."""
    return product(dy_NO, laid_out(B_OR.T)).mul_(scaling)


def up_gradient(z_NR: Tensor, dy_NO: Tensor, scaling: float) -> Tensor:
    """Return `s · dyᵀ z`, the gradient of B, shape (O, R); `z` is `x Aᵀ`."""
    return sum_product(z_NR, dy_NO).mul_(scaling).T


class _LoRALinear(torch.autograd.Function):
    """Saves the input, and `x Aᵀ` where it was formed; see `lora_linear`."""

    @staticmethod
    def forward(
        x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        return linear_product(x_NI, W_OI, bias_O, A_RI, B_OR, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x_NI, W_OI, _, A_RI, B_OR, scaling = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x_NI, W_OI, A_RI, B_OR, output[1])
        ctx.scaling = scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NI, W_OI, A_RI, B_OR, z_NR = ctx.saved_tensors
        needs_x, needs_W, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        dz_NR = rank_gradient(dy_NO, B_OR, ctx.scaling) if needs_x or needs_A else None
        dx_NI = input_product(dy_NO, dz_NR, W_OI, A_RI, B_OR, ctx.scaling) if needs_x and dz_NR is not None else None
        dA_RI = sum_product(dz_NR, x_NI) if needs_A and dz_NR is not None else None
        # Where weights were merged, x Aᵀ was not needed: 2·N·I·R operations are cheaper than to form it forward.
        z_NR = product(x_NI, A_RI) if needs_B and z_NR is None else z_NR
        dB_OR = up_gradient(z_NR, dy_NO, ctx.scaling) if needs_B else None
        dW_OI = dy_NO.T @ x_NI if needs_W else None
        dbias_O = dy_NO.sum(0) if needs_bias else None
        return dx_NI, dW_OI, dbias_O, dA_RI, dB_OR, None


def lora_linear(x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Apply a linear layer and its low-rank update.

    Equals, and is tested against, `ops.reference.lora_linear`:

        out = x @ W.T + bias + scaling * x @ A.T @ B.T

    Args:
        x: Input, shape (..., I).
        W_OI: Weight of the base layer.
        bias_O: Its bias, or None.
        A_RI: Down projection, dtype of `x`.
        B_OR: Up projection, dtype of `x`.
        scaling: Factor of the update.

    Returns:
        Tensor (..., O), dtype of `x`. Differentiable once.

    Cost:
        Where rows are many, forward and input gradient are products with `W + s B A`, formed on the fly: 2·N·I·O and
        2·R·I·O operations each, and one tensor of W's size; where they are few, 2·N·R·(I + O) instead of 2·R·I·O.
        The gradients of A and B take 4·N·R·(I + O). Kept for backward: `x` itself and, where rows are few, `x Aᵀ`.

    Example:
        >>> x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
        >>> lora_linear(x, W, None, A, B, 0.5)[0].tolist()
        [4.5, 4.5, 4.5, 4.5]

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; the orders after Cherniuk et al. 2023, RunLoRA,
        arXiv:2312.03415, section 3. Differs: a measured rule chooses, `ops.product.merging_pays`.
    """
    if autocasting(x):
        # Autocast casts each product by itself, which a function written by hand would have to imitate.
        return reference.lora_linear(x, W_OI, bias_O, A_RI, B_OR, scaling)
    y_NO, _ = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), W_OI, bias_O, A_RI, B_OR, scaling)
    return y_NO.view(*x.shape[:-1], W_OI.shape[0])


class _LinearOnto(torch.autograd.Function):
    """Saves the input and the weight; see `linear_onto`."""

    @staticmethod
    def forward(plus_NO: Tensor, x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return product_onto(plus_NO.clone(), x_NI, W_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch names them)
        _, x_NI, W_OI, _ = inputs
        ctx.save_for_backward(x_NI, W_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, W_OI = ctx.saved_tensors
        needs_plus, needs_x, needs_W, needs_bias = ctx.needs_input_grad
        dx_NI = product(dy_NO, W_OI.T) if needs_x else None
        dW_OI = dy_NO.T @ x_NI if needs_W else None
        return dy_NO if needs_plus else None, dx_NI, dW_OI, dy_NO.sum(0) if needs_bias else None


def linear_onto(plus_NO: Tensor, x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Apply a linear layer and add its output to a tensor before it is rounded.

    Equals, and is tested against, `plus + F.linear(x, W, bias)` in a wider dtype; see `ops.product.product_onto`.

    Args:
        plus_NO: What is added, such as an update; dtype of `x`.
        x_NI: Input.
        W_OI: Weight.
        bias_O: Bias, or None.

    Returns:
        Tensor (N, O), dtype of `x`. Differentiable once.

    Example:
        >>> linear_onto(torch.ones(1, 2), torch.ones(1, 3), torch.ones(2, 3), None).tolist()
        [[4.0, 4.0]]
    """
    return _LinearOnto.apply(plus_NO, x_NI, W_OI, bias_O)


class _AddLoRA(torch.autograd.Function):
    """Saves the input and `x Aᵀ`; see `add_lora`."""

    @staticmethod
    def forward(y_NO: Tensor, x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        z_NR = product(x_NI, A_RI)
        return torch.addmm(y_NO, z_NR, B_OR.T, alpha=scaling), z_NR

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x_NI, A_RI, B_OR, ctx.scaling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x_NI, A_RI, B_OR, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, A_RI, B_OR, z_NR = ctx.saved_tensors
        needs_y, needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
        dz_NR = rank_gradient(dy_NO, B_OR, ctx.scaling) if needs_x or needs_A else None
        dx_NI = dz_NR @ A_RI if needs_x and dz_NR is not None else None
        dA_RI = sum_product(dz_NR, x_NI) if needs_A and dz_NR is not None else None
        dB_OR = up_gradient(z_NR, dy_NO, ctx.scaling) if needs_B else None
        return dy_NO if needs_y else None, dx_NI, dA_RI, dB_OR, None


def add_lora(y_NO: Tensor, x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Add a low-rank update to the output of any linear layer.

    Equals, and is tested against, `y + ops.reference.lora_delta(x, A, B, scaling)`, without two tensors of its size.

    Args:
        y_NO: What the layer made of `x`.
        x_NI: Its input.
        A_RI: Down projection, dtype of `x`.
        B_OR: Up projection, dtype of `x`.
        scaling: Factor of the update.

    Example:
        >>> x, A, B = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
        >>> add_lora(torch.zeros(2, 4), x, A, B, 0.5)[0].tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    if y_NO.dtype != x_NI.dtype:  # a layer that answers in another dtype, or autocast
        return y_NO + reference.lora_delta(x_NI, A_RI, B_OR, scaling)
    return _AddLoRA.apply(y_NO, x_NI, A_RI, B_OR, scaling)[0]
