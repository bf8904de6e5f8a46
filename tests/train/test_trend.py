"""The course of a loss: noise is none, a burst is a spike, and one spike does not hide the next."""

import random

from hypothesis import given
from hypothesis import strategies as st

from veneer.train.trend import Trend


def spikes(losses: list[float]) -> list[int]:
    trend, found = Trend(), []
    for place, loss in enumerate(losses):
        if trend.is_spike(loss):
            found.append(place)
        trend = trend.after(loss)
    return found


def noisy(count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [2.0 * 0.999**step + 0.3 * draw.gauss(0, 1) for step in range(count)]


@given(st.integers(0, 1000))
def test_noise_is_no_spike(seed):
    assert spikes(noisy(300, seed)) == []


@given(st.integers(0, 1000), st.integers(50, 250))
def test_a_burst_is_found_step_by_step(seed, at):
    losses = noisy(300, seed)
    for place in range(at, at + 3):
        losses[place] = 8.0
    assert spikes(losses) == [at, at + 1, at + 2]


def test_a_loss_that_stands_still_has_no_spikes_in_its_last_digits():
    assert spikes([1.0 + 1e-9 * (step % 7) for step in range(100)]) == []


def test_nothing_is_judged_before_there_is_something_to_judge_by():
    assert spikes([1.0] * 10 + [100.0]) == []


def test_mean_and_variance_are_those_of_the_first_losses():
    trend = Trend()
    for loss in (1.0, 2.0, 3.0, 6.0):
        trend = trend.after(loss)
    assert (trend.count, trend.mean, trend.variance) == (4, 3.0, 3.5)
