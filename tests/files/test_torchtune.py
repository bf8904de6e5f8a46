"""torchtune's layout: against its own converter, round trips, and everything that is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from tests.files.drawn import adapters, error_between, pair_of
from tests.files.test_translate import base_of

from veneer.errors import AdapterError
from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints, Sight
from veneer.files.rotary import to_halves, to_pairs
from veneer.files.torchtune import (
    FILE,
    FORMAT,
    adapter_from_torchtune,
    read_torchtune,
    read_torchtune_pickle,
    write_torchtune,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "torchtune"
LAYER = "model.layers.1"
SHAPES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (24, 32), "mlp.down_proj": (32, 24), "mlp.up_proj": (24, 32),
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


def base(model_type: str = "llama"):
    weights = {f"model.layers.{layer}.{path}.weight": shape for layer in (0, 1) for path, shape in SHAPES.items()}
    return base_of(weights | {"lm_head.weight": (40, 32)}, model_type=model_type, **HEADS)


LAYERS = {f"model.layers.{layer}.{path}": {"sizes": shape} for layer in (0, 1) for path, shape in SHAPES.items()}
LAYERS["lm_head"] = {"sizes": (40, 32)}


def test_its_own_converter_agrees_but_for_the_magnitudes_that_it_forgets():
    adapter = read_torchtune_pickle(GOLDEN / "adapter_model.pt", Hints(base=base(), alpha=4))
    expected = load_file(GOLDEN / "expected.safetensors")
    rows = expected.pop("rows")
    assert len(adapter.modules) * 3 == len(expected)
    for path, pair in adapter.modules.items():
        key = f"base_model.model.{path}"
        assert torch.equal(pair.lora_A, expected[f"{key}.lora_A.weight"])
        assert torch.equal(pair.lora_B, expected[f"{key}.lora_B.weight"])
        forgotten = expected[f"{key}.lora_magnitude_vector"]
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        assert torch.equal(pair.magnitude, forgotten if heads is None else to_halves(forgotten, heads))
        assert pair.scaling == 2.0
    assert torch.equal(to_pairs(torch.arange(32.0), 4), rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(adapter=adapters(LAYERS, dora=True))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_round_trip(family, adapter, tmp_path):
    hints = Hints(base=base(family), alpha=16)
    (tmp_path / FILE).write_bytes(write_torchtune(adapter, hints)[FILE])
    assert error_between(read_torchtune(tmp_path / FILE, hints), adapter) < 1e-6


def test_alpha_may_lie_beside(tmp_path):
    hints = Hints(base=base(), alpha=3)
    adapter = foreign_adapter({f"{LAYER}.mlp.up_proj": pair_of(24, 32, 2, 1.5, 0)})
    (tmp_path / FILE).write_bytes(write_torchtune(adapter, hints)[FILE])
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3, "peft_type": "LORA"}')
    assert error_between(read_torchtune(tmp_path / FILE), adapter) == 0
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "3"}')
    with pytest.raises(AdapterError, match="its alpha cannot be used"):
        read_torchtune(tmp_path / FILE)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="stores no alpha"):
        read_torchtune(tmp_path / FILE)


def test_rows_move_for_families_in_pairs_alone():
    adapter = foreign_adapter({f"{LAYER}.self_attn.k_proj": pair_of(16, 32, 2, 0.5, 0)})
    written = {}
    for family in ("llama", "qwen2"):
        hints = Hints(base=base(family), alpha=1)
        written[family] = write_torchtune(adapter, hints)[FILE]
    assert written["llama"] != written["qwen2"]


def pairs(path: str = "layers.0.mlp.w1", A=(2, 32), B=(24, 2), **more) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_a.weight": torch.ones(A), f"{path}.lora_b.weight": torch.ones(B)} | more


HOSTILE = [
    ({}, {}, "no key ends in"),
    (pairs(), {"alpha": None}, "stores no alpha"),
    (pairs("layers.0.mlp.w4"), {}, "no layer that is known; nearest: 'layers.0.mlp.w"),
    (pairs(), {"x": torch.ones(1)}, "expected a key that ends in"),
    ({"layers.0.mlp.w1.lora_a.weight": torch.ones(2, 32)}, {}, "lacks lora_b.weight"),
    (pairs(B=(24, 3)), {}, "of one rank"),
    (pairs(A=(0, 32), B=(24, 0)), {}, "none of them empty"),
    (pairs(B=(25, 2)), {}, r"weight of shape \(24, 32\), got \(out, in\) = \(25, 32\)"),
    (pairs() | pairs("output", B=(40, 2)) | {"output.magnitude": torch.ones(40)}, {}, "lacks a magnitude"),
    (pairs() | {"layers.0.mlp.w1.magnitude": torch.ones(3)}, {}, r"magnitude must have shape \(24,\)"),
    (pairs("layers.0.attn.q_proj", B=(32, 2)), {"base": None}, "give the base: --base"),
    (pairs("layers.0.attn.q_proj", B=(32, 2)), {"base": base("phi3")}, "expected a model_type"),
]


@pytest.mark.parametrize(("tensors", "change", "message"), HOSTILE)
def test_malformed_adapters_are_typed_errors(tensors, change, message):
    hints = Hints(**{"base": base(), "alpha": 1.0} | {key: one for key, one in change.items() if key != "x"})
    with pytest.raises(AdapterError, match=message):
        adapter_from_torchtune(tensors | {key: one for key, one in change.items() if key == "x"}, hints, "a.pt")


def test_what_torchtune_cannot_carry_is_refused_all_at_once():
    modules = {
        f"{LAYER}.mlp.up_proj": pair_of(24, 32, 2, 0.5, 0, dora=True),
        f"{LAYER}.mlp.down_proj": pair_of(32, 24, 2, 0.5, 0),
        f"{LAYER}.mlp.other": pair_of(32, 24, 2, 0.5, 0),
        "model.embed_tokens": pair_of(4, 5, 2, 0.5, 0, form="embedding"),
    }
    adapter = foreign_adapter(modules, trained={"head.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError) as caught:
        write_torchtune(adapter, Hints(alpha=1))
    for expected in (
        "mlp.other: no layer that torchtune adapts",
        "mlp.down_proj: has no magnitude, others have one",
        "model.embed_tokens: torchtune has no factors of form 'embedding'",
        "head.weight: torchtune has no place",
    ):
        assert expected in str(caught.value)


def test_it_is_recognised_by_its_keys():
    keys = ("layers.0.mlp.w1.lora_a.weight", "layers.0.mlp.w1.lora_b.weight")
    assert FORMAT.recognise(Sight(Path("a"), (), keys))
    assert not FORMAT.recognise(Sight(Path("a"), (), ("model.layers.0.mlp.w1.lora_A.weight",)))
    with pytest.raises(AdapterError, match="--from torchtune-pt"):
        read_torchtune(GOLDEN / "adapter_model.pt", Hints(alpha=1))
