"""LoRA on a linear layer: torch's, transformers' Conv1D, or one whose weight is quantised."""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.nn.layer import LoRALayer, has_hooks
from veneer.nn.slots import Slot
from veneer.ops.dora import dora_linear, is_far_from_zero, magnitude_ratio, product_norm, tells_zeros
from veneer.ops.dropout import draw_dropout
from veneer.ops.frozen import FrozenWeight, weight_product
from veneer.ops.lora import add_lora, autocasting, linear_onto, lora_linear
from veneer.ops.product import IN_PASSING, merging_pays
from veneer.ops.projections import Projection, project
from veneer.ops.reference import lora_delta
from veneer.storage.layer import StoredLinear

_CONV1D = "transformers.pytorch_utils.Conv1D"  # by name: this layer knows no transformers


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether calling a module is `F.linear` and nothing else: no subclass, no hook, no forward of its own.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> is_plain_linear(layer)
        True
        >>> _ = layer.register_forward_hook(lambda *_: None)
        >>> is_plain_linear(layer)
        False
    """
    return type(module) is nn.Linear and not has_hooks(module)


def is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D: a linear layer that stores (in, out); known without importing it.

    Example:
        >>> is_transposed_linear(nn.Linear(1, 1))
        False
    """
    return any(_full_name(one) == _CONV1D for one in type(module).__mro__)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def plain_weight(module: nn.Module) -> Tensor | None:
    """Return the (out, in) weight of a layer that is `F.linear` with it and nothing else, or None where it is more.

    Example:
        >>> plain_weight(nn.Linear(2, 3)).shape
        torch.Size([3, 2])
    """
    if is_plain_linear(module):
        return module.get_parameter("weight")
    is_own = _full_name(type(module)) == _CONV1D and not has_hooks(module)
    return module.get_parameter("weight").T if is_own else None


def frozen_projection(base: nn.Module, x_NI: Tensor, slot: Slot | None) -> Projection | None:
    """Return what a linear layer with an update computes with, or None where it is no frozen layer of a known kind.

    Example:
        >>> frozen_projection(nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3), None).weight.shape
        torch.Size([2, 3])
    """
    weight = _frozen_weight(base)
    if weight is None or (weight.dense is not None and weight.dense.dtype != x_NI.dtype):
        return None
    bias = base.get_parameter("bias") if "bias" in dict(base.named_parameters(recurse=False)) else None
    if bias is not None and (bias.requires_grad or bias.dtype != x_NI.dtype):
        return None
    factors = None if slot is None else slot.factors(x_NI.dtype)
    return Projection(weight, bias, factors, 1.0 if slot is None else slot.scaling)


def _frozen_weight(module: nn.Module) -> FrozenWeight | None:
    """Return the weight of a frozen linear layer, stored in whatever, or None where the layer is something else."""
    if isinstance(module, StoredLinear):
        shape = (module.out_features, module.in_features)
        return None if has_hooks(module) else FrozenWeight(shape, panels=module.panels)
    W_OI = plain_weight(module)
    return None if W_OI is None or W_OI.requires_grad else FrozenWeight(W_OI.shape, W_OI)


