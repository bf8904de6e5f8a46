"""Which layers a configuration means, and what is said where it fits none."""

import math

import pytest
import torch
from torch import nn

from veneer.config import LoRAConfig
from veneer.errors import TargetError
from veneer.nn.plan import plan
from veneer.nn.targets import find_targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)


def model(blocks: int = 3) -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(7, 4), "layers": nn.ModuleList(Block() for _ in range(blocks))})


def paths(**config) -> list[str]:
    return [target.path for target in find_targets(model(), LoRAConfig(**config))]


def test_suffixes_regex_and_all_linear():
    every = [f"layers.{index}.{name}" for index in range(3) for name in ("q_proj", "v_proj")]
    assert paths() == every
    assert paths(target_modules=["v_proj"]) == every[1::2]
    assert paths(target_modules=r"layers\.[02]\.q_proj") == [every[0], every[4]]
    assert paths(exclude_modules=["1.v_proj"]) == [*every[:3], *every[4:]]
    assert paths(target_modules=["q_proj"], layers_to_transform=[2]) == ["layers.2.q_proj"]


def test_rank_and_alpha_after_patterns():
    config = LoRAConfig(rank=8, alpha=16, rank_pattern={"v_proj": 2}, alpha_pattern={r"0\.v_proj": 3}, use_rslora=True)
    found = {target.path: target for target in find_targets(model(), config)}
    assert (found["layers.0.q_proj"].rank, found["layers.0.v_proj"].rank) == (8, 2)
    assert found["layers.0.v_proj"].scaling == 3 / math.sqrt(2)
    assert found["layers.1.v_proj"].scaling == 16 / math.sqrt(2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_prj", "v_proj"]}, ["entry 'q_prj' matches 0 of 14 modules; nearest: 'q_proj'"]),
        ({"target_modules": "q_proj"}, ["matches no whole path; write a list for suffixes"]),
        ({"target_modules": ["norm"]}, ["layers.0.norm is a LayerNorm", "(and 2 more like it)"]),
        ({"target_modules": ["norm"]}, ["kinds that can be adapted: linear"]),
        ({"exclude_modules": ["vproj"]}, ["exclude_modules entry 'vproj'", "nearest: 'v_proj'"]),
        ({"exclude_modules": ["layers", "q_proj", "v_proj"]}, ["nothing is left"]),
        ({"modules_to_save": ["hed"]}, ["modules_to_save entry 'hed'"]),
        ({"rank_pattern": {"k_proj": 2}}, ["rank_pattern key 'k_proj'", "nearest: "]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 9]}, ["layers_to_transform=9"]),
        ({"target_modules": ["q_prj"], "exclude_modules": ["x"], "alpha_pattern": {"y": 1.0}}, ["q_prj", "'x'", "'y'"]),
    ],
)
def test_what_matches_nothing_or_does_not_fit_is_an_error_with_the_nearest_name(config, expected):
    with pytest.raises(TargetError) as error:
        paths(**config)
    for text in expected:
        assert text in str(error.value)


def test_a_layer_at_two_places_is_refused():
    shared = nn.Linear(2, 2)
    with pytest.raises(TargetError, match="1 is the same module as 0"):
        find_targets(nn.Sequential(shared, shared), LoRAConfig())


def test_the_projection_that_multihead_attention_never_calls_is_refused():
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(TargetError, match="whose kernel never calls it"):
        find_targets(attention, LoRAConfig(target_modules=["out_proj"]))


def test_modules_to_save_are_not_adapted():
    found = plan(model(), LoRAConfig(modules_to_save=["layers.0"]))
    assert {one.path.split(".")[1] for one in found.modules} == {"1", "2"}
    assert "layers.0.norm.weight" in {one.path for one in found.trained}


def test_plan_counts_what_attach_makes_and_touches_nothing():
    torch.manual_seed(0)
    one = model()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    found = plan(one, LoRAConfig(rank=2, bias="lora_only"))
    assert found.num_parameters == 3 * (2 * 8 + 2 * 6) + 3 * (4 + 2)
    assert found.num_bytes == 4 * found.num_parameters
    assert found.base_parameters == sum(parameter.numel() for parameter in one.parameters())
    assert [str(module) for module in one.modules()] == [str(module) for module in one.modules()]
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    assert "q_proj" in str(found)
    assert "0-2" in str(found)
    assert found.to_json()["modules"][0]["shape"] == (4, 4)


def test_the_encoder_layers_that_a_fused_kernel_reads_are_refused_or_left_out():
    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(TargetError, match=r"linear1 is read by the fused kernel"):
        find_targets(nn.Sequential(encoder), LoRAConfig(target_modules=["linear1"]))
    both = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 4)})
    assert [target.path for target in find_targets(both, LoRAConfig())] == ["head"]


def test_a_shared_layer_elsewhere_is_no_hindrance():
    shared = nn.Linear(2, 2)
    one = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    assert [target.path for target in find_targets(one, LoRAConfig(target_modules=["c"]))] == ["c"]
