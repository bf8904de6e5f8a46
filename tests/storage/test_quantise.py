"""Quantising whole models: what is replaced, what is left, what is refused before anything changes."""

import weakref

import pytest
import torch
from tests.storage.foreign import int8_tensor_linear
from torch import nn

from veneer.errors import BaseModelError, ConfigError
from veneer.storage import quantise
from veneer.storage.int8 import Int8Linear
from veneer.storage.quantise import QUANTISERS, quantise_model


class Special(nn.Linear):
    """A subclass, which may do anything in its forward."""


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 8),
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)),
            "special": Special(8, 8),
            "head": nn.Linear(8, 11, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: type(one).__name__ for path, one in model.named_modules() if not list(one.children())}


@pytest.mark.parametrize("storage", sorted(QUANTISERS))
def test_plain_linear_layers_are_replaced_and_the_model_is_frozen(storage):
    model = net()
    name = {"int8": "Int8Linear", "nf4": "NF4Linear"}[storage]
    assert quantise_model(model, storage) == 4
    found = kinds(model)
    assert [path for path, kind in found.items() if kind == name] == [f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 2)]
    assert (found["head"], found["special"]) == ("Linear", "Special")
    assert model["head"].weight is model["embed"].weight
    assert not any(one.requires_grad for one in model.parameters())
    assert quantise_model(model, storage) == 0


def test_an_untied_head_is_replaced():
    model = net()
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    assert quantise_model(model, "int8") == 5


def test_weights_shared_in_any_way_are_left():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.detach())  # another Parameter over the same numbers
    twice = nn.Linear(4, 4)
    model = nn.ModuleList([first, second, twice, twice, nn.Linear(4, 4)])
    assert quantise_model(model, "int8") == 1
    assert [type(one).__name__ for one in model] == ["Linear"] * 4 + ["Int8Linear"]
    assert model[2] is model[3]


def test_weights_that_lie_in_one_file_are_not_shared():
    storage = torch.randn(2 * 16)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(storage[16 * index : 16 * (index + 1)].view(4, 4))
    assert quantise_model(model, "int8") == 2


def test_weights_stored_in_other_ways_are_left():
    model = nn.Sequential(int8_tensor_linear(4, 4), nn.Linear(4, 4).to(torch.float8_e4m3fn), nn.Linear(4, 4))
    assert quantise_model(model, "nf4") == 1


def test_skip_takes_paths_and_everything_inside():
    model = net()
    assert quantise_model(model, "int8", skip={"blocks.0", "blocks.1.2"}) == 1
    assert isinstance(model["blocks"][1][0], Int8Linear)
    prefix = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    assert quantise_model(prefix, "int8", skip=["a"]) == 1
    assert isinstance(prefix["ab"], Int8Linear)


@pytest.mark.parametrize(
    ("storage", "skip", "said"),
    [
        ("int4", (), "storage='int4' is not one of int8, nf4; nearest: 'int8'"),
        ("int8", ["blocks.0.3"], r"'blocks.0.3' is no module; nearest: 'blocks\.[01]\.[012]'"),
        ("int8", "head", r"write \['head'\]"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(storage, skip, said):
    model = net()
    before = kinds(model)
    with pytest.raises(ConfigError, match=said):
        quantise_model(model, storage, skip=skip)
    assert kinds(model) == before


def test_a_model_that_is_a_layer_is_refused():
    with pytest.raises(ConfigError, match="quantise_nf4"):
        quantise_model(nn.Linear(2, 2), "nf4")


def test_layers_with_hooks_are_refused_before_anything_changes():
    model = net()
    model["blocks"][1][0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"hooks(.|\n)*- blocks\.1\.0"):
        quantise_model(model, "int8")
    assert "Int8Linear" not in kinds(model).values()
    assert quantise_model(model, "int8", skip=["blocks.1.0"]) == 3


def test_every_weight_that_is_not_finite_is_named_before_anything_changes():
    model = net()
    with torch.no_grad():
        model["blocks"][0][2].weight[0, 0] = float("nan")
        model["blocks"][1][0].weight[0, 1] = float("inf")
    with pytest.raises(BaseModelError) as caught:
        quantise_model(model, "nf4")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["blocks.0.2", "blocks.1.0"]
    assert "NF4Linear" not in kinds(model).values()
    assert any(one.requires_grad for one in model.parameters())


def test_weights_without_values_are_refused():
    with pytest.raises(BaseModelError, match=r"0: the weight is on the meta device"):
        quantise_model(nn.Sequential(nn.Linear(2, 2, device="meta")), "int8")


def test_one_float_weight_at_a_time(monkeypatch):
    """When a layer is quantised, the float weights of those before it are gone."""
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []

    def counting(layer: nn.Linear) -> nn.Module:
        alive.append(sum(one() is not None for one in weights))
        return Int8Linear.from_linear(layer)

    monkeypatch.setattr(quantise, "QUANTISERS", {"int8": counting})
    assert quantise_model(model, "int8") == 4
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize(("storage", "largest"), [("int8", 0.02), ("nf4", 0.2)])
def test_a_language_model_still_says_nearly_the_same(tiny, storage, largest):
    model = tiny()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert quantise_model(model, storage) == 14
        after = model(ids).logits
    difference = (after - before).norm() / before.norm()
    assert 0 < difference < largest
