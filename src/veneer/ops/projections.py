"""Linear layers that share their input, and those behind a gate: little is kept, the rest is computed again.

Shapes: N rows, I in, O out, R rank, Q the ranks of several layers side by side, F gate.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.dora import column_dots
from veneer.ops.dropout import Dropout
from veneer.ops.frozen import (
    FrozenWeight,
    Update,
    apply_transposed,
    apply_weight,
    down_products,
    update_of,
)
from veneer.ops.gates import Activation, gated, gated_gradient
from veneer.ops.keeping import Keep, room
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
        ratio: DoRA's `magnitude / norm` of each output (O,), which scales all but the bias; none of them zero.
    """

    weight: FrozenWeight
    bias: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    scaling: float = 1.0
    dropout: Dropout | None = None
    ratio: Tensor | None = None


class _Trained(NamedTuple):
    """What autograd has to see of a projection by itself."""

    A_RI: Tensor | None
    B_OR: Tensor | None
    ratio_O: Tensor | None


_NOTHING = _Trained(None, None, None)


def _trained(projections: Sequence[Projection]) -> list[Tensor | None]:
    """Return A, B and ratio of each projection in turn, None for those without; a ratio in 32 bits at least."""
    found: list[Tensor | None] = []
    for one in projections:
        A_RI, B_OR = one.factors or (None, None)
        ratio_O = one.ratio
        if ratio_O is not None and A_RI is not None:
            ratio_O = ratio_O.to(torch.promote_types(A_RI.dtype, torch.float32))
        found += [A_RI, B_OR, ratio_O]
    return found


def _each(flat: Sequence[Tensor | None]) -> list[_Trained]:
    """Undo `_trained`."""
    return [_Trained(*parts) for parts in zip(flat[::3], flat[1::3], flat[2::3], strict=True)]


def _frozen(one: Projection) -> Projection:
    """Return what autograd does not have to see."""
    return replace(one, factors=None, ratio=None)


class _Way(NamedTuple):
    """What a projection computes with for some inputs: with a ratio, both are scaled by it."""

    weight: FrozenWeight
    update: Update | None


def _way(one: Projection, x_NI: Tensor, trained: _Trained) -> _Way:
    A_RI, B_OR, ratio_O = trained
    weight = one.weight if ratio_O is None else replace(one.weight, ratio_O=ratio_O)
    if A_RI is None or B_OR is None:
        return _Way(weight, None)
    return _Way(weight, update_of(x_NI, A_RI, _times(B_OR, ratio_O), one.scaling, one.dropout))


def _times(B_OR: Tensor, ratio_O: Tensor | None) -> Tensor:
    return B_OR if ratio_O is None else (B_OR * ratio_O[:, None]).to(B_OR.dtype)


def _with_bias(v_NO: Tensor, bias_O: Tensor | None, keep: Keep | None) -> Tensor:
    """Return an output that was scaled with the bias, which was not, where a caller keeps such."""
    return v_NO if bias_O is None else torch.add(v_NO, bias_O, out=room(keep, v_NO.shape, v_NO))


