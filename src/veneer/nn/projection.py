"""What a linear layer, adapted or not, computes with: the parts that fused functions take."""

from torch import Tensor, nn

from veneer.nn.layer import has_hooks
from veneer.nn.linear import LoRALinear, frozen_projection
from veneer.ops.projections import Projection


def projection_of(module: nn.Module, x_NI: Tensor) -> Projection | None:
    """Return what a linear layer does to an input now, or None where it does more than a frozen layer with one update.

    More is: hooks, weights or biases that train, dropout part by part, rows through several slots, another type.

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
        return frozen_projection(module.base, x_NI, None) if slot is None else module.projection(x_NI, slot)
    return frozen_projection(module, x_NI, None)
