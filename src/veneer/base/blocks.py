"""Decoder layers of the usual build, computed by functions that keep little for backward.

A layer is known by the names of its parts and proved by a probe: where the fast way does not give what the layer's own
`forward` gives, the layer stays as it is. Shapes: T tokens, D hidden, H heads, E head size, F gate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.base.ragged import ragged_attention_forward
from veneer.nn.gates import activation_of
from veneer.nn.layer import has_hooks
from veneer.nn.norms import rms_norm_of
from veneer.nn.projection import projection_of
from veneer.ops.gates import ACTIVATIONS, Activation
from veneer.ops.keeping import Keep, kept_sum, moved
from veneer.ops.norm import RMSNorm, rms_norm
from veneer.ops.projections import gated_projection, project
from veneer.ops.rotary import rotate


@dataclass(frozen=True)
class Layout:
    """Where the norms of a decoder layer stand, by name.

    Args:
        attention: Before attention.
        after_attention: Between attention and the residual sum, or None.
        mlp: Before the gated layers.
        after_mlp: Between them and the residual sum, or None.
    """

    attention: str
    mlp: str
    after_attention: str | None = None
    after_mlp: str | None = None

    @property
    def norms(self) -> set[str]:
        """The names of all of them."""
        names = (self.attention, self.mlp, self.after_attention, self.after_mlp)
        return {name for name in names if name is not None}


LAYOUTS = (
    Layout("input_layernorm", "post_attention_layernorm"),
    Layout(
        "input_layernorm",
        "pre_feedforward_layernorm",
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
)
"""Before each half (Llama, Mistral, Qwen, SmolLM, Gemma 1), and before and behind each half (Gemma 2 and 3)."""

_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
*_GATES, _DOWN = (f"mlp.{name}" for name in _MLP_PARTS)
_HEAD_NORMS = ("q_norm", "k_norm")


Anew = Callable[[], Keep | None]
"""Gives room for what one layer computes and nobody keeps, the same for each; None stands for the heap."""


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer with what was found out about it.

    Args:
        layer: The layer.
        layout: Where its norms stand.
        norms: What each norm computes with, by name; of heads as `q_norm` and `k_norm`.
        activation: Of its gate.
        head_size: E.
        options: What the layer gives to the attention function beside queries, keys, values and lengths.
    """

    layer: nn.Module
    layout: Layout
    norms: Mapping[str, RMSNorm]
    activation: Activation
    head_size: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> nn.Module:
        """Return one of the layer's modules by its path."""
        return self.layer.get_submodule(name)

    def forward(
        self,
        hidden_1TD: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        sequence_lengths: tuple[int, ...],
        sequence_prefixes: tuple[int | None, ...] | None = None,
        keep: Keep | None = None,
        gates_again: Anew | None = None,
    ) -> Tensor:
        """Return what the layer makes of the rows of a ragged batch.

        `keep` gives room for what backward needs; with `gates_again`, which gives room too, gate and up are not kept
        but computed again.
        """
        x_TD = hidden_1TD.squeeze(0)  # a view both ways; an index would copy the gradient
        sequences = {"sequence_lengths": sequence_lengths, "sequence_prefixes": sequence_prefixes}
        out_TD = self._attention(x_TD, position_embeddings, sequences, keep)
        x_TD = kept_sum(x_TD, self._normed(out_TD, self.layout.after_attention, keep), keep)
        out_TD = self._mlp(x_TD, keep) if gates_again is None else self._mlp_again(x_TD, keep, gates_again)
        return kept_sum(x_TD, self._normed(out_TD, self.layout.after_mlp, keep), keep)[None]

    def _norm(self, name: str | None) -> RMSNorm | None:
        return None if name is None else self.norms.get(name)

    def _normed(self, x: Tensor, name: str | None, keep: Keep | None) -> Tensor:
        norm = self._norm(name)
        return x if norm is None else rms_norm(x, norm, keep)

    def _projected(
        self, x_TD: Tensor, norm: str, names: tuple[str, ...], keep: Keep | None, kept: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Return several layers' outputs for one normalised input; `kept` says which a later backward needs."""
        modules = [self.part(name) for name in names]
        found = [projection_of(module, x_TD) for module in modules]
        if (fusible := [one for one in found if one is not None]) and len(fusible) == len(found):
            return project(x_TD, fusible, self.norms[norm], keep, kept)
        y_TD = rms_norm(x_TD, self.norms[norm], keep)
        return tuple(module(y_TD) for module in modules)

    def _attention(
        self, x_TD: Tensor, turns: tuple[Tensor, Tensor], sequences: dict[str, Any], keep: Keep | None
    ) -> Tensor:
        names = tuple(f"self_attn.{name}" for name in _ATTENTION_PARTS)
        # Attention keeps the values, and queries and keys once they are turned; a norm keeps what it gets.
        kept = (*(place for place, name in enumerate(_HEAD_NORMS) if self._norm(name) is not None), 2)
        q_THE, k_THE, v_THE = (
            part.unflatten(-1, (-1, self.head_size))
            for part in self._projected(x_TD, self.layout.attention, names[:3], keep, kept)
        )
        cos_TC, sin_TC = (part[0] for part in turns)
        q_THE, k_THE = (
            rotate(self._normed(part, name, keep), cos_TC, sin_TC, keep)
            for part, name in zip((q_THE, k_THE), _HEAD_NORMS, strict=True)
        )
        q_1HTE, k_1HTE, v_1HTE = (part.transpose(0, 1)[None] for part in (q_THE, k_THE, v_THE))
        attention = self.part("self_attn")
        out, _ = ragged_attention_forward(
            attention, q_1HTE, k_1HTE, v_1HTE, None, **sequences, **self.options, keep=keep
        )
        out_TD = out.squeeze(0).flatten(1)
        output = self.part(names[3])
        projection = projection_of(output, out_TD)
        if projection is None:
            return output(out_TD)
        kept = () if self._norm(self.layout.after_attention) is None else (0,)
        return project(out_TD, [projection], None, keep, kept)[0]

    def _mlp(self, x_TD: Tensor, keep: Keep | None) -> Tensor:
        gate_TF, up_TF = self._projected(x_TD, self.layout.mlp, tuple(_GATES), keep, (0, 1))
        down = self.part(_DOWN)
        projection = projection_of(down, gate_TF)
        if projection is None:
            return down(self.activation.forward(gate_TF) * up_TF)
        return gated_projection(gate_TF, up_TF, self.activation, projection, self._behind(keep))

    def _behind(self, keep: Keep | None) -> Keep | None:
        """Return where the output of the gated layers goes: a norm behind them keeps it."""
        return None if self._norm(self.layout.after_mlp) is None else keep

    def _mlp_again(self, x_TD: Tensor, keep: Keep | None, anew: Anew) -> Tensor:
        """Do what `_mlp` does, keeping its input alone."""
        gate, up, down = (projection_of(self.part(name), x_TD) for name in (*_GATES, _DOWN))
        if gate is None or up is None or down is None:
            return self._mlp(x_TD, keep)
        calls = count()

        def compute(x_TD: Tensor) -> Tensor:
            known = next(calls) > 0  # the second time, backward asks for what this one keeps
            gate_TF, up_TF = project(x_TD, (gate, up), self.norms[self.layout.mlp], anew(), (0, 1))
            return gated_projection(gate_TF, up_TF, self.activation, down, self._behind(keep), filled=not known)

        return checkpoint(compute, x_TD, use_reentrant=False, preserve_rng_state=False)


def recognise(layer: nn.Module, options: Mapping[str, Any]) -> Block | None:
    """Return a decoder layer as a block if its parts have the names and kinds of one; nothing is computed with it yet.

    Args:
        layer: Any module.
        options: What it was seen to give to the attention function.
    """
    children = dict(layer.named_children())
    layout = next((one for one in LAYOUTS if set(children) == {"self_attn", "mlp", *one.norms}), None)
    if layout is None or has_hooks(layer) or not _is_untouched(layer):
        return None
    attention, mlp = dict(children["self_attn"].named_children()), dict(children["mlp"].named_children())
    head_norms = {name for name in ("q_norm", "k_norm") if name in attention}
    activations = [name for name in mlp if name not in _MLP_PARTS]
    if set(attention) != {*_ATTENTION_PARTS, *head_norms} or not {*_MLP_PARTS} <= set(mlp) or len(activations) != 1:
        return None
    modules = {name: children[name] for name in layout.norms} | {name: attention[name] for name in head_norms}
    norms = {name: found for name, module in modules.items() if (found := rms_norm_of(module)) is not None}
    activation = activation_of(mlp[activations[0]])
    head_size = vars(children["self_attn"]).get("head_dim")
    if len(norms) < len(modules) or activation is None or not isinstance(head_size, int):
        return None
    return Block(layer, layout, norms, ACTIVATIONS[activation], head_size, dict(options))


def _is_untouched(layer: nn.Module) -> bool:
    """Tell whether nobody watches or changes the modules between the layer and its linear layers."""
    inner = [layer, *layer.children(), *(part for child in layer.children() for part in child.children())]
    return not any(has_hooks(module) for module in inner)


Forward = Callable[..., Any]


def block_forward(
    block: Block,
    own_forward: Forward,
    keep: Keep,
    anew: Anew,
    hidden_states: Tensor,
    *args: Any,
    again_from: int | None = None,
    **options: Any,
) -> Any:
    """Compute a layer's output the fast way for a ragged batch, and by its own `forward` for anything else.

    What a backward will need goes where `keep` gives room; in a layer that will be computed again that is its output,
    and the rest goes where `anew` does. So do gate and up in forwards of `again_from` tokens or more, in which these
    alone are computed again; None never does.
    """
    lengths = options.get("sequence_lengths")
    turns = options.get("position_embeddings")
    plain = not args and options.get("past_key_values") is None and options.get("attention_mask") is None
    if not plain or lengths is None or turns is None or torch.is_autocast_enabled(hidden_states.device.type):
        return own_forward(hidden_states, *args, **options)
    given = {
        "position_embeddings": turns,
        "sequence_lengths": lengths,
        "sequence_prefixes": options.get("sequence_prefixes"),
    }
    layer, has_backward = block.layer, _has_backward(block.layer, hidden_states)
    kept = keep if has_backward and hidden_states.device.type == "cpu" else None

    def room() -> Keep | None:
        return None if kept is None else anew()

    gates_too = has_backward and again_from is not None and hidden_states.shape[1] >= again_from
    if not (isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training):
        return block.forward(hidden_states, **given, keep=kept, gates_again=room if gates_too else None)

    def again(hidden_states: Tensor) -> Tensor:
        return block.forward(hidden_states, **given, keep=room())

    # In transformers' layers this is a part of `forward`.
    return moved(layer._gradient_checkpointing_func(again, hidden_states), kept)


def _has_backward(layer: nn.Module, hidden_states: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return hidden_states.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
