"""What an adapter does to the outputs of a base: the same input with it and without."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import ConfigError, VeneerError
from veneer.files.doctor_codes import Finding
from veneer.tools.merge_probe import Probe, ask, ask_attached, default_probe

LEAST = 1e-4
"""Below this share of the largest output an effect is next to nothing."""


@dataclass(frozen=True)
class Effect:
    """What an adapter changes on a probe.

    Args:
        largest: Largest change of an output.
        relative: The same over the largest output of the base.
        divergence: Mean Kullback-Leibler divergence of the adapted distribution from the base's, in nats.
        top_changed: At how many positions the likeliest token is another.
        positions: How many positions there are.
    """

    largest: float
    relative: float
    divergence: float
    top_changed: int
    positions: int


def measure_effect(
    model: nn.Module, adapter: Adapter, probe: Probe | None = None
) -> tuple[Effect | None, list[Finding]]:
    """Return what an adapter changes of a model's outputs, and what is to be said of it; the model is as it was.

    Args:
        model: A bare model.
        adapter: An adapter that can be attached to it.
        probe: A function from the model to its logits; without one, language models are asked about fixed tokens.

    Example:
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> adapter = Adapter({"0": LowRank(torch.ones(1, 2), torch.zeros(2, 1), 1.0)}, LoRAConfig(rank=1))
        >>> effect, found = measure_effect(nn.Sequential(nn.Linear(2, 2)), adapter, lambda one: one(torch.ones(1, 2)))
        >>> effect.largest, [one.code for one in found]
        (0.0, ['V509'])
    """
    why = None
    if probe is None:
        probe, why = default_probe(model)
    if probe is None:
        return None, [Finding("V510", "the base", why or "no probe")]
    try:
        before = ask(model, probe)
        after = ask_attached(model, adapter, probe)
    except ConfigError:
        raise
    except VeneerError as error:
        return None, [Finding("V510", "the base", error.message)]
    assert after is not None  # there is a probe
    if not bool(torch.isfinite(before).all()):
        return None, [Finding("V510", "the base", "its own outputs on the probe are not finite")]
    if not bool(torch.isfinite(after).all()):
        bad = int((~torch.isfinite(after)).sum())
        return None, [Finding("V508", "the base", f"{bad} of {after.numel()} outputs on the probe are not finite")]
    effect = compare_outputs(before, after)
    if effect.largest == 0:
        return effect, [Finding("V509", "the base", "every output on the probe is the same, bit for bit")]
    if effect.relative < LEAST:
        what = f"the largest change is {effect.largest:.3g}, {effect.relative:.1g} of the largest output"
        return effect, [Finding("V511", "the base", what)]
    return effect, []


def compare_outputs(before: Tensor, after: Tensor) -> Effect:
    """Return how far logits are apart; the last dimension runs over the tokens.

    Example:
        >>> one = compare_outputs(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        >>> one.largest, one.top_changed, round(one.divergence, 4)
        (1.0, 1, 0.4621)
    """
    largest, scale = float((after - before).abs().max()), float(before.abs().max())
    base, adapted = (torch.log_softmax(one.double().reshape(-1, one.shape[-1]), -1) for one in (before, after))
    divergence = torch.sum(adapted.exp() * (adapted - base), -1).clamp(min=0)
    changed = before.argmax(-1) != after.argmax(-1)
    return Effect(
        largest=largest,
        relative=largest / scale if scale else float(largest > 0),
        divergence=float(divergence.mean()),
        top_changed=int(changed.sum()),
        positions=changed.numel(),
    )
