"""LoRA on stacked mixture-of-experts parameters: low-rank products of each expert's own tokens, never a dense delta.

Shapes: T tokens, K experts of each, S = T·K pairs, E experts, I in, O out, H hidden, R rank.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from veneer.nn.gates import split_gate_of
from veneer.nn.layer import LoRALayer, has_hooks
from veneer.nn.routing import Routing
from veneer.ops.experts import collect_rows, lora_experts, spread_rows
from veneer.ops.gates import ACTIVATIONS, split_gate
from veneer.ops.reference import linear_experts

UP_GATED, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"


@runtime_checkable
class StackedExperts(Protocol):
    """The protocol of transformers' experts modules (`use_experts_implementation`)."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    _is_expert_parallel: bool


class LoRAExperts(LoRALayer):
    """Frozen stacked experts of which one or both projections have low-rank updates.

    For each expert e that has tokens, x its tokens:

        up = x @ W_up[e].T + scaling * x @ A[e].T @ B[e].T; likewise the projection down

    which equals the base module with `W[e] + scaling * B[e] @ A[e]`; that sum is never formed.

    Args:
        base: transformers' experts module; it is called as it is where no slot is asked for.
        routing: Which tokens go through which slot.

    Cost:
        Beside the experts' own products, 2·S·R·(H + F) operations each way; each expert's tokens are gathered once.

    Source:
        transformers 5 `integrations/moe.py` for what an experts module computes; the branch after Hu et al. 2021.
    """

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__(base, routing)
        experts: Any = base
        self._gate = split_gate_of(experts._apply_gate) if experts.has_gate else None

    def forward(self, hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        """Apply each token's experts and add them up by their weights."""
        segments = self.routing.segments(hidden_TH.shape[0])
        parts = [
            self._segment(hidden_TH[rows], top_k_index_TK[rows], top_k_weights_TK[rows], part.slot)
            for part in segments
            for rows in (slice(part.start, part.stop),)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _segment(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, slot_index: int | None) -> Tensor:
        base: Any = self.base
        if slot_index is None or index_TK.numel() == 0:
            return base(x_TH, index_TK, weights_TK)
        order_S = index_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(index_TK.reshape(-1), minlength=base.num_experts).tolist()
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        inner = spread_rows(x_TH, order_S, back_S)
        inner = self._project(UP_GATED if base.has_gate else UP, slot_index, inner, counts)
        inner = self._activate(inner)
        out_SH = self._project(DOWN, slot_index, inner, counts)
        if base.has_post_expert_norm:
            out_SH = base.post_expert_norm(out_SH)
        return collect_rows(out_SH, weights_TK, order_S, back_S).to(x_TH.dtype)

    def _activate(self, up_SI: Tensor) -> Tensor:
        """Return what goes down: of a gate that is the usual one, by a function that keeps less for backward."""
        base: Any = self.base
        if self._gate is not None and not any(has_hooks(one) for one in base.children()):
            return split_gate(up_SI, ACTIVATIONS[self._gate])
        return base._apply_gate(up_SI) if base.has_gate else base.act_fn(up_SI)

    def _project(self, name: str, slot_index: int, x_SI: Tensor, counts: Sequence[int]) -> Tensor:
        """Return a projection of all experts' rows, with the update where there is one."""
        base: Any = self.base
        weight = base.get_parameter(name)
        W_EOI = weight.mT if base.is_transposed else weight
        bias_EO = base.get_parameter(f"{name}_bias") if base.has_bias else None
        bank: Any = self.slots[slot_index]
        if name not in bank:
            return linear_experts(x_SI, W_EOI, bias_EO, counts)
        slot = self.slot(slot_index, name)
        A_ERI, B_EOR = slot.factors(x_SI.dtype)
        if not self.dropping(slot):
            return lora_experts(x_SI, W_EOI, bias_EO, A_ERI, B_EOR, slot.scaling, counts)
        z_SR = linear_experts(self.drop(x_SI, slot), A_ERI, None, counts)
        return linear_experts(x_SI, W_EOI, bias_EO, counts) + slot.scaling * linear_experts(z_SR, B_EOR, None, counts)


def why_not_experts(module: nn.Module, name: str) -> str | None:
    """Return why a stacked parameter cannot be adapted, or None where it can."""
    if not isinstance(module, StackedExperts):
        return (
            f"is a stack of matrices in a {type(module).__name__}, which is no experts module of transformers 5; "
            "how it is used cannot be told from outside"
        )
    if module._is_expert_parallel:
        return "is one rank's share of experts that are spread over processes"
    if name not in (UP_GATED, UP, DOWN):
        return f"is no projection of the experts ({UP_GATED}, {UP}, {DOWN})"
    return None


def expert_sizes(module: nn.Module, name: str) -> tuple[int, int]:
    """Return (out, in) of one expert's projection."""
    experts: Any = module
    first, second = module.get_parameter(name).shape[1:]
    return (second, first) if experts.is_transposed else (first, second)
