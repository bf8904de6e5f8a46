"""What an initialisation is given and what it gives back, and the checks that all of them share.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError


@dataclass(frozen=True)
class Factors:
    """The first values of one layer's low-rank factors, in float32.

    Args:
        lora_A: Down projection (R, I).
        lora_B: Up projection (O, R).
        compensated: The update must be counted from here: `scaling · (B A - B0 A0)`, so that the first output is the
            base's up to rounding, and the base's weight stays as it is. Where false, `scaling · B A` is the update.
    """

    lora_A: Tensor
    lora_B: Tensor
    compensated: bool


@dataclass(frozen=True)
class InitialRequest:
    """One layer that asks for its first factors, and whatever an initialisation may need of it.

    Args:
        shape: Of the weight: (out, in).
        rank: Of the factors.
        scaling: Factor of the update.
        generator: Where random numbers come from; a CPU generator.
        weight_OI: The layer's weight; for LoftQ the one of full precision.
        inputs: Right singular vectors of the layer's inputs, strongest first, as `nn.observe.input_directions` finds
            them: (at least R, I).
        gradient_OI: Gradient of the loss by the weight, as `nn.observe.weight_gradients` finds it.
        quantise: Takes a weight to what the quantised layer holds of it, as floating-point numbers.
        options: Settings of the initialisation.
    """

    shape: tuple[int, int]
    rank: int
    scaling: float
    generator: torch.Generator
    weight_OI: Tensor | None = None
    inputs: Tensor | None = None
    gradient_OI: Tensor | None = None
    quantise: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def as_matrix(values: Tensor, what: str) -> Tensor:
    """Return a matrix in float32.

    Raises:
        ConfigError: If it is no matrix, or holds NaN or infinity.

    Example:
        >>> as_matrix(torch.ones(2, 3, dtype=torch.bfloat16), "the weight").dtype
        torch.float32
    """
    if values.dim() != 2:
        raise ConfigError(f"{what} must be a matrix (out, in), got shape {tuple(values.shape)}")
    matrix = values.detach().float()
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"{what} holds NaN or infinity; factors cannot be made from it")
    return matrix


def nonzero_matrix(values: Tensor, what: str) -> Tensor:
    """Return a matrix in float32 that has directions at all.

    Raises:
        ConfigError: If it is zero, no matrix, or not finite.
    """
    matrix = as_matrix(values, what)
    if not bool(matrix.any()):
        raise ConfigError(f"{what} is zero: it has no directions to start from; use 'kaiming' for this layer")
    return matrix


def check_rank(rank: int, most: int | None = None, why: str = "") -> None:
    """Raise where a rank cannot be had.

    Raises:
        ConfigError: If it is below 1 or above `most`.
    """
    if rank < 1:
        raise ConfigError(f"a rank must be at least 1, got {rank}")
    if most is not None and rank > most:
        raise ConfigError(f"rank={rank} is too high: {why}, so at most {most}; lower it, or use 'kaiming' for any rank")


def check_scaling(scaling: float) -> None:
    """Raise where a matrix cannot be divided by a scaling.

    Raises:
        ConfigError: If it is not a positive, finite number.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ConfigError(f"the scaling (alpha / rank) must be positive and finite, got {scaling}")


def whole_number(value: Any, option: str, least: int) -> int:
    """Return an option that counts something.

    Raises:
        ConfigError: If it is no whole number, or below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option} must be a whole number of at least {least}, got {value!r}")
    return value
