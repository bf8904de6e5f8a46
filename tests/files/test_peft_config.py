"""PEFT's configuration: exact types, no key lost, and what is written is what PEFT itself would write."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.peft_config import config_from_peft, config_to_peft

MINIMAL = {"peft_type": "LORA", "target_modules": ["q"]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def refused(**changes):
    with pytest.raises(AdapterError) as caught:
        config_from_peft({**MINIMAL, **changes}, "adapter_config.json")
    assert "adapter_config.json" in caught.value.message
    return str(caught.value)


def adapter_of(config, paths=("l.0.q", "l.1.q"), **metadata):
    modules = {}
    for path in paths:
        rank = config.rank_for(path)
        modules[path] = LowRank(torch.zeros(rank, 3), torch.zeros(2, rank), config.scaling_for(path))
    return Adapter(modules, config, metadata=AdapterMetadata(**metadata))


def test_a_minimal_file_takes_peft_s_defaults_not_ours():
    config, metadata = config_from_peft(MINIMAL, "x")
    assert config == LoRAConfig(rank=8, alpha=8.0, target_modules=("q",))
    assert metadata == AdapterMetadata()


def test_what_peft_writes_is_read(tmp_path):
    written = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["v", "q"], exclude_modules=["x"], bias="lora_only",
        use_rslora=True, modules_to_save=["score"], rank_pattern={"q": 2}, alpha_pattern={"v": 3},
        layers_to_transform=[1, 0], layers_pattern="h", task_type="CAUSAL_LM", base_model_name_or_path="base",
        revision="r1",
    )  # fmt: skip
    written.save_pretrained(tmp_path)
    config, metadata = config_from_peft(json.loads((tmp_path / "adapter_config.json").read_text()), "x")
    assert config == LoRAConfig(
        rank=4, alpha=32, dropout=0.1, target_modules=("q", "v"), exclude_modules=("x",), bias="lora_only",
        use_rslora=True, modules_to_save=("score",), rank_pattern={"q": 2}, alpha_pattern={"v": 3.0},
        layers_to_transform=(0, 1), layers_pattern="h",
    )  # fmt: skip
    assert metadata == AdapterMetadata(base="base", revision="r1", task_type="CAUSAL_LM")


def test_what_is_written_is_peft_s_own_file(tmp_path):
    LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["q"], rank_pattern={"1.q": 2}, inference_mode=True,
        task_type="CAUSAL_LM", base_model_name_or_path="base", revision="r1",
    ).save_pretrained(tmp_path)  # fmt: skip
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    config = LoRAConfig(rank=4, alpha=32, dropout=0.1, target_modules=["q"], rank_pattern={"1.q": 2})
    ours = config_to_peft(adapter_of(config, base="base", revision="r1", task_type="CAUSAL_LM"))
    assert ours == theirs
    assert type(ours["lora_alpha"]) is int


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"target_modules": ["q", "1.q"]}, ["1.q", "q"]),
        ({"target_modules": "all-linear"}, ["l.0.q", "l.1.q"]),
        ({"target_modules": r".*\.q"}, ["l.0.q", "l.1.q"]),
        ({"target_modules": ["q"], "exclude_modules": ["k"]}, ["l.0.q", "l.1.q"]),
        ({"target_modules": ["q"], "layers_to_transform": [0, 1]}, ["l.0.q", "l.1.q"]),
        ({"target_modules": ["q", "v"]}, ["l.0.q", "l.1.q"]),  # nothing in the adapter is a v
        ({"target_modules": ["0.q"]}, ["l.0.q", "l.1.q"]),  # does not cover what is there
    ],
)
def test_targets_are_suffixes_where_they_fit_and_else_full_paths(settings_, expected):
    raw = config_to_peft(adapter_of(LoRAConfig(**settings_)))
    assert raw["target_modules"] == expected
    assert raw["exclude_modules"] is raw["layers_to_transform"] is raw["layers_pattern"] is None


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.floats(0.01, 1e5), st.sampled_from([0.0, 0.25]), st.booleans(),
    st.sampled_from(["none", "all", "lora_only"]), st.sampled_from(["all-linear", ("q",), ("l.1.q", "0.q")]),
    st.dictionaries(st.sampled_from(["q", r"1\.q", ".*0.q"]), st.integers(1, 6)),
)  # fmt: skip
def test_what_is_written_and_read_is_written_the_same_again(rank, alpha, dropout, rslora, bias, targets, ranks):
    config = LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        use_rslora=rslora,
        bias=bias,
        target_modules=targets,
        rank_pattern=ranks,
    )
    adapter = adapter_of(config)
    raw = json.loads(json.dumps(config_to_peft(adapter), sort_keys=True))
    again, metadata = config_from_peft(raw, "x")
    assert config_to_peft(Adapter(adapter.modules, again, metadata=metadata)) == raw
    LoraConfig(**{key: value for key, value in raw.items() if key != "peft_type"})  # PEFT takes every key


@pytest.mark.parametrize("value", [True, 0, -1, 1.5, 4.0, "8", None, [8], 32_769, 10**9])
def test_r_has_an_exact_type_and_range(value):
    assert "r: expected a whole number" in refused(r=value)
    assert "rank_pattern['q']: expected a whole number" in refused(rank_pattern={"q": value})


@pytest.mark.parametrize("value", [True, 0, -2, "16", None, [], float("nan"), float("inf")])
def test_alpha_has_an_exact_type_and_range(value):
    assert "lora_alpha: expected a positive, finite number" in refused(lora_alpha=value)
    assert "alpha_pattern['q']: expected a positive" in refused(alpha_pattern={"q": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_dropout", 1.0), ("lora_dropout", True), ("lora_dropout", "0"), ("lora_dropout", float("nan")),
        ("use_rslora", 1), ("use_rslora", "true"), ("bias", "ALL"), ("bias", True), ("bias", ["none"]),
        ("target_modules", None), ("target_modules", []), ("target_modules", ""), ("target_modules", [1]),
        ("target_modules", {"q": 1}), ("target_modules", "("), ("target_modules", "a{99999999999}"),
        ("exclude_modules", 3), ("exclude_modules", [""]), ("modules_to_save", "score"), ("modules_to_save", [None]),
        ("layers_to_transform", [-1]), ("layers_to_transform", True), ("layers_to_transform", "1"),
        ("layers_pattern", 1),
        ("layers_pattern", ["(a+)+"]), ("rank_pattern", [1]), ("rank_pattern", {"(a+)+$": 4}), ("alpha_pattern", "x"),
        ("task_type", 1), ("base_model_name_or_path", ["x"]), ("revision", 2), ("init_lora_weights", 1),
        ("init_lora_weights", "pisa"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused_by_name(key, value):
    assert f"{key}" in refused(**{key: value})


@pytest.mark.parametrize("value", [1, "ADALORA", "lora", None, "PREFIX_TUNING", ["LORA"]])
def test_only_lora_is_read(value):
    assert f"expected peft_type 'LORA', got {value!r}" in refused(peft_type=value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"a": 1}), ("use_qalora", True), ("use_bdlora", {"a": 1}), ("arrow_config", {"k": 1}),
        ("kasa_config", {"k": 1}), ("velora_config", {"k": 1}), ("monteclora_config", {"k": 1}),
        ("ensure_weight_tying", True), ("enable_lora", [True]), ("merge_weights", True),
    ],
)  # fmt: skip
def test_features_that_are_not_supported_are_named_and_absent_ones_are_not(key, value):
    assert f"{key}: " in refused(**{key: value})
    assert "is not supported" in refused(**{key: value})
    for empty in (None, False, [], {}, ""):
        assert config_from_peft({**MINIMAL, key: empty}, "x")[0].rank == 8


def test_an_unknown_key_is_refused_only_where_it_says_something():
    assert "use_rslora_: unknown key" in refused(use_rslora_=True)
    assert "nearest: 'use_rslora'" in refused(use_rslora_=True)
    assert "future: unknown key" in refused(future=0)  # a zero may mean something
    for empty in (None, False, [], {}, ""):
        assert config_from_peft({**MINIMAL, "future": empty}, "x")[0].rank == 8


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_initialisations_that_change_the_base_are_refused_with_the_way_out(name):
    assert "path_initial_model_for_weight_conversion" in refused(init_lora_weights=name)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_are_read(value):
    raw = {
        **MINIMAL,
        "init_lora_weights": value,
        "eva_config": {"rho": 2.0},
        "loftq_config": {},
        "corda_config": {"a": 1},
    }
    assert config_from_peft(raw, "x")[0].rank == 8


def test_all_problems_are_listed_at_once():
    text = refused(r=0, use_dora="yes", futur=1, bias="some", init_lora_weights="pissa", lora_alpha="x")
    assert all(
        f"\n  - {key}: " in text for key in ("r", "use_dora", "futur", "bias", "init_lora_weights", "lora_alpha")
    )


def test_layers_need_a_list_of_targets_here_as_in_peft():
    assert "layers_to_transform acts only with a list" in refused(target_modules=".*q", layers_to_transform=[1])


def test_an_adapter_without_modules_cannot_be_written():
    with pytest.raises(AdapterError, match=r"at least one adapted module"):
        config_to_peft(Adapter({}, LoRAConfig(), {"score.weight": torch.ones(1)}))


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*config_to_peft(adapter_of(LoRAConfig())), "x"]), JSON, max_size=4))
def test_any_configuration_gives_settings_or_our_error(changes):
    try:
        config, metadata = config_from_peft({**MINIMAL, **changes}, "x")
    except AdapterError:
        return
    assert isinstance(config, LoRAConfig)
    assert isinstance(metadata, AdapterMetadata)
