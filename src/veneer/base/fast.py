"""Let a model's frozen parts be computed by functions that keep little and run fast, for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.base.blocks import Block, block_forward, recognise
from veneer.base.ragged import base_alone, hidden_states, probe_batch, ragged_attention
from veneer.base.stack import ActivationStack
from veneer.nn.layer import has_hooks
from veneer.nn.linear import LoRALinear, plain_forward
from veneer.nn.modes import evaluating
from veneer.nn.norms import rms_norm_of
from veneer.ops.keeping import Keep
from veneer.ops.norm import RMSNorm, rms_norm

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class FastModules:
    """What is computed the fast way.

    Args:
        blocks: Paths of decoder layers.
        norms: Paths of norms outside of them.
        left: Path of each decoder layer that stays as it is, and why.
    """

    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        parts = [f"{len(self.blocks)} decoder layers and {len(self.norms)} more norms are computed the fast way"]
        for reason in dict.fromkeys(self.left.values()):
            count = sum(one == reason for one in self.left.values())
            parts.append(f"{count} decoder layers are computed by transformers: {reason}")
        return "; ".join(parts)


@contextmanager
def fast_modules(model: PreTrainedModel, *, again_from: int | None = None) -> Iterator[FastModules]:
    """Compute decoder layers and norms by our own functions within the block; afterwards the model is as it was.

    What a layer gives is proved before: on two short sequences, each layer that is replaced gave what it gives by
    itself, up to rounding. Modules keep their class, their names, their parameters and their place. Of decoder layers
    only calls with a ragged batch go the fast way, so that generating within the block is what it was. On a CPU, what
    they keep for backward lies in an `ActivationStack`, which each forward takes anew.

    Args:
        model: A decoder of transformers, with an adapter attached or not.
        again_from: In forwards of so many tokens or more, compute gates and what they multiply again in the backward
            rather than keep them; None never does.

    Yields:
        What was replaced, and what was left and why.

    Example:
        with ragged_attention(model), fast_modules(model) as fast:
            print(fast)
            loss = summed_loss(model, batch)
    """
    with ExitStack() as stack:
        yield _install(model, stack, again_from)


def _install(model: PreTrainedModel, stack: ExitStack, again_from: int | None) -> FastModules:
    blocks, left = _blocks(model, decoder_layers(model))
    activations, again = ActivationStack(), ActivationStack()
    if blocks:
        stack.callback(model.get_decoder().register_forward_pre_hook(partial(_begin, activations)).remove)
    for block in blocks.values():
        rooms = activations.empty, partial(_anew, again)
        forward = partial(block_forward, block, block.layer.forward, *rooms, again_from=again_from)
        _replace(stack, block.layer, forward)
    norms = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{one}.") for one in blocks)
        if not inside and not list(module.children()) and (norm := rms_norm_of(module)) is not None:
            norms[path] = norm
            _replace(stack, module, partial(_norm_forward, norm, module.forward))
    return FastModules(tuple(blocks), tuple(norms), left)


def _anew(stack: ActivationStack) -> Keep:
    """Return the stack's memory, to be taken from the bottom: what it had is done with, or stays by itself."""
    stack.reset()
    return stack.empty


def _begin(activations: ActivationStack, decoder: nn.Module, args: Any) -> None:  # noqa: ARG001 (a hook's signature)
    if torch.is_grad_enabled():
        activations.reset()


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Compute adapted linear layers by the reference within the block, for anyone who doubts the fast ways.

    Each gives what its base gives and `ops.reference.lora_delta` beside it, with torch's own gradients.

    Example:
        with ragged_attention(model), plain_modules(model):
            loss = summed_loss(model, batch, way=Way(fast=False))
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is LoRALinear and not has_hooks(module):
                _replace(stack, module, partial(plain_forward, module))
        yield


def _norm_forward(norm: RMSNorm, own_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # Rows of another dtype than the gain (autocast) are the module's own business.
    return rms_norm(x, norm) if x.dtype == norm.weight_D.dtype else own_forward(x)


def _replace(stack: ExitStack, module: nn.Module, forward: Any) -> None:
    """Let a module's calls go to a function until the stack unwinds."""
    vars(module)["forward"] = forward
    stack.callback(vars(module).pop, "forward")


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the items of the decoder's longest list of modules by their paths: its layers."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    own = [(path, module) for path, module in lists if id(module) in inside]
    if not own:
        return {}
    path, longest = max(own, key=lambda one: len(one[1]))
    return {f"{path}.{place}": layer for place, layer in enumerate(longest)}


@dataclass(frozen=True)
class _Call:
    """What a layer was called with and what it gave."""

    args: tuple[Any, ...]
    options: Mapping[str, Any]
    output: Any


@contextmanager
def _watching(layers: Mapping[str, nn.Module], calls: dict[str, _Call]) -> Iterator[None]:
    def note(path: str, _: nn.Module, args: Any, options: Any, output: Any) -> None:
        calls[path] = _Call(args, options, output)

    with ExitStack() as stack:
        for path, layer in layers.items():
            handle = layer.register_forward_hook(partial(note, path), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """The base alone, in training mode (where dropout would show), nothing drawn from the caller's random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), base_alone(model):
        model.train()  # `evaluating` puts every module's mode back
        yield


def _blocks(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> tuple[dict[str, Block], dict[str, str]]:
    """Return the layers that are proved to be blocks, and why the others are not."""
    calls: dict[str, _Call] = {}
    asked: dict[nn.Module, dict[str, Any]] = {}
    blocks: dict[str, Block] = {}
    left: dict[str, str] = {}
    with _probing(model), ragged_attention(model):
        with _watching(layers, calls):
            hidden_states(model, probe_batch(model), seen_options=asked)
        for path, layer in layers.items():
            inside = set(layer.modules())
            block = recognise(layer, next((options for module, options in asked.items() if module in inside), {}))
            if block is None:
                left[path] = "their parts are not those of a layer that is known"
            elif (reason := _refuted(block, calls.get(path))) is not None:
                left[path] = reason
            else:
                blocks[path] = block
    return blocks, left


def _refuted(block: Block, call: _Call | None) -> str | None:
    """Return why a block does not stand for its layer, or None where both gave the same."""
    if call is None or len(call.args) != 1 or "position_embeddings" not in call.options:
        return "they are called in another way"
    (hidden,), output = call.args, call.output
    if not isinstance(output, Tensor) or hidden.dtype not in _TOLERANCE:
        return "they give another kind of output"
    got = block.forward(
        hidden,
        position_embeddings=call.options["position_embeddings"],
        sequence_lengths=call.options["sequence_lengths"],
    )
    # Each of a layer's two sums rounds what it gives, which in 16 bits may be more than all that the layer adds.
    before, expected = hidden.double(), output.double()
    rounded = 2 * torch.finfo(hidden.dtype).eps * expected.abs().maximum(before.abs())
    error = ((got.double() - expected).abs() - rounded).clamp_(min=0).norm() / (expected - before).norm()
    return None if error <= _TOLERANCE[hidden.dtype] else f"the fast way gave something else (by {error:.1g})"
