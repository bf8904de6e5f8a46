"""The course of the learning rate: a pure function of the step."""

import math
from collections.abc import Callable

from veneer.config import TrainConfig

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda _: 1.0,
}
"""Factor of the peak learning rate by the share of the steps after the warm-up that are done."""


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of an optimiser step, counted from 1.

    It rises linearly over `warmup_ratio` of the steps to its peak, then follows the schedule; the last step still
    has a learning rate above zero.

    Example:
        >>> config = TrainConfig(learning_rate=1.0, warmup_ratio=0.4)
        >>> [round(learning_rate(config, step, 5), 2) for step in range(1, 6)]
        [0.5, 1.0, 1.0, 0.67, 0.33]
    """
    warmup = round(config.warmup_ratio * num_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup - 1) / max(1, num_steps - warmup)
    return config.learning_rate * SCHEDULES[config.schedule](done)
