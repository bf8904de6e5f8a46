"""What all adapted layers share: a base that is called as it is, a bank of slots, the routing."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.nn.routing import Routing
from veneer.nn.slots import Slot


def has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody watches or changes the calls of a module: then its output is not ours to write into.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> has_hooks(layer)
        False
        >>> _ = layer.register_forward_hook(lambda *_: None)
        >>> has_hooks(layer)
        True
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class LoRALayer(nn.Module):
    """A frozen layer with a bank of low-rank updates.

    Args:
        base: The layer that was there before.
        routing: Which rows go through which slot.
    """

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.slots = nn.ModuleList()
        self.routing = routing

    # Models read these of their layers (dtype, device); what they get is the base's.
    @property
    def weight(self) -> Tensor:
        """The frozen weight of the base layer, without the update."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base.bias  # type: ignore[return-value]

    def slot(self, index: int, member: str = "") -> Slot:
        """Return a slot of the bank; layers that adapt several parameters have one for each, by its name."""
        found = self.slots[index]
        return cast(Slot, found[member.replace(".", "__")] if member else found)  # type: ignore[index]

    def put(self, slots: dict[str, Slot]) -> None:
        """Append to the bank one adapter's slot, or its slots by the parameter's name."""
        if set(slots) == {""}:
            self.slots.append(slots[""])
        else:
            self.slots.append(nn.ModuleDict({name.replace(".", "__"): slot for name, slot in slots.items()}))

    def by_segment(self, rows: Tensor, apply: Callable[[Tensor, int | None], Tensor]) -> Tensor:
        """Apply a function to each segment's rows (axis 0) with the number of its slot, and join what comes."""
        segments = self.routing.segments(rows.shape[0])
        if len(segments) == 1:
            return apply(rows, segments[0].slot)
        return torch.cat([apply(rows[part.start : part.stop], part.slot) for part in segments])

    def only_slot(self, what: str) -> int | None:
        """Return the one slot that everything goes through.

        Raises:
            AttachError: If rows are routed through several, which a layer of this kind cannot tell apart.
        """
        slots = self.routing.all_slots()
        if len(slots) > 1:
            raise AttachError(f"{what} cannot route rows of one call through several slots; call it once for each")
        return slots[0]

    def drop(self, x: Tensor, slot: Slot) -> Tensor:
        """Return the input of the low-rank branch: with dropout in training, else as it is."""
        return F.dropout(x, slot.dropout) if self.dropping(slot) else x

    def dropping(self, slot: Slot) -> bool:
        """Tell whether inputs of the low-rank branch are dropped now."""
        return slot.dropout > 0 and self.training
