"""AdaLoRA: factors with a value for each of their ranks, some of which were pruned.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from veneer.files.peft_method import Method, Parts
from veneer.files.peft_values import MAX_ENTRIES, number, show
from veneer.names import did_you_mean
from veneer.ops.low_rank import Factors

_RANK = 12
_ALPHA = 8
_EPSILON = 1e-5
_VALUES = ".lora_E"


def _settings(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    alpha = raw.get("lora_alpha", _ALPHA)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        problems.append(f"lora_alpha: expected a finite number, got {show(alpha)}")
        alpha = _ALPHA
    masks = _masks(raw.get("rank_pattern"), problems)
    if alpha <= 0 and masks:
        problems.append(
            f"lora_alpha={show(alpha)} with rank_pattern: PEFT trains with init_r and loads with the pruned rank in its"
            " place, so what is meant is not known; set the lora_alpha that is meant (a positive number)"
        )
    return {"init_r": number(raw, "init_r", _RANK, problems, whole=True), "lora_alpha": alpha, "rank_pattern": masks}


def _masks(value: Any, problems: list[str]) -> dict[str, list[bool]]:
    """Read which ranks of each module stayed."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        problems.append(f"rank_pattern: expected an object of at most {MAX_ENTRIES} masks, got {show(value)}")
        return {}
    masks: dict[str, list[bool]] = {}
    for key, mask in value.items():
        path = key.removesuffix(".default").removesuffix(_VALUES)
        if not key.removesuffix(".default").endswith(_VALUES) or path in masks:
            problems.append(f"rank_pattern[{show(key)}]: expected the path of a module and {_VALUES!r}, each once")
        elif not isinstance(mask, list) or not all(type(one) is bool for one in mask):
            problems.append(f"rank_pattern[{show(key)}]: expected a list of booleans, got {show(mask)}")
        else:
            masks[path] = mask
    return masks


def _numbers(settings: Mapping[str, Any], paths: Collection[str], problems: list[str]) -> dict[str, tuple[int, float]]:
    """Return rank and scaling: the rank is what was left, the scaling still that of all."""
    rank, alpha, masks = settings["init_r"], settings["lora_alpha"], settings["rank_pattern"]
    for path, mask in masks.items():
        if path not in paths:
            problems.append(f"rank_pattern[{show(path + _VALUES)}]: no such module{did_you_mean(path, paths)}")
        if len(mask) != rank:
            problems.append(f"rank_pattern[{show(path + _VALUES)}]: expected {rank} booleans, got {len(mask)}")
    scaling = (alpha if alpha > 0 else rank) / (rank + _EPSILON)
    return {path: (sum(masks[path]) if path in masks else rank, scaling) for path in paths}


def _fits(_parts: Parts, _rank: int, _settings: Mapping[str, Any]) -> list[str]:
    return []


def _shape(parts: Parts) -> tuple[int, ...]:
    return (parts["lora_B"].shape[0], parts["lora_A"].shape[1])


def _delta(parts: Parts, scaling: float) -> Tensor:
    """Return `scaling * lora_B (lora_E ∘ lora_A)`."""
    return scaling * (parts["lora_B"].double() @ (parts["lora_E"].double() * parts["lora_A"].double()))


def _factors(parts: Parts, scaling: float, most: int | None) -> Factors:  # noqa: ARG001
    """Return the factors with the values folded in, without those that are zero."""
    kept = parts["lora_E"][:, 0] != 0
    values = scaling * parts["lora_E"][kept].double()
    return Factors(parts["lora_B"][:, kept].double(), values * parts["lora_A"][kept].double())


ADALORA = Method(
    name="AdaLoRA",
    layouts=({"lora_A": ("r", "in"), "lora_B": ("out", "r"), "lora_E": ("r", "1")},),
    keys=("init_r", "lora_alpha", "lora_dropout", "rank_pattern", "bias"),
    ignored=(
        "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        # LoRA's, which PEFT's AdaLoRA takes and does not look at.
        "use_rslora", "alpha_pattern", "init_lora_weights", "megatron_core", "qalora_group_size",
    ),
    unsupported={"fan_in_fan_out": "weights stored transposed (Conv1D)"},
    settings=_settings,
    numbers=_numbers,
    fits=_fits,
    shape=_shape,
    delta=_delta,
    factors=_factors,
    dropout="lora_dropout",
    only="lora_only",
)  # fmt: skip
"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512; PEFT 0.21.2 `tuners/adalora`)."""
