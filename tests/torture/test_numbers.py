"""NaN and infinity, put in at a random step and layer: caught before the update; and no alarm where there is none."""

import random
from pathlib import Path

import pytest
import torch

from veneer.config import RunConfig
from veneer.errors import NonFiniteError
from veneer.nn.attach import attachment_of
from veneer.train import loop
from veneer.train.run import run
from veneer.train.running import Running

NAME = "lora, dropout, accumulation"
WHERE = ("gradient", "adapter", "weight", "activation")


def put_in(model, where: str, value: float, draw: random.Random) -> None:
    """Spoil one number somewhere."""
    layer = model.model.layers[draw.randrange(2)]
    if where == "activation":
        place = draw.randrange(32)

        def spoil(_module, _args, output):
            output = output.clone()
            output[..., place] = value
            return output

        layer.register_forward_hook(spoil)
        return
    parameters = list(attachment_of(model).parameters().values())
    if where == "weight":
        parameters = [one for one in layer.parameters() if not one.requires_grad and one.dim() == 2]
    one = draw.choice(parameters)
    place = draw.randrange(one.numel())
    if where == "gradient":

        def spoil_gradient(gradient):
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            gradient.view(-1)[place] = value
            return gradient

        one.register_hook(spoil_gradient)
    else:
        one.data.view(-1)[place] = value


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.torture)])
def test_what_is_not_finite_is_caught_before_the_update(settings_of, monkeypatch, count):
    draw = random.Random(count)
    for turn in range(count):
        where, value = WHERE[turn % len(WHERE)], draw.choice([float("nan"), float("inf"), float("-inf")])
        at, seen = draw.randint(1, 12), {}
        settings = settings_of(NAME, max_steps=12)
        config = RunConfig(**{**settings, "out": f"{settings['out']}-{turn}"})

        original = loop.step_gradient

        def spoiled(model, rows, step, begin, at=at, where=where, value=value, seen=seen, original=original, **options):
            if begin.args[1] == at:
                put_in(model, where, value, draw)
                running: Running = begin.args[0]
                seen["optimizer"], seen["before"] = running.optimizer, bits(running.optimizer)
                seen["rows"] = [rows[index].source for micro in step for index in micro]
            return original(model, rows, step, begin, **options)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "step_gradient", spoiled)
            with pytest.raises(NonFiniteError, match=rf"step {at}: .* the update was not applied") as error:
                run(config)
        assert bits(seen["optimizer"]) == seen["before"], (where, value)
        named = set(error.value.problems) & set(seen["rows"])
        assert named, "the rows are named"
        assert "the loss is" in str(error.value) or set(error.value.problems) - named, "the tensors are named"
        if where == "activation":
            assert "what model.layers." in str(error.value)
        assert (Path(config.out) / "loss.png").exists() == (at > 1)


def bits(optimizer) -> list[bytes]:
    """Every bit of what trains, and of its moments."""
    tensors = {**{name: one.data for name, one in optimizer._parameters.items()}, **optimizer.state()}
    return [one.contiguous().numpy().tobytes() for one in tensors.values()]


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.torture)])
def test_no_alarm_in_clean_steps(settings_of, count):
    settings = settings_of(NAME, epochs=count, max_steps=count, checkpoint_every=1000, learning_rate=1e-3)
    result = run(RunConfig(**{**settings, "data": {"train": settings["data"]["train"]}}))
    assert result.steps == count
    assert result.untrained == ()
    print(f"{count} steps, {len(result.spikes)} spikes, loss {result.loss:.3f}")
    assert len(result.spikes) <= count // 1000
    assert torch.isfinite(torch.tensor(result.loss))