def _gradients(
    trained: _Trained, of_update: tuple[Tensor | None, Tensor | None], dy_NO: Tensor, v_NO: Tensor | None
) -> _Trained:
    """Return the gradients of A, B and ratio from those of the update, and from the output less its bias."""
    (dA_RI, dB_OR), ratio_O = of_update, trained.ratio_O
    dratio_O = None if v_NO is None or ratio_O is None else column_dots(dy_NO, v_NO) / ratio_O
    return _Trained(dA_RI, None if dB_OR is None else _times(dB_OR, ratio_O), dratio_O)


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
    """Keeps the input before the norm and `1 / rms`, and outputs that a ratio scales; see `project`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        norm: RMSNorm | None,
        frozen: Sequence[Projection],
        keep: Keep | None,
        kept: Collection[int],
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y_NI, inverse_N1 = (x_NI, None) if norm is None else normalise(x_NI, norm, keep)
        every = _each(flat)
        ways = [_way(one, y_NI, trained) for one, trained in zip(frozen, every, strict=True)]
        z = down_products(y_NI, [way.weight for way in ways], [way.update for way in ways])
        outs, scaled = [], []
        for place, (one, trained, way, z_NR) in enumerate(zip(frozen, every, ways, z, strict=True)):
            behind = keep if place in kept else None
            if trained.ratio_O is None:
                outs.append(apply_weight(y_NI, way.weight, one.bias, way.update, behind, z_NR))
                continue
            scaled.append(apply_weight(y_NI, way.weight, None, way.update, keep, z_NR))
            outs.append(_with_bias(scaled[-1], one.bias, behind))
        ctx.save_for_backward(x_NI, inverse_N1, *flat, *scaled)
        ctx.norm, ctx.frozen = norm, frozen
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        x_NI, inverse_N1, *saved = ctx.saved_tensors
        norm: RMSNorm | None = ctx.norm
        every, scaled = _each(saved[: 3 * len(ctx.frozen)]), iter(saved[3 * len(ctx.frozen) :])
        ways = [_way(one, x_NI, trained) for one, trained in zip(ctx.frozen, every, strict=True)]
        updates = [way.update for way in ways]
        dz = [
            None if update is None else rank_gradient(part, update.B_OR, update.scaling)
            for part, update in zip(dy, updates, strict=True)
        ]
        gradients: list[_Trained] = [_NOTHING] * len(ways)
        if any(ctx.needs_input_grad[5:]):
            normed_NI = x_NI if norm is None else renormalise(x_NI, inverse_N1, norm)
            v = [None if trained.ratio_O is None else next(scaled) for trained in every]
            found = _factor_gradients(normed_NI, dz, dy, updates)
            gradients = [_gradients(*parts) for parts in zip(every, found, dy, v, strict=True)]
        dx_NI: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for way, part, dz_NR in zip(ways, dy, dz, strict=True):
                dx_NI = apply_transposed(part, way.weight, way.update, dz_NR, dx_NI)
            if norm is not None and dx_NI is not None:
                dx_NI = norm_gradient(dx_NI, x_NI, inverse_N1, norm)
        return dx_NI, None, None, None, None, *(part for trained in gradients for part in trained)


def project(
    x_NI: Tensor,
    projections: Sequence[Projection],
    norm: RMSNorm | None = None,
    keep: Keep | None = None,
    kept: Collection[int] = (),
) -> tuple[Tensor, ...]:
    """Apply several linear layers with their updates to one input, normalised first where there is a norm.

    Equals, and is tested against, the same made of `ops.reference.rms_norm` and `ops.reference.lora_linear`:

        y = rms_norm(x); outs = [ratio * (y @ W.T + scaling * dropped(y) @ A.T @ B.T) + bias for each]

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
        a row; the normalised input is computed again, and what was dropped is drawn again. A ratio costs a pass over
        the weight each way, one over (N, O), and that the output without its bias is kept.

    Example:
        >>> weight = FrozenWeight(torch.Size([2, 3]), torch.ones(2, 3))
        >>> [out.tolist() for out in project(torch.ones(1, 3), [Projection(weight), Projection(weight)])]
        [[[3.0, 3.0]], [[3.0, 3.0]]]

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; the ratio: Liu et al. 2024, arXiv:2402.09353, section 4.3 (the
        norm is a constant for the gradient).
    """
    frozen = [_frozen(one) for one in projections]
    return _Projections.apply(x_NI, norm, frozen, keep, kept, *_trained(projections))


class _GatedProjection(torch.autograd.Function):
    """Keeps gate and up, and the output where a ratio scales it; see `gated_projection`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_NF: Tensor,
        up_NF: Tensor,
        activation: Activation,
        frozen: Projection,
        keep: Keep | None,
        filled: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        (trained,) = _each(flat)
        scaled = trained.ratio_O is not None
        if filled or scaled:
            h_NF = gated(gate_NF, up_NF, activation)
            weight, update = _way(frozen, h_NF, trained)
            v_NO = apply_weight(h_NF, weight, None if scaled else frozen.bias, update, keep)
        else:
            v_NO = gate_NF.new_empty(len(gate_NF), frozen.weight.shape[0])
        ctx.save_for_backward(gate_NF, up_NF, *flat, v_NO if scaled else None)
        ctx.activation, ctx.frozen = activation, frozen
        return _with_bias(v_NO, frozen.bias, keep) if scaled else v_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Any, ...]:
        gate_NF, up_NF, *flat, v_NO = ctx.saved_tensors
        (trained,) = _each(flat)
        weight, update = _way(ctx.frozen, gate_NF, trained)
        dz_NR = None if update is None else rank_gradient(dy_NO, update.B_OR, update.scaling)
        gradients = _NOTHING
        if any(ctx.needs_input_grad[6:]):
            (found,) = _factor_gradients(gated(gate_NF, up_NF, ctx.activation), [dz_NR], [dy_NO], [update])
            gradients = _gradients(trained, found, dy_NO, v_NO)
        dgate_NF = dup_NF = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dh_NF = apply_transposed(dy_NO, weight, update, dz_NR)
            dgate_NF, dup_NF = dh_NF, torch.empty_like(dh_NF)
            gated_gradient(dh_NF, gate_NF, up_NF, ctx.activation, (dgate_NF, dup_NF))
        return dgate_NF, dup_NF, None, None, None, None, *gradients


def gated_projection(
    gate_NF: Tensor,
    up_NF: Tensor,
    activation: Activation,
    projection: Projection,
    keep: Keep | None = None,
    *,
    filled: bool = True,
) -> Tensor:
    """Apply a linear layer with its update to a gated input.

    Equals, and is tested against, the same made of torch's activation and `ops.reference.lora_linear`:

        h = activation(gate) * up; out = ratio * (h @ W.T + scaling * dropped(h) @ A.T @ B.T) + bias

    Args:
        gate_NF: What the activation takes.
        up_NF: What it is multiplied with.
        activation: One of `ops.gates.ACTIVATIONS`.
        projection: The layer; weight and bias get no gradient.
        keep: Gives room for the output.
        filled: False where the output is known, and only its backward is wanted: it is not computed then.

    Returns:
        Tensor (N, O). Differentiable once.

    Cost:
        As `lora_linear`, `gated` twice and `gated_gradient`. Kept for backward: gate and up; the
        product of both is computed again. Dropout and a ratio cost what they cost in `project`.

    Example:
        >>> from veneer.ops.gates import ACTIVATIONS
        >>> down = Projection(FrozenWeight(torch.Size([1, 2]), torch.ones(1, 2)))
        >>> gated_projection(torch.ones(1, 2), torch.ones(1, 2), ACTIVATIONS["relu"], down).tolist()
        [[2.0]]

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 5; the backward after the idea of Liger Kernel, arXiv:2410.10989.
    """
    return _GatedProjection.apply(
        gate_NF, up_NF, activation, _frozen(projection), keep, filled, *_trained([projection])
    )
