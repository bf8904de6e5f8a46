"""mlx-lm's layout: its own files, round trips, and everything that is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from tests.files.drawn import adapters, error_between, pair_of
from tests.files.test_translate import base_of

from veneer.adapter import Adapter, TokenRows
from veneer.errors import AdapterError
from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints, Sight
from veneer.files.mlx import CONFIG, FORMAT, TENSORS, read_mlx, write_mlx
from veneer.files.tensors import dump_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "mlx"
REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "mlx-smollm2-wikisql-6it"
LAYERS = {
    "model.layers.0.self_attn.q_proj": {},
    "model.layers.0.mlp.up_proj": {},
    "model.layers.1.mlp.up_proj": {},
}
MORE = LAYERS | {
    "model.embed_tokens": {"form": "embedding"},
    "model.layers.1.mlp.experts.down_proj": {"form": "experts", "experts": 3},
    "model.layers.1.mlp.experts.gate_up_proj": {"form": "experts", "experts": 3},
}


def save(folder: Path, files) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def changed(folder: Path, config=(), tensors=(), without=(), **parameters) -> Path:
    """A small adapter of mlx-lm's with some things changed."""
    values = {"model.layers.0.q_proj.lora_a": torch.ones(3, 2), "model.layers.0.q_proj.lora_b": torch.ones(2, 4)}
    raw = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0} | parameters}
    values = {key: one for key, one in (values | dict(tensors)).items() if key not in without}
    return save(folder, {CONFIG: json.dumps(raw | dict(config)).encode(), TENSORS: dump_tensors(values)})


def test_what_mlx_lm_wrote_is_read_as_it_fuses_it():
    expected = load_file(GOLDEN / "expected.safetensors")
    adapter = read_mlx(GOLDEN / "lora")
    assert {pair.scaling for pair in adapter.modules.values()} == {3.0}
    layer = "model.layers.1"
    gate, up = (expected[f"delta.{layer}.mlp.switch_mlp.{leaf}"] for leaf in ("gate_proj", "up_proj"))
    deltas = {
        f"{layer}.self_attn.q_proj": expected[f"delta.{layer}.self_attn.q_proj"],
        f"{layer}.self_attn.v_proj": expected[f"delta.{layer}.self_attn.v_proj"],
        f"{layer}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1),
        f"{layer}.mlp.experts.down_proj": expected[f"delta.{layer}.mlp.switch_mlp.down_proj"],
        "model.embed_tokens": expected["delta.model.embed_tokens"],
    }
    assert adapter.modules.keys() == deltas.keys()
    for path, delta in deltas.items():
        assert torch.allclose(adapter.modules[path].delta().float(), delta, rtol=1e-5, atol=1e-6), path


def test_magnitudes_of_mlx_lm_are_norms_of_rows():
    expected = load_file(GOLDEN / "expected.safetensors")
    adapter = read_mlx(GOLDEN / "dora")
    (path,) = adapter.modules
    pair, weight = adapter.modules[path], expected[f"weight.{path}"].double()
    fused = weight + pair.delta()
    fused *= (pair.magnitude.double() / fused.norm(dim=1))[:, None]
    assert torch.allclose(fused.float(), expected[f"fused.{path}"], rtol=1e-5, atol=1e-6)
    assert adapter.config.use_dora
    assert adapter.config.dropout == 0.1


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters of ../shared/data are not here")
def test_a_real_adapter_is_read_and_written_back(tmp_path):
    adapter = read_mlx(REAL)
    assert (len(adapter.modules), adapter.config.rank, adapter.config.alpha) == (28, 8, 160.0)
    assert error_between(read_mlx(save(tmp_path, write_mlx(adapter))), adapter) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(MORE))
def test_round_trip(adapter, tmp_path):
    assert error_between(read_mlx(save(tmp_path, write_mlx(adapter))), adapter) < 1e-6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(LAYERS, dora=True))
def test_round_trip_with_magnitudes(adapter, tmp_path):
    assert error_between(read_mlx(save(tmp_path, write_mlx(adapter))), adapter) < 1e-6


def test_mixtral_has_its_experts_elsewhere(tmp_path):
    base = base_of({"lm_head.weight": (4, 4)}, model_type="mixtral")
    pair = pair_of(4, 5, 2, 0.5, 0, form="experts", experts=3)
    adapter = foreign_adapter({"model.layers.0.mlp.experts.down_proj": pair})
    files = write_mlx(adapter, Hints(base=base))
    assert (
        "model.layers.0.block_sparse_moe.switch_mlp.down_proj" in json.loads(files[CONFIG])["lora_parameters"]["keys"]
    )
    assert error_between(read_mlx(save(tmp_path, files), Hints(base=base)), adapter) == 0


