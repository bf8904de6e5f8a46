"""What a linear layer, adapted or not, computes with: the parts that fused functions take."""

from torch import Tensor, nn

from veneer.nn.layer import has_hooks
from veneer.nn.linear import LoRALinear, plain_weight, stored_weight
from veneer.nn.slots import Slot
from veneer.ops.frozen import FrozenWeight
from veneer.ops.projections import Projection


def projection_of(module: nn.Module, x_NI: Tensor) -> Projection | None:
    """Return what a linear layer does to an input now, or None where it does more than a frozen layer with one update.

    More is: hooks, weights or biases that train, a magnitude, dropout, rows through several slots, another type.

    Example:
        >>> import torch
        >>> projection_of(nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3)).weight.shape
        torch.Size([2, 3])
    """
    if type(module) is LoRALinear:
        slots = module.routing.all_slots()
        if has_hooks(module) or len(slots) > 1:
            return None
        slot = None if slots[0] is None else module.slot(slots[0])
        if slot is not None and (slot.magnitude is not None or module.dropping(slot)):
            return None
        return _projection(module.base, x_NI, slot)
    return _projection(module, x_NI, None)


def _projection(base: nn.Module, x_NI: Tensor, slot: Slot | None) -> Projection | None:
    weight = frozen_weight(base)
    if weight is None or (weight.dense is not None and weight.dense.dtype != x_NI.dtype):
        return None
    bias = base.get_parameter("bias") if "bias" in dict(base.named_parameters(recurse=False)) else None
    if bias is not None and (bias.requires_grad or bias.dtype != x_NI.dtype):
        return None
    factors = None if slot is None else slot.factors(x_NI.dtype)
    return Projection(weight, bias, factors, 1.0 if slot is None else slot.scaling)


def frozen_weight(module: nn.Module) -> FrozenWeight | None:
    """Return the weight of a frozen linear layer, stored in whatever, or None where the layer is something else."""
    stored = stored_weight(module)
    if stored is not None:
        return stored
    W_OI = plain_weight(module) if not isinstance(module, LoRALinear) else None
    return None if W_OI is None or W_OI.requires_grad else FrozenWeight(W_OI.shape, W_OI)
