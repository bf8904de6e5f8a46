"""How a run computes: all the ways that make a step fast and lean, or the plain reference of each."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.base.batching import Way, batching, find_way
from veneer.base.fast import decoder_layers, fast_modules, plain_modules
from veneer.config import TrainConfig
from veneer.errors import ConfigError
from veneer.ops.native import kernels
from veneer.ops.tiles import has_tiles
from veneer.train.allocator import kept_memory

log = logging.getLogger("veneer")

FILL = 32
"""Tokens of a forward on a CPU are a multiple of so many. oneDNN builds and keeps kernels for every number of rows that
it meets, 7 MB a step of SmolLM2, and no freed tensor fits the next one: in 31 steps of 1,000 tokens the resident memory
rose by 730 MB, with multiples of 32 by 180 MB, in no more time."""


MANY = 1024
"""Tokens of a forward from which on memory counts: with fewer, computing gates again takes a fifth of a step."""


@contextmanager
def computing(model: PreTrainedModel, settings: TrainConfig) -> Iterator[Way]:
    """Let a model take batches within the block and compute as the settings say; afterwards all is as before.

    Yields:
        How losses are to be computed.

    Raises:
        BaseModelError: If the model can take neither ragged nor padded batches.
        ConfigError: If layers or gates are to be computed again and the model's cannot be.
    """
    way = find_way(model, fast=settings.fast)
    if way.fast and not (way.padded or way.alone) and model.device.type == "cpu":
        # What waits for its cue (`alone`) would be asked of the filling too.
        way = replace(way, multiple=FILL)
    found = 0
    with ExitStack() as stack:
        stack.enter_context(batching(model, way))
        if way.padded:
            log.warning("batches are padded, which costs time and memory: %s", way.padded)
        if settings.fast:
            stack.enter_context(kept_memory())
            stack.enter_context(flushed_denormals())
            if not way.padded:
                again = gates_again_from(model, settings)
                fast = stack.enter_context(fast_modules(model, again_from=again))
                found = len(fast.blocks)
                log.info("%s", fast)
                if again is not None and found:
                    log.info("from %d tokens on gates of %d layers are computed again in the backward", again, found)
            if model.device.type == "cpu" and kernels() is None:
                log.info(
                    "the kernels in C were not compiled, torch computes in their place: install again where gcc is"
                )
        else:
            stack.enter_context(plain_modules(model))
            stack.enter_context(heard(model))
            log.info("everything is computed by the plain reference (train.fast is false)")
        if settings.checkpoint_activations == "gates" and not found:
            raise ConfigError(
                "train.checkpoint_activations: gates are known in layers that are computed the fast way alone, and no "
                f"layer of {type(model).__name__} is; `true` computes whole layers again"
            )
        if settings.checkpoint_activations is True:
            stack.enter_context(checkpointed(model))
        yield way


def gates_again_from(model: PreTrainedModel, settings: TrainConfig) -> int | None:
    """Return from how many tokens of a forward on gates are computed again: as asked, or where it is cheap; None never.

    Example:
        if (start := gates_again_from(model, TrainConfig())) is not None:
            print(f"a step of {start} tokens keeps half of what it would")
    """
    if settings.checkpoint_activations == "auto":
        cheap = has_tiles() and model.device.type == "cpu" and model.dtype == torch.float32
        return MANY if cheap else None
    return 0 if settings.checkpoint_activations == "gates" else None


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take numbers too small for full precision as zero within the block: each would cost a hundred times its due."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def heard(model: PreTrainedModel) -> Iterator[None]:
    """Let a signal be heard within a backward that runs none of our functions: each decoder layer calls one.

    Python runs its handlers between its own instructions alone, and torch's backward has none.
    """
    with ExitStack() as stack:
        for layer in decoder_layers(model).values():
            stack.callback(layer.register_forward_hook(_hear).remove)
        yield


def _hear(layer: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (a hook's signature)
    states = output[0] if isinstance(output, tuple) else output
    if isinstance(states, Tensor) and states.requires_grad:
        states.register_hook(_pass_on)


def _pass_on(gradient: Tensor) -> None:
    """Change nothing; a signal that is due is handled on the way in."""


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Keep each decoder layer's input alone within the block, and compute the layer again in the backward.

    Raises:
        ConfigError: If the model's layers cannot be.

    Source:
        Chen et al. 2016, arXiv:1604.06174, section 4.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"train.checkpoint_activations: {type(model).__name__} cannot compute its layers again")
    layers = decoder_layers(model)
    again = sum(parameter.numel() for layer in layers.values() for parameter in layer.parameters())
    head = model.get_output_embeddings().weight.numel()
    log.info(
        "activations of %d layers are computed again in the backward: about %.2f x the products, and of each layer "
        "only its input is kept",
        *(len(layers), 1 + again / (2 * (again + head))),
    )
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
