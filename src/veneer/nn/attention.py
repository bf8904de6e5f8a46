"""LoRA on torch's nn.MultiheadAttention, whose kernel reads its matrices itself instead of calling layers.

Shapes: B batch, L queries, S keys, H heads, D size of a head, E = H·D.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.nn.layer import LoRALayer, has_hooks
from veneer.nn.parameters import call_with_updates
from veneer.ops.lora import lora_linear

PACKED, SEPARATE, OUT = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight"), "out_proj.weight"


class Call(NamedTuple):
    """The arguments of nn.MultiheadAttention, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class LoRAAttention(LoRALayer):
    """A frozen nn.MultiheadAttention of which some matrices have low-rank updates.

        out = functional_call(base, {name: W + scaling * lora_B @ lora_A for each name}, inputs)

    So it is computed where no gradient is recorded: torch's fused kernel takes the sums. Where one is, the attention is
    written out here, with the low-rank products of `ops.lora` for its projections: neither the sums nor their
    gradients, which have the size of the matrices, are kept. With a magnitude (DoRA), a bias or a zero among the keys,
    hooks or a subclass it is the sums always.

    Args:
        base: The module that was there before.
        routing: All rows of one call go through one slot.

    Cost:
        As `ops.lora.lora_linear` for each projection; without a gradient one matrix for each name, and 2·E·E·R
        operations for each E rows of it.

    Source:
        torch's `multi_head_attention_forward` for what is computed; the branch after Hu et al. 2021.
    """

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output and, where asked for, the weights of the attention."""
        slot_index = self.only_slot(type(self.base).__name__)
        call = Call(*inputs, **options)
        if slot_index is None or not torch.is_grad_enabled() or not self._is_plain(call, slot_index):
            return call_with_updates(self, slot_index, *inputs, **options)
        base: Any = self.base
        batch_axis = 0 if base.batch_first or call.query.dim() == 2 else 1
        query, key, value = (self._heads(one, batch_axis, base.num_heads) for one in self._projected(call, slot_index))
        dropout = base.dropout if base.training else 0.0
        weights = None
        if call.need_weights:
            out_BHLD, weights = _attend(query, key, value, _merged_mask(call, base.num_heads), dropout)
            weights = weights.mean(1) if call.average_attn_weights else weights
        else:
            hinted = call.is_causal and call.key_padding_mask is None
            mask = None if hinted else _merged_mask(call, base.num_heads)
            out_BHLD = F.scaled_dot_product_attention(query, key, value, mask, dropout, hinted)
        out = out_BHLD.permute((0, 2, 1, 3) if batch_axis == 0 else (2, 0, 1, 3)).flatten(2)
        out = self._linear(out, OUT, slice(None), base.out_proj.bias, slot_index)
        if call.query.dim() == 3:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _is_plain(self, call: Call, slot_index: int) -> bool:
        """Tell whether a call is what is written out here, and nothing more; wrong shapes are torch's to refuse."""
        base, bank = self.base, self.slots[slot_index]
        if type(base) is not nn.MultiheadAttention or has_hooks(base) or has_hooks(base.out_proj):
            return False
        extras = base.bias_k is not None or base.add_zero_attn
        magnitudes = any(name.rpartition(".")[2] == "magnitude" for name, _ in bank.named_parameters())
        dims = {one.dim() for one in call[:3]}
        hint_alone = call.is_causal and call.attn_mask is None
        return not extras and not magnitudes and dims in ({2}, {3}) and not hint_alone and not call.query.is_nested

    def _projected(self, call: Call, slot_index: int) -> tuple[Tensor, ...]:
        """Return query, key and value after their projections; those of one tensor by one product where it goes."""
        base: Any = self.base
        size, bias = base.embed_dim, base.in_proj_bias
        if base.in_proj_weight is None:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(
                self._linear(x, name, slice(None), one, slot_index)
                for x, name, one in zip(call[:3], SEPARATE, biases, strict=True)
            )
        inputs = call[:3]
        found: list[Tensor] = []
        while len(found) < 3:
            first = len(found)
            last = next((place for place in range(first + 1, 3) if inputs[place] is not inputs[first]), 3)
            rows = slice(first * size, last * size)
            together = self._linear(inputs[first], PACKED, rows, None if bias is None else bias[rows], slot_index)
            found += together.chunk(last - first, dim=-1)
        return tuple(found)

    def _linear(self, x: Tensor, name: str, rows: slice, bias: Tensor | None, slot_index: int) -> Tensor:
        """Apply some rows of a matrix, with its update where there is one."""
        W_OI = self.base.get_parameter(name)[rows]
        bank: Any = self.slots[slot_index]
        if name.replace(".", "__") not in bank:
            return F.linear(x, W_OI, bias)
        slot = self.slot(slot_index, name)
        A, B = slot.factors(W_OI.dtype)
        return lora_linear(x, W_OI, bias, A, B[rows], slot.scaling)

    @staticmethod
    def _heads(x: Tensor, batch_axis: int, heads: int) -> Tensor:
        """Return (B, H, L, D) of what a projection gave: (B, L, E), (L, B, E), or (L, E) without a batch."""
        x = x[None] if x.dim() == 2 else x
        split = x.unflatten(2, (heads, -1))
        return split.permute((0, 2, 1, 3) if batch_axis == 0 else (1, 2, 0, 3))

    # nn.TransformerEncoder and its layers read these of their attention; but for one, they are the base's.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: where it is true, torch's fused encoder layer reads the matrices itself."""
        return False

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The frozen input projection, without the update.

        It asks for a gradient where a call would have one: torch's encoder then leaves padding in the batch.
        """
        weight: Tensor | None = self.base.in_proj_weight  # type: ignore[assignment]
        trains = self.routing.all_slots() != (None,) and any(one.requires_grad for one in self.slots.parameters())
        return None if weight is None else weight.detach().requires_grad_(trains)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of the input projection."""
        return self.base.in_proj_bias  # type: ignore[return-value]

    @property
    def out_proj(self) -> nn.Module:
        """The frozen output projection, without the update."""
        return self.base.out_proj  # type: ignore[return-value]

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first axis."""
        return self.base.batch_first  # type: ignore[return-value]

    @property
    def embed_dim(self) -> int:
        """Size of a query."""
        return self.base.embed_dim  # type: ignore[return-value]

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self.base.num_heads  # type: ignore[return-value]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: of a boolean one, true is what must not be seen."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _merged_mask(call: Call, heads: int) -> Tensor | None:
    """Return the sum of both masks, in a shape that spreads over (B, H, L, S), or None where there is none."""
    dtype, mask = call.query.dtype, None
    if call.attn_mask is not None:
        mask = _additive(call.attn_mask, dtype)
        if mask.dim() == 3:  # of each sequence and head
            mask = mask.unflatten(0, (-1, heads))
    if call.key_padding_mask is not None:
        padding = _additive(call.key_padding_mask, dtype)
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        mask = padding if mask is None else mask + padding
    return mask


def _attend(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return what scaled_dot_product_attention gives, and the weights with what dropout left of them."""
    scores_BHLS = (q_BHLD * q_BHLD.shape[-1] ** -0.5) @ k_BHSD.mT
    if mask is not None:
        scores_BHLS = scores_BHLS + mask
    weights_BHLS = F.dropout(scores_BHLS.softmax(-1), dropout)
    return weights_BHLS @ v_BHSD, weights_BHLS