def test_layers_of_gpt2_are_named_as_mlx_lm_does(tmp_path):
    base = base_of({"h.0.attn.c_proj.weight": (4, 4)}, model_type="gpt2")
    adapter = foreign_adapter({"transformer.h.0.attn.c_proj": pair_of(4, 4, 2, 0.5, 0, form="transposed")})
    with pytest.raises(AdapterError, match="Conv1D; how mlx-lm names it, the base tells"):
        write_mlx(adapter)
    files = write_mlx(adapter, Hints(base=base))
    assert json.loads(files[CONFIG])["lora_parameters"]["keys"] == ["model.h.0.attn.c_proj"]
    assert error_between(read_mlx(save(tmp_path, files), Hints(base=base)), adapter) == 0


def test_what_mlx_lm_cannot_carry_is_refused_all_at_once():
    modules = {
        "model.conv": pair_of(4, 5, 2, 0.5, 0, form="conv"),
        "model.embed_tokens": pair_of(4, 5, 2, 0.5, 0, form="embedding", dora=True),
        "model.q": pair_of(4, 5, 2, 0.5, 0),
        "model.experts.3.up": pair_of(4, 5, 2, 0.5, 0),
        "model.odd.gate_up_proj": pair_of(4, 5, 2, 0.5, 0, form="experts", experts=2),
    }
    whole = foreign_adapter(modules, trained={"model.q.bias": torch.ones(4)})
    rows = {"model.embed": TokenRows((1,), torch.ones(1, 2))}
    adapter = Adapter(modules, whole.config.model_copy(update={"invocation_tokens": (1,)}), whole.trained, tokens=rows)
    with pytest.raises(AdapterError) as caught:
        write_mlx(adapter)
    for expected in (
        "model.conv: mlx-lm has no factors of form 'conv'",
        "model.embed_tokens: mlx-lm has no magnitudes",
        "model.q: has no magnitude, others have",
        "model.experts.3.up: a matrix of one expert",
        "model.odd.gate_up_proj: how mlx-lm names",
        "model.q.bias: mlx-lm has no place for a parameter that trained whole",
        "model.embed: mlx-lm has no place for rows of tokens",
        "invocation tokens",
    ):
        assert expected in str(caught.value)


KEY = "model.layers.0.q_proj"
HOSTILE = [
    ({"config": {"fine_tune_type": "full"}}, "extract one from the two checkpoints"),
    ({"config": {"fine_tune_type": ["dora"]}}, "expected fine_tune_type"),
    ({"config": {"fine_tune_type": "dora"}}, "there is no m"),
    ({"config": {"lora_parameters": 3}}, "expected lora_parameters"),
    ({"rank": 3}, "expected rank 3, as lora_parameters says, got 2"),
    ({"rank": True}, "rank: expected a whole number"),
    ({"rank": 10**9}, "rank: expected a whole number"),
    ({"scale": "2"}, "scale: expected a positive"),
    ({"scale": 0}, "scale: expected a positive"),
    ({"scale": True}, "scale: expected a positive"),
    ({"dropout": 1}, "dropout: expected a number"),
    ({"alpha": 16}, "lora_parameters.alpha: unknown"),
    ({"tensors": {f"{KEY}.m": torch.ones(4)}}, "there is an m"),
    ({"tensors": {f"{KEY}.lora_c": torch.ones(4)}}, "expected a key that ends in lora_a, lora_b, m; nearest"),
    ({"tensors": {f"{KEY}..lora_a": torch.ones(4, 2)}}, "not the path of a module"),
    ({"tensors": {f"{KEY}.lora_a": torch.ones(0, 2)}}, "none of them empty"),
    ({"tensors": {f"{KEY}.lora_a": torch.ones(3, 3)}}, "of one rank"),
    ({"tensors": {f"{KEY}.lora_a": torch.ones(3, 2, dtype=torch.int32)}}, "one floating dtype"),
    ({"tensors": {f"{KEY}.lora_a": torch.full((3, 2), torch.nan)}}, "6 NaN"),
    ({"without": [f"{KEY}.lora_b"]}, f"{KEY}: lacks lora_b"),
    ({"without": [f"{KEY}.lora_a", f"{KEY}.lora_b"]}, "holds no factors"),
    ({"tensors": {"e.lora_a": torch.ones(2, 2, 3), "e.lora_b": torch.ones(2, 4, 2)}}, "expected switch_mlp"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_malformed_adapters_are_typed_errors(change, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        read_mlx(changed(tmp_path, **change))


def test_a_good_one_is_read_and_a_missing_file_is_told(tmp_path):
    assert read_mlx(changed(tmp_path)).config.rank == 2
    (tmp_path / TENSORS).write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match="expected a header"):
        read_mlx(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"[]")
    with pytest.raises(AdapterError, match="expected a JSON object"):
        read_mlx(tmp_path)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_mlx(tmp_path / "none")


def test_it_is_recognised():
    assert FORMAT.recognise(Sight(Path("a"), (CONFIG, TENSORS), config={"lora_parameters": {}}))
    assert not FORMAT.recognise(Sight(Path("a"), (CONFIG, "adapter_model.safetensors"), config={"peft_type": "LORA"}))