class LoRALinear(LoRALayer):
    """A frozen linear layer with a bank of low-rank updates.

    For the rows of each segment of the routing:

        out[rows] = base(x)[rows] + scaling * x[rows] @ lora_A.T @ lora_B.T

    and with a magnitude (DoRA), W the weight and b the bias of the base:

        c = magnitude / ‖W + scaling * lora_B @ lora_A‖, norms of rows, taken as constants
        out[rows] = c * (x[rows] @ W.T + scaling * x[rows] @ lora_A.T @ lora_B.T) + b

    Args:
        base: The layer that was there before; called as it is.
        routing: Which rows go through which slot.

    Example:
        >>> from veneer.adapter import LowRank
        >>> from veneer.nn.routing import Routing
        >>> layer = LoRALinear(nn.Linear(3, 4), Routing())
        >>> layer.put({"": Slot(LowRank(torch.ones(2, 3), torch.zeros(4, 2), scaling=1.0))})
        >>> x = torch.ones(5, 3)
        >>> torch.equal(layer(x), layer.base(x))
        True

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; DoRA: Liu et al. 2024, arXiv:2402.09353, section 4.3. Differs:
        the norm is taken from the factors, see `ops.dora.product_norm`.
    """

    @property
    def in_features(self) -> int:
        """Size of an input row."""
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Size of an output row."""
        return self.base.out_features  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, segment by segment, the updates; x has shape (..., in)."""
        out = self.by_segment(x.reshape(-1, x.shape[-1]), self._segment)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _segment(self, x_NI: Tensor, slot_index: int | None) -> Tensor:
        if slot_index is None:
            return self.base(x_NI)
        slot = self.slot(slot_index)
        if slot.magnitude is not None:
            return self._with_magnitude(x_NI, slot)
        W_OI = plain_weight(self.base)
        if W_OI is not None and not self.dropping(slot):
            return lora_linear(x_NI, W_OI, self.bias, *slot.factors(x_NI.dtype), slot.scaling)
        frozen = self._frozen(x_NI, slot)
        if frozen is not None:
            return project(x_NI, [frozen])[0]
        A, B = slot.factors(x_NI.dtype)
        if self.dropping(slot):
            return self._onto(self._delta(x_NI, slot, A, B), x_NI)
        return add_lora(self.base(x_NI), x_NI, A, B, slot.scaling)

    def projection(self, x_NI: Tensor, slot: Slot) -> Projection | None:
        """Return what one slot computes with, dropout drawn, or None where that is no frozen layer with one update."""
        dropping = self.dropping(slot)
        if dropping and len(slot.parts or ()) > 1:  # each part drops inputs of its own
            return None
        if slot.magnitude is not None and not tells_zeros(x_NI.device):  # asked first: the ratio takes all of W
            return None
        found = frozen_projection(self.base, x_NI, slot)
        if found is None or found.factors is None:
            return None
        ratio_O = None
        if slot.magnitude is not None:
            with torch.no_grad():
                projected_OR = weight_product(found.weight, found.factors[0])
            ratio_O = _ratio(slot, projected_OR, *found.factors)
            if not is_far_from_zero(ratio_O):
                return None
        return replace(found, dropout=draw_dropout(slot.dropout) if dropping else None, ratio=ratio_O)

    def _frozen(self, x_NI: Tensor, slot: Slot) -> Projection | None:
        """Return `projection` where autocast casts nothing and no compiler need look into what decodes a weight."""
        return None if autocasting(x_NI) or torch.compiler.is_compiling() else self.projection(x_NI, slot)

    def _onto(self, delta_NO: Tensor, x_NI: Tensor) -> Tensor:
        """Add the base's output to an update; in 16 bits before it is rounded, where the base is known that well."""
        W_OI = plain_weight(self.base)
        if W_OI is None or x_NI.dtype.itemsize >= 4 or autocasting(x_NI) or W_OI.dtype != x_NI.dtype:
            return self.base(x_NI) + delta_NO
        return linear_onto(delta_NO, x_NI, W_OI, self.bias)

    def plain_segment(self, x_NI: Tensor, slot_index: int | None) -> Tensor:
        """Return what a segment's rows become, by the reference where there is no magnitude."""
        slot = None if slot_index is None else self.slot(slot_index)
        if slot is None or slot.magnitude is not None:
            return self._segment(x_NI, slot_index)
        return self._onto(self._delta(x_NI, slot, *slot.factors(x_NI.dtype)), x_NI)

    def _with_magnitude(self, x_NI: Tensor, slot: Slot) -> Tensor:
        bias, W_OI = self.bias, plain_weight(self.base)
        dropping = self.dropping(slot)
        # With few rows a pass over the outputs is cheaper than one over a plain weight.
        if W_OI is None or dropping or merging_pays(len(x_NI), W_OI.shape, W_OI.dtype, IN_PASSING):
            frozen = self._frozen(x_NI, slot)
            if frozen is not None:
                (out,) = project(x_NI, [frozen])
                # Without a bias backward reads the output itself, and what stands behind may write into it.
                return out.clone() if bias is None and out.requires_grad else out
        A, B = slot.factors(x_NI.dtype)
        with torch.no_grad():
            if W_OI is not None:
                projected_OR = F.linear(W_OI, A)
            else:
                # W Aᵀ is what the base makes of A's rows, whatever its weight is stored in.
                projected_OR = (self.base(A) - bias).T if bias is not None else self.base(A).T
        ratio_O = _ratio(slot, projected_OR, A, B)
        if W_OI is not None and not dropping:
            return dora_linear(x_NI, W_OI, bias, A, B, slot.scaling, ratio_O)
        out = self.base(x_NI)
        if bias is not None:
            bias = bias.to(out.dtype)  # under autocast the base's output is narrower
            out = out - bias
        out = ratio_O.to(out.dtype) * (out + self._delta(x_NI, slot, A, B))
        return out if bias is None else out + bias

    def _delta(self, x_NI: Tensor, slot: Slot, A: Tensor, B: Tensor) -> Tensor:
        """Return the update of the output; each part drops inputs of its own."""
        parts = len(slot.parts) if self.dropping(slot) and slot.parts else 1
        pairs = zip(A.chunk(parts), B.chunk(parts, dim=1), strict=True)
        deltas = [lora_delta(self.drop(x_NI, slot), A_part, B_part, slot.scaling) for A_part, B_part in pairs]
        return deltas[0] if parts == 1 else torch.stack(deltas).sum(0)


def _ratio(slot: Slot, projected_OR: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return DoRA's `magnitude / ‖W + delta‖` of each output, the norm as a constant; `projected` is W Aᵀ."""
    magnitude_O, weight_norm2_O = cast(Tensor, slot.magnitude), cast(Tensor, slot.weight_norm2)
    with torch.no_grad():
        norm_O = product_norm(weight_norm2_O, projected_OR, A, B, slot.scaling)
    return magnitude_ratio(magnitude_O, norm_O)


def plain_forward(layer: LoRALinear, x: Tensor) -> Tensor:
    """Apply an adapted layer as `forward` does, by the reference and torch's own gradients.

    Example:
        >>> from veneer.nn.routing import Routing
        >>> layer = LoRALinear(nn.Linear(3, 4), Routing(slot=None))
        >>> torch.equal(plain_forward(layer, torch.ones(2, 3)), layer.base(torch.ones(2, 3)))
        True
    """
    out = layer.by_segment(x.reshape(-1, x.shape[-1]), layer.plain_segment)
    return out.view(*x.shape[:-1], out.shape[-1])
