import pytest

from veneer.config import TrainConfig
from veneer.train.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_rises_to_the_peak_then_never_rises_and_stays_above_zero(name, steps, warmup):
    config = TrainConfig(learning_rate=0.5, schedule=name, warmup_ratio=warmup)
    rates = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert max(rates) == 0.5
    top = rates.index(0.5)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_known_values():
    linear = TrainConfig(learning_rate=1.0, warmup_ratio=0.0)
    assert [learning_rate(linear, step, 4) for step in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = TrainConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="cosine")
    assert learning_rate(cosine, 3, 4) == pytest.approx(0.5)
