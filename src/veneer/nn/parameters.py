"""LoRA on parameters by name, where no layer of their own is called."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.nn.layer import LoRALayer
from veneer.nn.slots import Slot
from veneer.ops.dora import magnitude_ratio


class LoRAParameters(LoRALayer):
    """A frozen module of which some matrices have low-rank updates.

        out = functional_call(base, {name: W + scaling * lora_B @ lora_A for each name}, inputs)

    It serves any module that holds a matrix. With a magnitude (DoRA) the row of the sum is scaled to that length.

    Args:
        base: The module that was there before; it is called with the updated matrices in place of its own, which stay
            as they are.
        routing: All rows of one call go through one slot.

    Cost:
        One matrix of the parameter's size for each name, and 2·O·I·R operations, at each call.
    """

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the base with the updated matrices."""
        return call_with_updates(self, self.only_slot(type(self.base).__name__), *inputs, **options)


def call_with_updates(layer: LoRALayer, slot_index: int | None, *inputs: Any, **options: Any) -> Any:
    """Call the base of a layer with the updated matrices of a slot in place of its own."""
    if slot_index is None:
        return layer.base(*inputs, **options)
    bank: Any = layer.slots[slot_index]
    names = [name.replace("__", ".") for name in bank]
    updated = {name: _updated(layer.base.get_parameter(name), layer.slot(slot_index, name)) for name in names}
    return functional_call(layer.base, updated, inputs, options)


def _updated(weight: Tensor, slot: Slot) -> Tensor:
    A, B = slot.factors(weight.dtype)
    total = torch.addmm(weight, B, A, alpha=slot.scaling)
    if slot.magnitude is None:
        return total
    wide = torch.promote_types(total.dtype, torch.float32)
    norm_O = torch.linalg.vector_norm(total.detach(), dim=1, dtype=wide)
    return total * magnitude_ratio(slot.magnitude, norm_O)[:, None].to(total.dtype)


def why_not_parameter(module: nn.Module, name: str) -> str | None:
    """Return why a parameter of a module cannot be adapted by name, or None where it can."""
    parameter = module.get_parameter(name)
    if parameter.ndim != 2:
        return f"has shape {tuple(parameter.shape)}; by name, matrices and stacked experts can be adapted"
    if not parameter.is_floating_point():
        return f"holds {parameter.dtype}, which is no floating dtype"
    return None
