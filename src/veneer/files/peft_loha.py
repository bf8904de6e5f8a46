"""LoHa: the update is the elementwise product of two low-rank products.

Shapes: O out, I in, R rank, K and L kernel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.files.peft_method import Layout, Method, Parts, by_patterns
from veneer.files.peft_values import choice, number, pattern
from veneer.ops.low_rank import Factors, khatri_rao, require_affordable

_RANK = 8
_ALPHA = 8

_LINEAR: Layout = {
    "hada_w1_a": ("out", "r"),
    "hada_w1_b": ("r", "in"),
    "hada_w2_a": ("out", "r"),
    "hada_w2_b": ("r", "in"),
}
_CONVOLUTION: Layout = {
    "hada_t1": ("r", "r", "k", "l"),
    "hada_t2": ("r", "r", "k", "l"),
    "hada_w1_a": ("r", "out"),
    "hada_w1_b": ("r", "in"),
    "hada_w2_a": ("r", "out"),
    "hada_w2_b": ("r", "in"),
}


def lycoris_settings(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Read what LoHa and LoKr share."""
    return {
        "r": number(raw, "r", _RANK, problems, whole=True),
        "alpha": number(raw, "alpha", _ALPHA, problems),
        "rank_pattern": pattern(raw, "rank_pattern", problems, whole=True),
        "alpha_pattern": pattern(raw, "alpha_pattern", problems),
        "use_effective_conv2d": choice(raw, "use_effective_conv2d", (False, True), problems),
    }


def _fits(parts: Parts, _rank: int, settings: Mapping[str, Any]) -> list[str]:
    if "hada_t1" in parts and not settings["use_effective_conv2d"]:
        return ["has hada_t1, which use_effective_conv2d=False has not"]
    return []


def _shape(parts: Parts) -> tuple[int, ...]:
    if "hada_t1" in parts:
        return (parts["hada_w1_a"].shape[1], parts["hada_w1_b"].shape[1], *parts["hada_t1"].shape[2:])
    return (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])


def _half(parts: Parts, which: int) -> Tensor:
    """Return one of the two products, in the weight's shape."""
    a, b = parts[f"hada_w{which}_a"].double(), parts[f"hada_w{which}_b"].double()
    if "hada_t1" not in parts:
        return a @ b
    return torch.einsum("rskl,ro,si->oikl", parts[f"hada_t{which}"].double(), a, b)


def _delta(parts: Parts, scaling: float) -> Tensor:
    """Return `scaling * (w1_a w1_b) ∘ (w2_a w2_b)`."""
    return scaling * _half(parts, 1) * _half(parts, 2)


def _factors(parts: Parts, scaling: float, most: int | None) -> Factors | None:  # noqa: ARG001
    """Return factors of rank r², or None where that is no less than the layer's own rank."""
    if "hada_t1" in parts:
        return None
    (out_size, in_size), rank = _shape(parts), parts["hada_w1_a"].shape[1]
    if rank * rank >= min(out_size, in_size):
        return None
    require_affordable(rank * rank, out_size, in_size)
    B, A = khatri_rao(*(parts[f"hada_w{which}_{side}"].double() for which in (1, 2) for side in "ab"))
    return Factors(scaling * B, A)


LOHA = Method(
    name="LoHa",
    layouts=(_LINEAR, _CONVOLUTION),
    keys=("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
    ignored=("rank_dropout", "module_dropout", "init_weights"),
    settings=lycoris_settings,
    numbers=by_patterns,
    fits=_fits,
    shape=_shape,
    delta=_delta,
    factors=_factors,
)
"""LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS; PEFT 0.21.2 `tuners/loha`)."""
