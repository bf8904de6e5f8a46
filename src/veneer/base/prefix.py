"""The frozen layers below everything that trains: what they give is the same in every epoch.

The model's own code runs either way. For as long as it is called, layers that are not needed get a forward that
returns what came in, so indices, layer types, masks and positions stay those of the whole model.

Shapes: T tokens of all sequences, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.base.ragged import RaggedBatch, hidden_states, probe_batch, ragged_attention
from veneer.errors import BaseModelError
from veneer.nn.attach import find_attachment
from veneer.nn.layer import LoRALayer
from veneer.nn.modes import evaluating


@dataclass(frozen=True)
class PrefixStates:
    """The hidden states of a ragged batch above its lowest decoder layers.

    Args:
        num_layers: How many layers were run.
        states_TD: What the highest of them gave.
    """

    num_layers: int
    states_TD: Tensor


def sole_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the decoder's layers from the bottom up; nothing where it has no one list of them, each in it once."""
    lists = [child for _, child in model.get_decoder().named_children() if isinstance(child, nn.ModuleList)]
    layers = tuple(lists[0]) if len(lists) == 1 else ()
    return layers if len(set(layers)) == len(layers) else ()


def prefix_layers(model: PreTrainedModel) -> int:
    """Return how many decoder layers, counted from the bottom, hold nothing that trains and no adapter.

    What lies outside of the list of layers is not looked at here (embeddings below it, a norm and the head above it):
    `check_prefix` finds out what trains below.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).requires_grad_(False)
        >>> _ = model.model.layers[2].mlp.up_proj.requires_grad_(True)
        >>> prefix_layers(model)
        2
    """
    layers = sole_layers(model)
    return next((place for place, layer in enumerate(layers) if _is_worked_on(layer)), len(layers))


def prefix_states(model: PreTrainedModel, batch: RaggedBatch, num_layers: int) -> PrefixStates:
    """Return what the lowest layers give for a batch, without a gradient; the layers above are not run.

    Needs `ragged_attention(model)`. The states of a token depend on its own sequence, but their last bits may depend
    on the batch, for matrix products of few rows add in another order.

    Raises:
        BaseModelError: If the layers are not called once each, with one tensor coming out.

    Cost:
        The layers' part of a forward; (T, D) values come back.
    """
    with torch.no_grad():
        return PrefixStates(num_layers, _run_below(model, batch, num_layers))


def tail_hidden_states(model: PreTrainedModel, batch: RaggedBatch, below: PrefixStates) -> Tensor:
    """Return the last hidden states of a ragged batch, shape (T, D), from what its lowest layers gave.

    Equals `hidden_states(model, batch)`. Needs `ragged_attention(model)`. Tokens that a batch was filled up with,
    behind those that `below` knows, get zeros: nothing is asked of them.
    """
    missing = len(batch.token_ids) - len(below.states_TD)
    states_1TD = F.pad(below.states_TD, (0, 0, 0, missing))[None]
    *passed, last = sole_layers(model)[: below.num_layers]
    with _standing_in(passed, _first_argument), _standing_in([last], lambda *_, **__: states_1TD):
        return hidden_states(model, batch)


def check_prefix(model: PreTrainedModel, num_layers: int) -> Tensor:
    """Prove on two short sequences that what the lowest layers give may be kept, and stands for running them.

    Looked at in the mode that the model is in, and in evaluation: nothing is drawn at random below, nothing trains
    there, and the layers above give bit for bit what they give in the whole model.

    Returns:
        The states of the two sequences; all states have their width and dtype.

    Raises:
        BaseModelError: If they may not, with the reason.
    """
    name = type(model).__name__
    batch = _probe(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ragged_attention(model):
        try:
            before = _random_states(model.device)
            below = prefix_states(model, batch, num_layers)
            drawn = any(not old.equal(new) for old, new in zip(before, _random_states(model.device), strict=True))
            with evaluating(model):
                with torch.enable_grad():
                    again = _run_below(model, batch, num_layers)
                with torch.no_grad():
                    tail, whole = tail_hidden_states(model, batch, below), hidden_states(model, batch)
        except BaseModelError:
            raise
        except Exception as error:  # the model's own code meets layers that are not run: whatever it makes of that
            raise BaseModelError(
                f"{name} cannot run without its lower layers: {type(error).__name__}: {error}"
            ) from error
    if again.requires_grad:
        raise BaseModelError(f"something below layer {num_layers} of {name} trains, such as its embeddings")
    if drawn or not again.equal(below.states_TD):
        raise BaseModelError(f"{name} draws at random below layer {num_layers} in training (dropout)")
    if not tail.equal(whole):
        raise BaseModelError(f"{name} uses more of its lower layers than what layer {num_layers - 1} gives")
    return below.states_TD


def _is_worked_on(layer: nn.Module) -> bool:
    adapted = any(isinstance(module, LoRALayer) for module in layer.modules())
    return adapted or any(parameter.requires_grad for parameter in layer.parameters())


def _run_below(model: PreTrainedModel, batch: RaggedBatch, num_layers: int) -> Tensor:
    """Return what the lowest layers give, shape (T, D); the layers above hand it on, and the final norm is wasted."""
    layers, name, tokens = sole_layers(model), type(model).__name__, batch.token_ids.shape[0]
    found: list[Tensor] = []

    def keep(_layer: nn.Module, _args: Any, output: object) -> None:
        if not isinstance(output, Tensor) or output.shape[:-1] != (1, tokens):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise BaseModelError(f"a layer of {name} gives {got}, expected one tensor of shape (1, {tokens}, hidden)")
        found.append(output[0])

    hook = layers[num_layers - 1].register_forward_hook(keep)
    try:
        with _standing_in(layers[num_layers:], _first_argument):
            hidden_states(model, batch)
    finally:
        hook.remove()
    if len(found) != 1:
        raise BaseModelError(f"{name} calls layer {num_layers - 1} {len(found)} times in a forward, expected once")
    return found[0]


@contextmanager
def _standing_in(layers: Iterable[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let layers compute something else within the block; the modules and their attributes stay in place."""
    before = {layer: vars(layer).get("forward") for layer in layers}
    try:
        for layer in before:
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, own in before.items():
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


def _first_argument(*args: Any, **named: Any) -> Tensor:
    """Return the hidden states that a layer is called with."""
    return args[0] if args else named["hidden_states"]


def _probe(model: PreTrainedModel) -> RaggedBatch:
    """Return two short sequences; all through the first slot, which an activated adapter would not enter here."""
    batch = probe_batch(model)
    return batch if find_attachment(model) is None else replace(batch, slots=(0, 0))


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
