"""LoRA on parameters by name, where no layer of their own is called: attention in one module, any other matrix."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.nn.layer import LoRALayer
from veneer.ops.dora import magnitude_ratio


class LoRAParameters(LoRALayer):
    """A frozen module of which some matrices have low-rank updates.

        out = functional_call(base, {name: W + scaling * lora_B @ lora_A for each name}, inputs)

    It serves `nn.MultiheadAttention`, whose kernel reads `in_proj_weight` and `out_proj.weight` itself, and any module
    that holds a matrix. With a magnitude (DoRA) the row of the sum is scaled to that length.

    Args:
        base: The module that was there before; it is called with the updated matrices in place of its own, which stay
            as they are.
        routing: All rows of one call go through one slot.

    Cost:
        One matrix of the parameter's size for each name, and 2·O·I·R operations, at each call.
    """

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the base with the updated matrices."""
        slot_index = self.only_slot(type(self.base).__name__)
        if slot_index is None:
            return self.base(*inputs, **options)
        bank: Any = self.slots[slot_index]
        updated = {name.replace("__", "."): self._updated(name.replace("__", "."), slot_index) for name in bank}
        return functional_call(self.base, updated, inputs, options)

    def _updated(self, name: str, slot_index: int) -> Tensor:
        slot = self.slot(slot_index, name)
        weight = self.base.get_parameter(name)
        A, B = slot.factors(weight.dtype)
        total = torch.addmm(weight, B, A, alpha=slot.scaling)
        if slot.magnitude is None:
            return total
        wide = torch.promote_types(total.dtype, torch.float32)
        norm_O = torch.linalg.vector_norm(total.detach(), dim=1, dtype=wide)
        return total * magnitude_ratio(slot.magnitude, norm_O)[:, None].to(total.dtype)

    # nn.TransformerEncoder and its layers read these of their attention; but for one, they are the base's.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: where it is true, torch's fused encoder layer reads the matrices itself."""
        return False

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The frozen input projection, without the update (nn.MultiheadAttention).

        It asks for a gradient where a call would have one: torch's encoder then leaves padding in the batch.
        """
        weight: Tensor | None = self.base.in_proj_weight  # type: ignore[assignment]
        trains = self.routing.all_slots() != (None,) and any(one.requires_grad for one in self.slots.parameters())
        return None if weight is None else weight.detach().requires_grad_(trains)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of the input projection (nn.MultiheadAttention)."""
        return self.base.in_proj_bias  # type: ignore[return-value]

    @property
    def out_proj(self) -> nn.Module:
        """The frozen output projection, without the update (nn.MultiheadAttention)."""
        return self.base.out_proj  # type: ignore[return-value]

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first axis (nn.MultiheadAttention)."""
        return self.base.batch_first  # type: ignore[return-value]

    @property
    def embed_dim(self) -> int:
        """Size of a query (nn.MultiheadAttention)."""
        return self.base.embed_dim  # type: ignore[return-value]

    @property
    def num_heads(self) -> int:
        """Number of heads (nn.MultiheadAttention)."""
        return self.base.num_heads  # type: ignore[return-value]


def why_not_parameter(module: nn.Module, name: str) -> str | None:
    """Return why a parameter of a module cannot be adapted by name, or None where it can."""
    parameter = module.get_parameter(name)
    if parameter.ndim != 2:
        return f"has shape {tuple(parameter.shape)}; by name, matrices and stacked experts can be adapted"
    if not parameter.is_floating_point():
        return f"holds {parameter.dtype}, which is no floating dtype"
    return None
