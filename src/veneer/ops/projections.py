"""Linear layers that share their input, and those behind a gate: little is kept, the rest is computed again.

Shapes: N rows, I in, O out, R rank, Q the ranks of several layers side by side, F gate.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.dropout import Dropout
from veneer.ops.frozen import FrozenWeight, Update, apply_transposed, apply_weight, down_products, update_of
from veneer.ops.gates import Activation
from veneer.ops.keeping import Keep
from veneer.ops.lora import rank_gradient, up_gradient
from veneer.ops.norm import RMSNorm, norm_gradient, normalise, renormalise
from veneer.ops.product import product, sum_product


@dataclass(frozen=True, eq=False)
class Projection:
    """A frozen linear layer and, where it is adapted, its update.

    Args:
        weight: The frozen weight.
        bias: The frozen bias, or None.
        factors: A (R, I) and B (O, R) in the dtype that is computed in, or None.
        scaling: Factor of the update.
        dropout: What zeroes inputs of the update, or None.
    """

    weight: FrozenWeight
    bias: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    scaling: float = 1.0
    dropout: Dropout | None = None


def _without_factors(one: Projection) -> Projection:
    """Return what autograd does not have to see."""
    return replace(one, factors=None)


def _update(one: Projection, x_NI: Tensor, A_RI: Tensor | None, B_OR: Tensor | None) -> Update | None:
    """Return the update for some inputs, or None where there is none."""
    return None if A_RI is None or B_OR is None else update_of(x_NI, A_RI, B_OR, one.scaling, one.dropout)


def _factors(projections: Sequence[Projection]) -> list[Tensor | None]:
    """Return A and B of each projection in turn, None for those without."""
    return [part for one in projections for part in (one.factors or (None, None))]


def _pairs(flat: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _factor_gradients(
    x_NI: Tensor, dz: Sequence[Tensor | None], dy: Sequence[Tensor], updates: Sequence[Update | None]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return dA and dB of each projection: one product with all A's that read the same inputs, one for all dA."""
    found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(updates)
    alike: list[tuple[int, Update, Tensor]] = []
    for place, (update, dz_NR) in enumerate(zip(updates, dz, strict=True)):
        if update is None or dz_NR is None:
            continue
        if update.kept_NI is None:
            alike.append((place, update, dz_NR))
            continue
        left_NI = update.inputs(x_NI)
        dB_OR = up_gradient(product(left_NI, update.A_RI), dy[place], update.scaling)
        found[place] = sum_product(dz_NR, left_NI), dB_OR
    if not alike:
        return found
    z_NQ = product(x_NI, torch.cat([update.A_RI for _, update, _ in alike]))
    dA_QI = sum_product(torch.cat([dz_NR for _, _, dz_NR in alike], dim=1), x_NI)
    start = 0
    for place, update, dz_NR in alike:
        stop = start + dz_NR.shape[1]
        found[place] = dA_QI[start:stop], up_gradient(z_NQ[:, start:stop], dy[place], update.scaling)
        start = stop
    return found


