"""GGUF adapters: names, order of rows, scales; round trips; and everything that is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.files.drawn import adapters, error_between, pair_of
from tests.files.test_translate import base_of

from veneer.adapter import Adapter, TokenRows
from veneer.errors import AdapterError
from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints, Sight
from veneer.files.gguf_container import dump_gguf, parse_gguf
from veneer.files.gguf_lora import FILE, FORMAT, read_gguf_lora, write_gguf_lora
from veneer.files.peft import load_adapter
from veneer.files.rotary import to_pairs

REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "smollm2-random-r4"
LAYER = "model.layers.0"
SHAPES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (24, 32), "mlp.down_proj": (32, 24), "mlp.up_proj": (24, 32),
}  # fmt: skip


def base(model_type: str = "llama", *, tied: bool = False, **config):
    weights = {f"model.layers.{layer}.{path}.weight": shape for layer in (0, 1) for path, shape in SHAPES.items()}
    weights |= {"model.embed_tokens.weight": (40, 32)} | ({} if tied else {"lm_head.weight": (40, 32)})
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 2}
    return base_of(weights, model_type=model_type, tie_word_embeddings=tied, **(heads | config))


LAYERS = {f"model.layers.{layer}.{path}": {"sizes": shape} for layer in (0, 1) for path, shape in SHAPES.items()}
LAYERS |= {"lm_head": {"sizes": (40, 32)}, "model.embed_tokens": {"form": "embedding", "sizes": (32, 40)}}
EXPERTS = {
    f"{LAYER}.self_attn.q_proj": {"sizes": (32, 32)},
    f"{LAYER}.mlp.experts.gate_up_proj": {"form": "experts", "experts": 3},
    f"{LAYER}.mlp.experts.down_proj": {"form": "experts", "experts": 3},
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(adapter=adapters(LAYERS))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_round_trip(family, adapter, tmp_path):
    hints = Hints(base=base(family))
    (tmp_path / FILE).write_bytes(write_gguf_lora(adapter, hints)[FILE])
    assert error_between(read_gguf_lora(tmp_path / FILE, hints), adapter) < 1e-6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(adapter=adapters(EXPERTS))
def test_round_trip_of_experts(adapter, tmp_path):
    hints = Hints(base=base("qwen3_moe"))
    (tmp_path / FILE).write_bytes(write_gguf_lora(adapter, hints)[FILE])
    assert error_between(read_gguf_lora(tmp_path / FILE, hints), adapter) < 1e-6


def written(pairs, **config) -> dict:
    data = write_gguf_lora(foreign_adapter(pairs), Hints(base=base(**config)))[FILE]
    found = parse_gguf(data, "a.gguf")
    return dict(found.fields) | dict(found.tensors)


def test_one_alpha_is_kept_and_several_are_put_into_the_factors():
    pair = pair_of(24, 32, 4, 2.0, 0)
    other = pair_of(24, 32, 2, 4.0, 1)
    paths = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    found = written(dict(zip(paths, (pair, other), strict=True)))
    assert found["adapter.lora.alpha"] == 8.0
    assert torch.equal(found["blk.0.ffn_up.weight.lora_b"], pair.lora_B)
    found = written(dict(zip(paths, (pair, replace(other, scaling=3.0)), strict=True)))
    assert found["adapter.lora.alpha"] == 0.0
    assert torch.equal(found["blk.1.ffn_up.weight.lora_b"], other.lora_B * 3)
    # alpha / sqrt(rank), as rsLoRA has it, is no float32 times 1 / rank: it goes into the factors too.
    found = written({paths[0]: replace(pair, scaling=16 / 3**0.5)})
    assert found["adapter.lora.alpha"] == 0.0


def test_rows_and_tables_lie_as_llama_cpp_has_them():
    query, table = pair_of(32, 32, 2, 0.5, 0), pair_of(32, 40, 2, 0.5, 1, form="embedding")
    found = written({f"{LAYER}.self_attn.q_proj": query, "model.embed_tokens": table})
    assert torch.equal(found["blk.0.attn_q.weight.lora_b"], to_pairs(query.lora_B, 4))
    assert torch.equal(found["token_embd.weight.lora_a"], table.lora_A.T)
    assert found["general.architecture"] == "llama"
    plain = written({f"{LAYER}.self_attn.q_proj": query}, model_type="qwen2")
    assert torch.equal(plain["blk.0.attn_q.weight.lora_b"], query.lora_B)


def test_invocation_tokens_and_mixed_dtypes_are_read(tmp_path):
    pair = pair_of(24, 32, 2, 0.5, 0, dtype=torch.float16)
    adapter = foreign_adapter({f"{LAYER}.mlp.up_proj": pair}, settings={"invocation_tokens": (5, 7)})
    hints = Hints(base=base())
    data = write_gguf_lora(adapter, hints)[FILE]
    (tmp_path / FILE).write_bytes(data)
    assert read_gguf_lora(tmp_path / FILE, hints).config.invocation_tokens == (5, 7)
    held = parse_gguf(data, "a")
    mixed = {name: one.float() if name.endswith("lora_b") else one for name, one in held.tensors.items()}
    (tmp_path / FILE).write_bytes(dump_gguf(held.fields, mixed))
    assert error_between(read_gguf_lora(tmp_path / FILE, hints), adapter) == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters of ../shared/data are not here")
def test_a_real_file_is_the_adapter_that_it_was_made_from():
    shapes = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.down_proj": (576, 1536),
    }  # fmt: skip
    weights = {f"model.layers.{layer}.{path}.weight": one for layer in range(30) for path, one in shapes.items()}
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
    hints = Hints(base=base_of(weights, model_type="llama", **config))
    assert error_between(read_gguf_lora(REAL / "lora.gguf", hints), load_adapter(REAL)) == 0


HEAD = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2.0}
NAME = "blk.0.ffn_up.weight"
PAIR = {f"{NAME}.lora_a": torch.ones(2, 32), f"{NAME}.lora_b": torch.ones(24, 2)}
HOSTILE = [
    ({"general.type": "model"}, PAIR, "general.type: expected 'adapter'"),
    ({"general.architecture": "qwen2"}, PAIR, "general.architecture: expected 'llama'"),
    ({"adapter.type": "dora"}, PAIR, "adapter.type: expected 'lora'"),
    ({"adapter.lora.alpha": float("nan")}, PAIR, "expected a float32 from 0"),
    ({"adapter.lora.alpha": -1.0}, PAIR, "expected a float32 from 0"),
    ({"adapter.lora.alpha": "16"}, PAIR, "expected a float32 from 0"),
    ({"adapter.alora.invocation_tokens": "1"}, PAIR, "expected an array of token ids"),
    ({}, {}, "holds no factors"),
    ({}, PAIR | {"x": torch.ones(1)}, "expected a name that ends in .lora_a or .lora_b"),
    ({}, PAIR | {"blk.0.attn_norm.weight": torch.ones(32)}, "leaves out silently"),
    ({}, {f"{NAME}.lora_a": torch.ones(2, 32)}, "without the other factor"),
    ({}, {f"blk.7{NAME[5:]}.lora_a": torch.ones(2, 32)}, "the base has no such weight; nearest"),
    ({}, PAIR | {f"{NAME}.lora_b": torch.ones(25, 2)}, r"got \(out, in\) = \(25, 32\)"),
    ({}, PAIR | {f"{NAME}.lora_b": torch.ones(24, 3)}, "of one rank"),
    ({}, PAIR | {f"{NAME}.lora_b": torch.ones(24, 2, 1)}, "two tensors of 2 axes"),
    ({}, {f"{NAME}.lora_a": torch.ones(0, 32), f"{NAME}.lora_b": torch.ones(24, 0)}, "none of them empty"),
]


@pytest.mark.parametrize(("fields", "tensors", "message"), HOSTILE)
def test_malformed_adapters_are_typed_errors(fields, tensors, message, tmp_path):
    (tmp_path / FILE).write_bytes(dump_gguf(HEAD | fields, tensors))
    with pytest.raises(AdapterError, match=message):
        read_gguf_lora(tmp_path / FILE, Hints(base=base()))


def test_without_a_base_or_with_an_unknown_one_nothing_is_guessed(tmp_path):
    (tmp_path / FILE).write_bytes(dump_gguf(HEAD, PAIR))
    with pytest.raises(AdapterError, match="give it: --base"):
        read_gguf_lora(tmp_path / FILE)
    with pytest.raises(AdapterError, match="nearest: 'qwen3_moe'"):
        read_gguf_lora(tmp_path / FILE, Hints(base=base("qwen3_mo")))
    with pytest.raises(AdapterError, match="no num_hidden_layers"):
        read_gguf_lora(tmp_path / FILE, Hints(base=base(num_hidden_layers=10**9)))
    with pytest.raises(AdapterError, match="cannot be read"):
        read_gguf_lora(tmp_path / "none.gguf", Hints(base=base()))
    assert read_gguf_lora(tmp_path / FILE, Hints(base=base())).config.alpha == 2.0


def test_what_llama_cpp_cannot_carry_is_refused_all_at_once():
    modules = {
        f"{LAYER}.mlp.up_proj": pair_of(24, 32, 2, 0.5, 0, dora=True),
        f"{LAYER}.mlp.down_proj": pair_of(32, 25, 2, 0.5, 0),
        f"{LAYER}.mlp.odd_proj": pair_of(4, 5, 2, 0.5, 0),
        f"{LAYER}.conv": pair_of(4, 5, 2, 0.5, 0, form="conv"),
        "lm_head": pair_of(40, 32, 2, 0.5, 0),
        "model.embed_tokens": pair_of(32, 40, 2, 0.5, 0, form="embedding"),
    }
    whole = foreign_adapter(modules, trained={"a.bias": torch.ones(4)})
    adapter = Adapter(modules, whole.config, whole.trained, tokens={"x": TokenRows((1,), torch.ones(1, 2))})
    with pytest.raises(AdapterError) as caught:
        write_gguf_lora(adapter, Hints(base=base(tied=True)))
    for expected in (
        "mlp.up_proj: llama.cpp has no magnitudes",
        "mlp.down_proj: expected factors for the base's weight of shape (32, 24)",
        "mlp.odd_proj: llama.cpp has no such weight",
        "conv: llama.cpp has no factors of form 'conv'",
        "lm_head: the base's head is its embedding table",
        "model.embed_tokens: llama.cpp would apply it to the tied head too",
        "a.bias: llama.cpp has no place",
        "x: llama.cpp has no place for rows of tokens",
    ):
        assert expected in str(caught.value)


def test_it_is_recognised_by_its_name():
    assert FORMAT.recognise(Sight(Path("a/lora.gguf"), ("lora.gguf",)))
    assert not FORMAT.recognise(Sight(Path("a/lora.safetensors"), ("lora.safetensors",)))
