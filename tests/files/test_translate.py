"""What formats of other programs share."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.files.drawn import SCALINGS, adapters, error_between, pair_of

from veneer.adapter import Adapter
from veneer.errors import AdapterError
from veneer.files.foreign import foreign_adapter
from veneer.files.peft import adapter_from_files, adapter_to_files
from veneer.files.shards import Checkpoint, StoredTensor
from veneer.files.translate import at_rank, at_scaling, join_gate_up, matrix_form, split_gate_up, weight_shape

LAYERS = {
    "model.layers.0.self_attn.q_proj": {},
    "model.layers.0.mlp.up_proj": {},
    "model.embed_tokens": {"form": "embedding"},
    "model.layers.1.mlp.experts.down_proj": {"form": "experts", "experts": 3},
}


def base_of(shapes: dict[str, tuple[int, ...]], **config) -> Checkpoint:
    """A checkpoint that is only named."""
    tensors = {name: StoredTensor("model.safetensors", "F32", shape, 0, 0) for name, shape in shapes.items()}
    return Checkpoint(Path("base"), tensors, {}, config)


@given(SCALINGS, SCALINGS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_another_scaling_keeps_the_delta(before, after, dtype):
    pair = pair_of(4, 5, 2, before, 0, dtype=dtype)
    other = at_scaling(pair, after)
    assert other.scaling == after
    assert float((other.delta() - pair.delta()).norm() / pair.delta().norm()) < 1e-7


def test_a_power_of_two_keeps_the_dtype():
    pair = pair_of(4, 5, 2, 0.5, 0, dtype=torch.bfloat16)
    assert at_scaling(pair, 2.0).lora_B.dtype == torch.bfloat16
    assert at_scaling(pair, 1.5).lora_B.dtype == torch.float32


@pytest.mark.parametrize("form", ["linear", "embedding", "experts"])
def test_ranks_of_zeros_keep_the_delta(form):
    pair = pair_of(4, 5, 2, 0.5, 0, form=form, experts=3)
    other = at_rank(pair, 7)
    assert other.rank == 7
    assert torch.equal(other.delta(), pair.delta())
    with pytest.raises(AdapterError, match="at most 1, got 2"):
        at_rank(pair, 1)


def test_gate_and_up_go_apart_and_come_together():
    pair = pair_of(8, 5, 2, 0.5, 0, form="experts", experts=3)
    gate, up = split_gate_up(pair, "x")
    assert torch.equal(torch.cat([gate.delta(), up.delta()], 1), pair.delta())
    again = join_gate_up(gate, up, "x")
    assert again.rank == 2
    assert torch.equal(again.delta(), pair.delta())
    other = pair_of(4, 5, 3, 2.0, 1, form="experts", experts=3)
    both = join_gate_up(gate, other, "x")
    assert both.rank == 5
    assert torch.allclose(both.delta(), torch.cat([gate.delta(), other.delta()], 1), rtol=1e-6)
    assert torch.equal(join_gate_up(None, other, "x").delta()[:, 4:], other.delta())
    with pytest.raises(AdapterError, match="other sizes"):
        join_gate_up(gate, pair_of(6, 5, 3, 2.0, 1, form="experts", experts=3), "x")


@given(adapters(LAYERS))
def test_settings_that_fit_go_through_peft_and_back(adapter: Adapter):
    again = adapter_from_files(adapter_to_files(adapter), "again")
    assert error_between(again, adapter) < 1e-12


def test_settings_name_what_trained_whole():
    pair = pair_of(4, 5, 2, 0.5, 0)
    config = foreign_adapter({"a.q": pair}, trained={"a.q.bias": torch.ones(4)}).config
    assert (config.bias, config.modules_to_save) == ("lora_only", ())
    config = foreign_adapter({"a.q": pair}, trained={"b.bias": torch.ones(4), "head.weight": torch.ones(2, 2)}).config
    assert (config.bias, config.modules_to_save) == ("all", ("head",))


def test_the_base_tells_the_form():
    base = base_of({"embed.weight": (9, 4), "h.0.c.weight": (4, 8), "h.0.q.weight": (8, 4)}, model_type="gpt2")
    assert matrix_form("h.0.q", (8, 4), base) == "linear"
    assert matrix_form("transformer.h.0.c", (8, 4), base) == "transposed"
    assert matrix_form("transformer.h.0.q", (8, 4), base) == "linear"
    square = base_of({"h.0.c.weight": (4, 4), "wte.weight": (4, 4)}, model_type="gpt2")
    assert matrix_form("h.0.c", (4, 4), square) == "transposed"
    assert matrix_form("wte", (4, 4), square) == "embedding"
    with pytest.raises(AdapterError, match=r"weight of shape \(4, 4\), got \(out, in\) = \(4, 5\)"):
        matrix_form("h.0.c", (4, 5), square)
    with pytest.raises(AdapterError, match=r"nearest: 'h\.0\.c\.weight'"):
        matrix_form("h.0.d", (4, 4), square)
    twice = base_of({"a.h.c.weight": (4, 4), "b.h.c.weight": (4, 4)})
    with pytest.raises(AdapterError, match=r"may be a\.h\.c\.weight or b\.h\.c\.weight"):
        weight_shape(twice, "h.c")
