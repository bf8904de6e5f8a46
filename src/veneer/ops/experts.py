"""The linear layers of many experts and their low-rank updates in one step, and the ways there and back.

Shapes: T tokens, K experts of each, S = T·K rows ordered by expert, E experts, N rows of one expert, H hidden, I in,
O out, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import reference, tiles
from veneer.ops.lora import autocasting
from veneer.ops.product import add_product, product_into, product_onto
from veneer.ops.reference import rows_of_experts


class _LoRAExperts(torch.autograd.Function):
    """Saves the input, and of size S·R the projected input; see `lora_experts`.

    No product in float32 goes to oneDNN: it builds a kernel for each new number of rows (0.8 ms), and each step brings
    new ones.
    """

    @staticmethod
    def forward(
        x_SI: Tensor,
        W_EOI: Tensor,
        bias_EO: Tensor | None,
        A_ERI: Tensor,
        B_EOR: Tensor,
        scaling: float,
        counts: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        y_SO, z_SR = x_SI.new_empty(len(x_SI), W_EOI.shape[1]), x_SI.new_empty(len(x_SI), A_ERI.shape[1])
        if at_once := tiles.multiplies_each(x_SI, W_EOI, bias_EO, y_SO, counts):
            tiles.multiply_each(x_SI, W_EOI, bias_EO, y_SO, counts)
        for expert, rows in rows_of_experts(counts):
            x_NI, y_NO, z_NR = x_SI[rows], y_SO[rows], z_SR[rows]
            torch.mm(x_NI, A_ERI[expert].T, out=z_NR)
            bias_O = None if bias_EO is None else bias_EO[expert]
            if y_NO.dtype.itemsize < 4:
                update_NO = torch.mm(z_NR * scaling, B_EOR[expert].T, out=y_NO)
                y_SO[rows] = product_onto(update_NO, x_NI, W_EOI[expert], bias_O)
                continue
            if not at_once:
                product_into(y_NO, x_NI, W_EOI[expert], bias_O)
            y_NO.addmm_(z_NR, B_EOR[expert].T, alpha=scaling)
        return y_SO, z_SR

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x_SI, W_EOI, _, A_ERI, B_EOR, scaling, counts = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_SI, W_EOI, A_ERI, B_EOR, output[1])
        ctx.scaling, ctx.counts = scaling, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SO: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_SO is None:
            return (None,) * 7
        x_SI, W_EOI, A_ERI, B_EOR, z_SR = ctx.saved_tensors
        needs_x, needs_W, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dx_SI = torch.empty_like(x_SI) if needs_x else None
        dW_EOI = torch.zeros_like(W_EOI) if needs_W else None
        dbias_EO = dy_SO.new_zeros(W_EOI.shape[:2]) if needs_bias else None
        # With whole rows of it side by side in memory the BLAS is three times as fast.
        B_ERO = B_EOR.mT.contiguous()
        dA_ERI = torch.zeros_like(A_ERI) if needs_A else None
        dB_ERO = torch.zeros_like(B_ERO) if needs_B else None
        at_once = dx_SI is not None and tiles.multiplies_each(dy_SO, W_EOI.mT, None, dx_SI, ctx.counts)
        for expert, rows in rows_of_experts(ctx.counts):
            x_NI, dy_NO = x_SI[rows], dy_SO[rows]
            dz_NR = (dy_NO @ B_ERO[expert].T).mul_(ctx.scaling)
            if dx_SI is not None:
                dx_NI = torch.mm(dz_NR, A_ERI[expert], out=dx_SI[rows])
                if not at_once:
                    add_product(dx_NI, dy_NO, W_EOI[expert].T)
            if dA_ERI is not None:
                torch.mm(dz_NR.T, x_NI, out=dA_ERI[expert])
            if dB_ERO is not None:
                torch.mm(z_SR[rows].T, dy_NO, out=dB_ERO[expert])
            if dW_EOI is not None:
                torch.mm(dy_NO.T, x_NI, out=dW_EOI[expert])
            if dbias_EO is not None:
                torch.sum(dy_NO, 0, out=dbias_EO[expert])
        if at_once and dx_SI is not None:
            tiles.multiply_each(dy_SO, W_EOI.mT, None, dx_SI, ctx.counts, onto=True)
        dB_EOR = None if dB_ERO is None else dB_ERO.mul_(ctx.scaling).mT
        return dx_SI, dW_EOI, dbias_EO, dA_ERI, dB_EOR, None, None


def lora_experts(
    x_SI: Tensor,
    W_EOI: Tensor,
    bias_EO: Tensor | None,
    A_ERI: Tensor,
    B_EOR: Tensor,
    scaling: float,
    counts: Sequence[int],
) -> Tensor:
    """Apply to each expert's rows its linear layer and its low-rank update.

    Equals, and is tested against, `ops.reference.lora_experts`:

        out[rows] = x[rows] @ W[e].T + bias[e] + scaling * x[rows] @ A[e].T @ B[e].T

    Args:
        x_SI: Rows of all experts, in the order of the experts.
        W_EOI: Their weights; a transposed view will do.
        bias_EO: Their biases, or None.
        A_ERI: Down projections, dtype of `x`.
        B_EOR: Up projections, dtype of `x`.
        scaling: Factor of the updates.
        counts: Number of rows of each expert.

    Returns:
        Tensor (S, O), dtype of `x`. Differentiable once.

    Cost:
        Forward 2·S·(I·O + R·I + R·O) operations, backward the same and 2·S·R·(I + O) more where W is frozen. The only
        tensors of S rows kept for backward are `x` itself and one of S·R.

    Example:
        >>> x, W, A, B = torch.ones(3, 2), torch.ones(2, 4, 2), torch.ones(2, 1, 2), torch.ones(2, 4, 1)
        >>> lora_experts(x, W, None, A, B, 0.5, [1, 2])[:, 0].tolist()
        [3.0, 3.0, 3.0]

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1, for each expert.
    """
    if autocasting(x_SI):
        # Autocast casts each product by itself, which a function written by hand would have to imitate.
        return reference.lora_experts(x_SI, W_EOI, bias_EO, A_ERI, B_EOR, scaling, counts)
    y_SO, _ = _LoRAExperts.apply(x_SI, W_EOI, bias_EO, A_ERI, B_EOR, scaling, counts)
    return y_SO


class _SpreadRows(torch.autograd.Function):
    """Saves where rows went; see `spread_rows`."""

    @staticmethod
    def forward(x_TH: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        return x_TH[order_S // (len(back_S) // len(x_TH))]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch names them)
        x_TH, _, back_S = inputs
        ctx.save_for_backward(back_S)
        ctx.num_tokens = len(x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SH: Tensor) -> tuple[Tensor | None, ...]:
        (back_S,) = ctx.saved_tensors
        return dy_SH[back_S].unflatten(0, (ctx.num_tokens, -1)).sum(1), None, None


def spread_rows(x_TH: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
    """Give each of a token's experts a row of it, in the order of the experts.

    Equals, and is tested against, `x_TH.repeat_interleave(K, 0)[order_S]`. Its gradient reads each row where it went
    and sums up: torch's own adds rows one by one into a tensor of zeros.

    Args:
        x_TH: Tokens.
        order_S: The pair, token · K + expert's place, that each row belongs to.
        back_S: The row of each pair: the inverse of `order_S`.

    Example:
        >>> order = torch.tensor([1, 0])
        >>> spread_rows(torch.tensor([[1.0], [2.0]]), order, order.argsort()).tolist()
        [[2.0], [1.0]]
    """
    return _SpreadRows.apply(x_TH, order_S, back_S)


class _CollectRows(torch.autograd.Function):
    """Saves the rows, the weights and where rows go; see `collect_rows`."""

    @staticmethod
    def forward(rows_SH: Tensor, weights_TK: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:  # noqa: ARG004
        rows_TKH = rows_SH[back_S].unflatten(0, weights_TK.shape)
        return (rows_TKH * weights_TK[..., None]).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 (torch names them)
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        rows_SH, weights_TK, order_S, back_S = ctx.saved_tensors
        drows_SH = dweights_TK = None
        dy_SH = dy_TH[order_S // weights_TK.shape[1]]
        if ctx.needs_input_grad[1]:
            dots_S = torch.linalg.vecdot(dy_SH, rows_SH.to(dy_SH.dtype))
            dweights_TK = dots_S[back_S].view(weights_TK.shape).to(weights_TK.dtype)
        if ctx.needs_input_grad[0]:
            drows_SH = dy_SH.mul_(weights_TK.reshape(-1)[order_S][:, None]).to(rows_SH.dtype)
        return drows_SH, dweights_TK, None, None


def collect_rows(rows_SH: Tensor, weights_TK: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
    """Sum up what a token's experts made of it, by its weights; the way back of `spread_rows`.

    Equals, and is tested against:

        out = (rows_SH[back_S].view(T, K, H) * weights_TK[:, :, None]).sum(1)

    Args:
        rows_SH: Rows in the order of the experts.
        weights_TK: The weight of each token's experts.
        order_S: As in `spread_rows`.
        back_S: As in `spread_rows`.

    Returns:
        Tensor (T, H), of the wider dtype. Differentiable once.

    Example:
        >>> order = torch.tensor([1, 0])
        >>> collect_rows(torch.tensor([[2.0], [1.0]]), torch.full((1, 2), 0.5), order, order.argsort()).tolist()
        [[1.5]]
    """
    return _CollectRows.apply(rows_SH, weights_TK, order_S, back_S)
