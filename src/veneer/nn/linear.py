"""LoRA on a linear layer."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.nn.routing import Routing
from veneer.nn.slots import Slot
from veneer.ops.lora import lora_linear
from veneer.ops.reference import lora_delta


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
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module)


class LoRALinear(nn.Module):
    """A frozen linear layer with a bank of low-rank updates.

    For the rows of each segment of the routing:

        out[rows] = base(x)[rows] + scaling * x[rows] @ lora_A.T @ lora_B.T

    Args:
        base: The layer that was there before; called as it is.
        routing: Which rows go through which slot.

    Example:
        >>> layer = LoRALinear(nn.Linear(3, 4), Routing())
        >>> layer.slots.append(Slot(torch.ones(2, 3), torch.zeros(4, 2), scaling=1.0, dropout=0.0))
        ModuleList(
          (0): Slot(rank=2, scaling=1, dropout=0)
        )
        >>> x = torch.ones(5, 3)
        >>> torch.equal(layer(x), layer.base(x))
        True
    """

    def __init__(self, base: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.slots = nn.ModuleList()
        self.routing = routing

    # Models read these of their layers (dtype, device, sizes); what they get is the base's.
    @property
    def weight(self) -> Tensor:
        """The frozen weight of the base layer, without the update."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Size of an input row."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of an output row."""
        return self.base.out_features

    def slot(self, index: int) -> Slot:
        """Return a slot of the bank."""
        return cast(Slot, self.slots[index])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, segment by segment, the updates; x has shape (..., in)."""
        rows = x.reshape(-1, x.shape[-1])
        segments = self.routing.segments(rows.shape[0])
        outputs = [self._segment(rows[part.start : part.stop], part.slot) for part in segments]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _segment(self, x_NI: Tensor, slot_index: int | None) -> Tensor:
        if slot_index is None:
            return self.base(x_NI)
        slot = self.slot(slot_index)
        A, B = slot.lora_A.to(x_NI.dtype), slot.lora_B.to(x_NI.dtype)
        dropping = slot.dropout > 0 and self.training
        if is_plain_linear(self.base) and not dropping:
            return lora_linear(x_NI, self.base.weight, self.base.bias, A, B, slot.scaling)
        branch = F.dropout(x_NI, slot.dropout) if dropping else x_NI
        return self.base(x_NI) + lora_delta(branch, A, B, slot.scaling)
