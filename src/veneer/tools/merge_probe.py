"""The probe of a merge: the same input to the base, to the adapter attached, and to the merged model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import AdapterError, ConfigError
from veneer.nn.attach import attach, detach
from veneer.nn.modes import evaluating
from veneer.tools.merge_config import HasConfig
from veneer.tools.merge_record import ProbeResult
from veneer.tools.merge_ties import HasBothEmbeddings

Probe = Callable[[nn.Module], Tensor]

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1.5e-1,
}
"""What attached and merged may differ by, as a share of the largest output, by the coarsest dtype of the model.

Measured on SmolLM2-135M, all linear layers: 3e-6 in float32, 5e-3 in float16, 2e-2 to 5e-2 in bfloat16. In 16 bits it
makes a difference whether an update is added to weights or to outputs. An adapter whose effect is below that, as the
record says, is not proved by the probe; the weights are its exact sums, rounded once, all the same.
"""


@runtime_checkable
class _MayDecode(Protocol):
    """The protocol of transformers' configurations for models of two halves."""

    is_encoder_decoder: bool


def default_probe(model: nn.Module) -> tuple[Probe | None, str | None]:
    """Return the probe for a causal language model of transformers' protocol, or None and why there is none.

    Example:
        >>> default_probe(nn.Linear(1, 1))[1]
        'not a language model with an input table and a head; give `probe`, a function from the model to a tensor'
    """
    table = head = None
    if isinstance(model, HasBothEmbeddings):
        head = model.get_output_embeddings()
        table = None if head is None else model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return None, (
            "not a language model with an input table and a head; give `probe`, a function from the model to a tensor"
        )
    config = model.config if isinstance(model, HasConfig) else None
    if isinstance(config, _MayDecode) and config.is_encoder_decoder:
        return None, "an encoder with a decoder; give `probe`, a function from the model to a tensor"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table.num_embeddings, (2, 16), generator=generator).to(table.weight.device)
    return lambda one: _logits(one(input_ids=ids)), None


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def ask(model: nn.Module, probe: Probe) -> Tensor:
    """Return what a probe finds, in evaluation mode, without gradients, in float64 on the CPU.

    Raises:
        ConfigError: If that is no tensor.
    """
    with evaluating(model), torch.no_grad():
        output = probe(model)
    if not isinstance(output, Tensor):
        raise ConfigError(f"`probe` must return a tensor, got a {type(output).__name__}")
    return output.detach().to("cpu", torch.float64, copy=True)


def ask_attached(model: nn.Module, adapter: Adapter, probe: Probe | None) -> Tensor | None:
    """Return what a probe finds with the adapter attached; without a probe, only check that it can be attached."""
    attach(model, adapter, any_base=True)
    try:
        return None if probe is None else ask(model, probe)
    finally:
        detach(model)


def compare(base: Tensor, attached: Tensor, merged: Tensor, tolerance: float | None) -> ProbeResult:
    """Return how far apart the three are.

    Raises:
        AdapterError: If the merged model is further from the attached adapter than the tolerance, or something is not
            finite.

    Example:
        >>> one = torch.ones(2)
        >>> compare(0 * one, one, one, 1e-3).effect
        1.0
    """
    if not bool(torch.isfinite(attached).all() and torch.isfinite(merged).all()):
        raise AdapterError(
            "the probe's outputs are not finite with the adapter attached or merged (the model is as it was before): "
            "check the adapter and the base model"
        )
    largest = attached.abs().max().item() if attached.numel() else 0.0
    effect, difference = _largest(attached - base), _largest(merged - attached)
    shares = (effect / largest, difference / largest) if largest else (float(effect > 0), float(difference > 0))
    if tolerance is not None and shares[1] > tolerance:
        raise AdapterError(
            f"the merged model does not compute what the adapter did: outputs differ by {difference:.3g}, "
            f"{shares[1]:.3g} of the largest, at most {tolerance:g} is let pass; the adapter itself changes them by "
            f"{effect:.3g} (the model is as it was before)"
        )
    return ProbeResult(True, None, effect, difference, *shares, tolerance)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
