"""What a plan notes, and what a configuration asks of layers that cannot give it."""

import pytest
import torch
from torch import nn

from veneer.config import LoRAConfig
from veneer.errors import ConfigError, TargetError
from veneer.nn.attach import attach
from veneer.nn.plan import plan


class Half(nn.Module):
    """Calls one of its layers, and reads the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.table = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.matrix = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_layers_that_a_probe_never_calls_are_noted():
    model = Half()
    found = plan(model, LoRAConfig(rank=2), probe=lambda: model(torch.ones(1, 4)))
    assert found.notes == ("read: never called in the probe run; an adapter would have no effect there",)
    assert "note: read: never called" in str(found)
    assert not model.called._forward_pre_hooks
    with pytest.raises(RuntimeError):
        plan(model, LoRAConfig(rank=2), probe=lambda: model(torch.ones(1, 3)))
    assert not model.called._forward_pre_hooks


def test_ranks_above_a_layers_own_are_noted():
    notes = plan(Half(), LoRAConfig(rank=6, target_modules=["called", "conv"])).notes
    assert notes == (
        "called: rank 6 is above the layer's own rank of 4; more has no effect",
        "conv: rank 6 is above the layer's own rank of 4; more has no effect",
    )


def test_patterns_that_say_different_things_of_a_layer_are_noted():
    config = LoRAConfig(
        rank=1, target_modules=["called"], rank_pattern={"called": 2, "c.*": 3}, alpha_pattern={"call.*": 1.0}
    )
    assert plan(Half(), config).notes == ("rank_pattern: 'called' and 'c.*' both stand for called; the first counts",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["conv"], "rank": 3}, "conv: rank 3 must be a multiple of the convolution's 2 groups"),
        ({"target_modules": ["conv"], "init": "pissa"}, "conv: init='pissa' is not for layers of kind 'conv'"),
        (
            {"target_modules": ["table"], "parts": {"table": [(0, 2)]}},
            "table: parts is not for layers of kind 'embedding'",
        ),
        (
            {"target_modules": ["called"], "parts": {"called": [(0, 9)]}},
            "parts end at row 9, the layer has 4 output rows",
        ),
        ({"target_modules": ["called"], "parts": {"called": [(0, 2)]}, "init": "olora"}, "choose kaiming with parts"),
        ({"target_modules": (), "target_parameters": ["matrix"]}, "matrix belongs to the model itself"),
        ({"target_modules": (), "target_parameters": ["called.wieght"]}, "nearest: 'called.weight'"),
    ],
)
def test_what_a_layer_cannot_take_is_said_by_name_before_anything_is_touched(changes, said):
    model = Half()
    modules = dict(model.named_modules())
    with pytest.raises(TargetError) as caught:
        attach(model, LoRAConfig(**{"rank": 2, **changes}))
    assert said in str(caught.value)
    assert dict(model.named_modules()) == modules


def test_unknown_starts_and_things_seen_of_other_layers_are_refused():
    with pytest.raises(ConfigError, match="nearest: 'pissa'"):
        attach(Half(), LoRAConfig(rank=2, target_modules=["called"], init="pisa"))
    with pytest.raises(ConfigError, match="caled: no adapted layer; nearest: 'called'"):
        attach(Half(), LoRAConfig(rank=2, target_modules=["called"]), observed={"caled": torch.ones(2, 4)})


class TwoTables(nn.Module):
    """An encoder and a decoder that look the same rows up, as T5 and BART do."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder = nn.Embedding(8, 4), nn.Embedding(8, 4)
        self.encoder.weight = self.shared.weight

    def forward(self, ids):
        return self.shared(ids) + self.encoder(ids)


class Shifted(nn.Embedding):
    """Reads other rows than it is asked for, as OPT's positions do."""

    def forward(self, ids):
        return super().forward(ids + 2)


@pytest.mark.parametrize("changes", [{"target_modules": ["shared"]}, {"token_rows": {"shared": [1]}}])
def test_a_table_that_another_one_reads_too_is_refused(changes):
    model = nn.Sequential(TwoTables(), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"0\.shared: its rows are also those of 0\.encoder"):
        attach(model, LoRAConfig(**{"rank": 1, "target_modules": ["1"], **changes}))


@pytest.mark.parametrize("changes", [{"target_modules": ["0"]}, {"token_rows": {"0": [1]}}])
def test_a_table_with_a_forward_of_its_own_is_refused(changes):
    model = nn.Sequential(Shifted(8, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="0 is a Shifted, whose own forward"):
        attach(model, LoRAConfig(**{"rank": 1, "target_modules": ["1"], **changes}))


def test_what_could_not_be_saved_is_noted():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 2))
    assert "save_adapter refuses it" in plan(model, LoRAConfig(rank=1, target_modules=["0"])).notes[0]
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert plan(model, LoRAConfig(rank=1, target_modules=["0"])).notes == ()
    assert len(plan(model, LoRAConfig(rank=1, target_modules=["0"], use_dora=True)).notes) == 2
