"""The flat optimiser equals torch's over the parameters one by one."""

import pytest
import torch
from torch import nn

from veneer.errors import ConfigError, NonFiniteError
from veneer.train.optimizer import FlatAdamW


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(*shape, generator=generator))
        for name, shape in {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}.items()
    }


def loss_of(values: dict[str, nn.Parameter], step: int) -> torch.Tensor:
    return sum((parameter.sin() * (step + 1)).sum() for parameter in values.values())


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_adamw_with_clipping(max_norm, decay):
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, weight_decay=decay, max_grad_norm=max_norm)
    plain = torch.optim.AdamW(theirs.values(), weight_decay=decay)
    for step in range(6):
        rate = 0.1 / (step + 1)
        loss_of(ours, step).backward()
        norm = flat.step(rate)
        plain.zero_grad()
        loss_of(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or float("inf"))
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


def test_rates_and_decay_by_name_equal_groups_of_adamw():
    """LoRA+ and parameters without decay; the buffer puts alike ones together, whatever their order."""
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, weight_decay=0.1, max_grad_norm=0.5, rates={"a": 16.0, "c": 16.0}, undecayed=["c"])
    groups = [
        {"params": [theirs["a"]], "weight_decay": 0.1},
        {"params": [theirs["b"]], "weight_decay": 0.1},
        {"params": [theirs["c"]], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups)
    for step in range(4):
        loss_of(ours, step).backward()
        norm = flat.step(0.01 * (step + 1))
        plain.zero_grad()
        loss_of(theirs, step).backward()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5).item(), rel=1e-5)
        for group, rate in zip(plain.param_groups, (16.0, 1.0, 16.0), strict=True):
            group["lr"] = 0.01 * (step + 1) * rate
        plain.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
    state = flat.state()
    for name, parameter in theirs.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[f"{name}.{moment}"], plain.state[parameter][moment])


@pytest.mark.parametrize("options", [{}, {"rates": {"a": 4.0}, "undecayed": ["b"]}])
def test_parameters_and_gradients_are_views_of_one_buffer(options):
    values = parameters()
    FlatAdamW(values, weight_decay=0.1, max_grad_norm=None, **options)
    for tensors in (values.values(), [one.grad for one in values.values()]):
        assert len({one.untyped_storage().data_ptr() for one in tensors}) == 1


@pytest.mark.parametrize("options", [{}, {"rates": {"b": 4.0}}])
def test_state_goes_over_to_another_optimiser_exactly(options):
    one, other = parameters(), parameters()
    first = FlatAdamW(one, weight_decay=0.0, max_grad_norm=1.0, **options)
    assert first.state() == {}
    for step in range(3):
        loss_of(one, step).backward()
        first.step(0.1)
    for name, parameter in other.items():
        parameter.data.copy_(one[name])
    second = FlatAdamW(other, weight_decay=0.0, max_grad_norm=1.0, **options)
    second.load_state(first.state(), steps=3)
    for optimizer, values in ((first, one), (second, other)):
        loss_of(values, 9).backward()
        optimizer.step(0.1)
    for name in one:
        assert torch.equal(one[name], other[name])
    assert set(first.state()) == {f"{name}.{moment}" for name in one for moment in ("exp_avg", "exp_avg_sq")}


def test_a_gradient_that_is_not_finite_is_named_and_not_applied():
    values = parameters()
    before = {name: one.detach().clone() for name, one in values.items()}
    optimizer = FlatAdamW(values, weight_decay=0.0, max_grad_norm=1.0)
    loss_of(values, 0).backward()
    values["b"].grad[1] = float("nan")
    with pytest.raises(NonFiniteError) as error:
        optimizer.step(0.1)
    assert error.value.problems == ("b",)
    assert all(torch.equal(before[name], values[name]) for name in values)


def test_mixed_dtypes_are_refused():
    values = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2).bfloat16())}
    with pytest.raises(ConfigError, match="bfloat16 and float32 cannot train together"):
        FlatAdamW(values, weight_decay=0.0, max_grad_norm=None)
