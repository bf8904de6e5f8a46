"""Settings: frozen, strict, every problem named at once."""

import pytest

from veneer.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
from veneer.errors import ConfigError


def test_settings_are_frozen_and_equal_by_value():
    config = LoRAConfig(rank=4)
    assert config == LoRAConfig(rank=4)
    with pytest.raises(Exception, match="frozen"):
        config.rank = 5


def test_lists_become_tuples():
    config = LoRAConfig(target_modules=["q", "v"], layers_to_transform=[0, 1], modules_to_save=["head"])
    assert (config.target_modules, config.layers_to_transform, config.modules_to_save) == (
        ("q", "v"),
        (0, 1),
        ("head",),
    )


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 2.5},
        {"rank": "8"},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"target_modules": []},
        {"target_modules": ["q", "q"]},
        {"target_modules": "("},
        {"rank_pattern": {"[": 2}},
        {"rank_pattern": {"q": 0}},
        {"bias": "some"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [-1], "target_modules": ["q"]},
        {"r": 8},
    ],
)
def test_what_cannot_be_is_refused(values):
    with pytest.raises(ConfigError) as error:
        LoRAConfig(**values)
    assert next(iter(values)).split("_")[0] in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dropout": 0.1}, "token_rows train alone; dropout needs adapted modules"),
        ({"bias": "all", "use_dora": True}, "token_rows train alone; bias, use_dora needs adapted modules"),
        ({"modules_to_save": ("lm_head",)}, "token_rows train alone; modules_to_save needs adapted modules"),
        ({"init": "pissa"}, "token_rows train alone; init needs adapted modules"),
        ({"token_rows": {"embed": [1], "other": [2]}}, "one list of tokens for all tables"),
    ],
)
def test_rows_of_tokens_alone_are_what_peft_can_hold(values, said):
    alone = {"target_modules": (), "token_rows": {"embed": [1, 2], "other": [1, 2]}}
    assert LoRAConfig.from_json(LoRAConfig(**alone).model_dump(mode="json")) == LoRAConfig(**alone)
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(**{**alone, **values})


@pytest.mark.parametrize("module", ["embed_tokens", "model.embed_tokens", "a.model.embed_tokens"])
def test_a_table_trains_by_rows_or_whole(module):
    tables = {"model.embed_tokens": [1]}
    assert LoRAConfig(token_rows=tables, modules_to_save=["tokens", "lm_head"]).token_rows
    with pytest.raises(ConfigError, match="name the same table; its rows train alone, or all of it does"):
        LoRAConfig(token_rows=tables, modules_to_save=[module])


def test_all_problems_at_once_with_their_places():
    with pytest.raises(ConfigError) as error:
        RunConfig(base="b", out="o", data={"trian": "x"}, adapter={"rnk": 1}, train={"epochs": 0, "schedule": "sine"})
    problems = "\n".join(error.value.problems)
    for text in (
        "data.trian: unknown key; nearest: 'train'",
        "data.train: Field required",
        "adapter.rnk: unknown key",
        "train.epochs",
        "train.schedule",
    ):
        assert text in problems


def test_scaling_is_per_module_after_the_patterns():
    config = LoRAConfig(rank=8, alpha=16, rank_pattern={"v": 4}, alpha_pattern={"v": 2.0})
    assert (config.scaling_for("a.q"), config.scaling_for("a.v")) == (2.0, 0.5)
    assert LoRAConfig(rank=4, alpha=16, use_rslora=True).scaling_for("q") == 8.0


@pytest.mark.parametrize("storage", ["plain", "int8", "nf4"])
def test_a_base_is_stored_plain_or_quantised(storage):
    assert RunConfig(base="b", out="o", data={"train": "x"}, storage=storage).storage == storage
    with pytest.raises(ConfigError, match="storage: Input should be 'plain', 'int8' or 'nf4'"):
        RunConfig(base="b", out="o", data={"train": "x"}, storage=storage + "4")


def test_defaults_stand():
    assert RunConfig(base="b", out="o", data={"train": "x"}).storage == "plain"
    assert TrainConfig().lora_plus_ratio == 1.0
    assert TrainConfig().max_grad_norm == 1.0
    assert SamplingConfig().temperature == 0.0
    assert DataConfig(train="a").skip_bad_rows is False