class _Projections(torch.autograd.Function):
    """Keeps the input before the norm and `1 / rms`; see `project`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        norm: RMSNorm | None,
        frozen: Sequence[Projection],
        keep: Keep | None,
        kept: Collection[int],
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y_NI, inverse_N1 = (x_NI, None) if norm is None else normalise(x_NI, norm, keep)
        updates = [_update(one, y_NI, *pair) for one, pair in zip(frozen, _pairs(factors), strict=True)]
        z = down_products(y_NI, [one.weight for one in frozen], updates)
        outs = tuple(
            apply_weight(y_NI, one.weight, one.bias, update, keep if place in kept else None, z_NR)
            for place, (one, update, z_NR) in enumerate(zip(frozen, updates, z, strict=True))
        )
        ctx.save_for_backward(x_NI, inverse_N1, *factors)
        ctx.norm, ctx.frozen = norm, frozen
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        x_NI, inverse_N1, *factors = ctx.saved_tensors
        norm: RMSNorm | None = ctx.norm
        updates = [_update(one, x_NI, *pair) for one, pair in zip(ctx.frozen, _pairs(factors), strict=True)]
        dz = [
            None if update is None else rank_gradient(part, update.B_OR, update.scaling)
            for part, update in zip(dy, updates, strict=True)
        ]
        gradients: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(updates)
        if any(ctx.needs_input_grad[5:]):
            normed_NI = x_NI if norm is None else renormalise(x_NI, inverse_N1, norm)
            gradients = _factor_gradients(normed_NI, dz, dy, updates)
        dx_NI: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for one, part, update, dz_NR in zip(ctx.frozen, dy, updates, dz, strict=True):
                dx_NI = apply_transposed(part, one.weight, update, dz_NR, dx_NI)
            if norm is not None and dx_NI is not None:
                dx_NI = norm_gradient(dx_NI, x_NI, inverse_N1, norm)
        return dx_NI, None, None, None, None, *(part for pair in gradients for part in pair)


def project(
    x_NI: Tensor,
    projections: Sequence[Projection],
    norm: RMSNorm | None = None,
    keep: Keep | None = None,
    kept: Collection[int] = (),
) -> tuple[Tensor, ...]:
    """Apply several linear layers with their updates to one input, normalised first where there is a norm.

    Equals, and is tested against, the same made of `ops.reference.rms_norm` and `ops.reference.lora_linear`:

        y = rms_norm(x); outs = [y @ W.T + bias + scaling * dropped(y) @ A.T @ B.T for each]

    Args:
        x_NI: Input.
        projections: The layers; weights and biases get no gradient.
        norm: What the input goes through first.
        keep: Gives room for what backward needs.
        kept: Which of the outputs, by place, something behind needs for its backward.

    Returns:
        One tensor (N, O) for each layer. Differentiable once.

    Cost:
        As `lora_linear` for each, with one skinny product `y Aᵀ` each way and one `dA` for all of them; with dropout
        each its own, beside the weight, and two passes over its inputs each way. Kept for backward: `x`, and one number
        a row; the normalised input is computed again, and what was dropped is drawn again.

    Example:
        >>> weight = FrozenWeight(torch.Size([2, 3]), torch.ones(2, 3))
        >>> [out.tolist() for out in project(torch.ones(1, 3), [Projection(weight), Projection(weight)])]
        [[[3.0, 3.0]], [[3.0, 3.0]]]
    """
    frozen = [_without_factors(one) for one in projections]
    return _Projections.apply(x_NI, norm, frozen, keep, kept, *_factors(projections))


class _GatedProjection(torch.autograd.Function):
    """Keeps gate and up; see `gated_projection`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_NF: Tensor,
        up_NF: Tensor,
        activation: Activation,
        frozen: Projection,
        keep: Keep | None,
        A_RF: Tensor | None,
        B_OR: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF, A_RF, B_OR)
        ctx.activation, ctx.frozen = activation, frozen
        h_NF = activation.forward(gate_NF).mul_(up_NF)
        return apply_weight(h_NF, frozen.weight, frozen.bias, _update(frozen, h_NF, A_RF, B_OR), keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Any, ...]:
        gate_NF, up_NF, A_RF, B_OR = ctx.saved_tensors
        frozen: Projection = ctx.frozen
        update = _update(frozen, gate_NF, A_RF, B_OR)
        dz_NR = None if update is None else rank_gradient(dy_NO, update.B_OR, update.scaling)
        active_NF = ctx.activation.forward(gate_NF)
        dA_RF, dB_OR = None, None
        if any(ctx.needs_input_grad[5:]):
            ((dA_RF, dB_OR),) = _factor_gradients(active_NF * up_NF, [dz_NR], [dy_NO], [update])
        dgate_NF = dup_NF = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dh_NF = apply_transposed(dy_NO, frozen.weight, update, dz_NR)
            dup_NF = active_NF.mul_(dh_NF)
            dgate_NF = ctx.activation.backward(dh_NF.mul_(up_NF), gate_NF, dh_NF)
        return dgate_NF, dup_NF, None, None, None, dA_RF, dB_OR


def gated_projection(
    gate_NF: Tensor, up_NF: Tensor, activation: Activation, projection: Projection, keep: Keep | None = None
) -> Tensor:
    """Apply a linear layer with its update to a gated input.

    Equals, and is tested against, the same made of torch's activation and `ops.reference.lora_linear`:

        h = activation(gate) * up; out = h @ W.T + bias + scaling * h @ A.T @ B.T

    Args:
        gate_NF: What the activation takes.
        up_NF: What it is multiplied with.
        activation: One of `ops.gates.ACTIVATIONS`.
        projection: The layer; weight and bias get no gradient.
        keep: Gives room for the output.

    Returns:
        Tensor (N, O). Differentiable once.

    Cost:
        As `lora_linear`, and two passes over (N, F) forward, five backward. Kept for backward: gate and up; the
        product of both is computed again.

    Example:
        >>> from veneer.ops.gates import ACTIVATIONS
        >>> down = Projection(FrozenWeight(torch.Size([1, 2]), torch.ones(1, 2)))
        >>> gated_projection(torch.ones(1, 2), torch.ones(1, 2), ACTIVATIONS["relu"], down).tolist()
        [[2.0]]

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 5; the backward after the idea of Liger Kernel, arXiv:2410.10989.
    """
    return _GatedProjection.apply(
        gate_NF, up_NF, activation, _without_factors(projection), keep, *(projection.factors or (None, None))
    )
