"""The course of the training loss, and the steps that leave it."""

import math
from dataclasses import dataclass, replace

_SETTLED = 20
"""Steps before a loss is judged."""

_WEIGHT = 1 / 50
"""Of the newest loss in mean and variance; larger at the start, where it is one part in so many."""

_SPIKE = 6.0
"""Standard deviations above the mean that make a spike."""

_FLOOR = 0.01
"""Smallest standard deviation, as a share of the mean: a loss that hardly moves has no spikes in its last digits."""


@dataclass(frozen=True)
class Trend:
    """Running mean and variance of the loss.

    Args:
        count: Losses seen.
        mean: Their running mean.
        variance: Their running variance.

    Example:
        >>> trend = Trend()
        >>> for number in range(50):
        ...     trend = trend.after(2.0 + 0.1 * (number % 2))
        >>> round(trend.deviation(2.1)) < 6 <= trend.deviation(4.0), trend.is_spike(4.0)
        (True, True)
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def deviation(self, loss: float) -> float:
        """Return by how many standard deviations a loss lies above the mean; 0 before there is one to speak of."""
        if self.count < _SETTLED:
            return 0.0
        return (loss - self.mean) / max(math.sqrt(self.variance), _FLOOR * abs(self.mean), 1e-12)

    def is_spike(self, loss: float) -> bool:
        """Tell whether a loss lies far above the running mean."""
        return self.deviation(loss) > _SPIKE

    def after(self, loss: float) -> "Trend":
        """Return the trend with one more loss; a spike counts as the least that is one, lest it hide the next."""
        weight = max(1 / (self.count + 1), _WEIGHT)
        away = loss - self.mean
        if self.is_spike(loss):
            away *= _SPIKE / self.deviation(loss)
        mean, variance = self.mean + weight * away, (1 - weight) * (self.variance + weight * away * away)
        return replace(self, count=self.count + 1, mean=mean, variance=variance)
