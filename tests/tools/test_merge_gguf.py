"""Checkpoints written as GGUF: what stands in the file, for each family; and what is refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.files.faulty import Faulty, KilledError
from tests.files.gguf_bases import FAMILY_SETTINGS, MORE_SETTINGS, tiny, write_base

from veneer.errors import AdapterError, BaseModelError, ConfigError, DamagedArtefactError, OutputError, VeneerError
from veneer.files.filesystem import FileSystem
from veneer.files.gguf_container import parse_gguf
from veneer.files.gguf_lora import FAMILIES
from veneer.tools.merge_gguf import check_gguf, export_gguf

KINDS = [*FAMILY_SETTINGS, *MORE_SETTINGS, "gpt2"]
TYPES = {"float32": (0, "F32"), "float16": (1, "F16"), "bfloat16": (32, "BF16")}


@pytest.fixture
def made(tmp_path):
    """Makes a checkpoint, a GGUF file of another model of the same sizes, and one of the same model."""

    def make(kind: str, dtype: torch.dtype = torch.float32, **changes):
        write_base(tiny(kind, seed=1), kind, tmp_path / "like.gguf")
        model = tiny(kind, **changes)
        write_base(model, kind, tmp_path / "right.gguf")
        model.to(dtype).save_pretrained(tmp_path / "model")
        return tmp_path / "model", tmp_path / "like.gguf", tmp_path / "right.gguf"

    return make


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {key: one.contents() for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {one.name: one for one in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_the_converter_would_write(kind, made, tmp_path):
    folder, like, right = made(kind)
    done = export_gguf(folder, like, tmp_path / "out.gguf")
    fields, tensors = read(tmp_path / "out.gguf")
    expected_fields, expected = read(right)
    assert fields == expected_fields | {"general.file_type": 0}
    assert tensors.keys() == expected.keys()
    for name, one in expected.items():
        assert np.array_equal(tensors[name].data, one.data), name
    assert (done.tensors, done.dtype) == (len(expected), "float32")
    other = read(like)[1]
    assert any(not np.array_equal(tensors[name].data, one.data) for name, one in other.items())


def test_every_family_is_tried():
    assert set(KINDS) == set(FAMILIES)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TYPES)
def test_types(stored, name, made, tmp_path):
    folder, like, _ = made("gemma2", stored)
    done = export_gguf(folder, like, tmp_path / "out.gguf", dtype=name)
    fields, tensors = read(tmp_path / "out.gguf")
    assert (fields["general.file_type"], done.dtype) == (TYPES[name][0], name)
    assert {one.tensor_type.name for one in tensors.values() if one.name.endswith("norm.weight")} == {"F32"}
    assert {one.tensor_type.name for one in tensors.values() if len(one.shape) > 1} == {TYPES[name][1]}
    weights = load_file(folder / "model.safetensors")
    found = parse_gguf((tmp_path / "out.gguf").read_bytes(), "out").tensors
    table = weights["model.embed_tokens.weight"]
    assert torch.equal(found["token_embd.weight"], table.to(getattr(torch, name)))
    assert torch.equal(found["output_norm.weight"], weights["model.norm.weight"].float() + 1)


def test_without_a_type_it_is_the_checkpoints(made, tmp_path):
    for stored, name in ((torch.float16, "float16"), (torch.float64, "float32")):
        folder, like, _ = made("qwen2", stored)
        assert export_gguf(folder, like, tmp_path / f"{name}.gguf").dtype == name


def test_routers_and_tables_of_positions_stay_wide(made, tmp_path):
    for kind, name in (("qwen2_moe", "blk.0.ffn_gate_inp.weight"), ("gpt2", "position_embd.weight")):
        folder, like, _ = made(kind)
        export_gguf(folder, like, tmp_path / f"{kind}.gguf", dtype="float16")
        assert read(tmp_path / f"{kind}.gguf")[1][name].tensor_type.name == "F32"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_stored_as_stacks(kind, made, tmp_path):
    folder, like, right = made(kind)
    state = {name: one.contiguous() for name, one in tiny(kind).state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors")
    export_gguf(folder, like, tmp_path / "out.gguf")
    assert all(
        np.array_equal(read(right)[1][name].data, one.data) for name, one in read(tmp_path / "out.gguf")[1].items()
    )


def test_names_without_their_root_and_masks(made, tmp_path):
    folder, like, right = made("gpt2")
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): one for name, one in state.items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    export_gguf(folder, like, tmp_path / "out.gguf")
    assert all(
        np.array_equal(read(right)[1][name].data, one.data) for name, one in read(tmp_path / "out.gguf")[1].items()
    )


def rewrite(path, *, kind=None, more=None, without=(), **fields):
    """Write a GGUF file again with the gguf package: quantised, with more or fewer tensors, with other fields."""
    held = parse_gguf(path.read_bytes(), "like")
    writer = gguf.GGUFWriter(path, held.fields["general.architecture"])
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    renamed = {key.replace("__", "."): value for key, value in fields.items()}
    for key, value in {**held.fields, **renamed}.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kinds[type(value)])
    for name, tensor in {**held.tensors, **(more or {})}.items():
        if name in without:
            continue
        if kind is not None and tensor.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_quantised_file_serves_as_well(made, tmp_path):
    folder, like, right = made("llama")
    rewrite(like, kind=gguf.GGMLQuantizationType.Q8_0, quantize__imatrix__file="x", general__file_type=7)
    export_gguf(folder, like, tmp_path / "out.gguf")
    fields, tensors = read(tmp_path / "out.gguf")
    assert "quantize.imatrix.file" not in fields
    assert fields["general.file_type"] == 0
    assert all(np.array_equal(read(right)[1][name].data, one.data) for name, one in tensors.items())


def test_constants_of_the_rotation_are_copied(made, tmp_path):
    folder, like, _ = made("llama")
    rewrite(like, more={"rope_freqs.weight": torch.arange(8.0)})
    done = export_gguf(folder, like, tmp_path / "out.gguf", dtype="float16")
    assert done.constants == ("rope_freqs.weight",)
    assert read(tmp_path / "out.gguf")[1]["rope_freqs.weight"].data.tolist() == list(range(8))


def test_a_tied_head_is_written_where_the_other_file_has_it(made, tmp_path):
    folder, like, _ = made("gemma3_text")
    export_gguf(folder, like, tmp_path / "one.gguf")
    assert "output.weight" not in read(tmp_path / "one.gguf")[1]
    rewrite(like, more={"output.weight": torch.zeros(64, 64)})
    export_gguf(folder, like, tmp_path / "two.gguf")
    tensors = read(tmp_path / "two.gguf")[1]
    assert np.array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)


def test_an_untied_head_is_refused_where_llama_cpp_has_none(made, tmp_path):
    folder, like, _ = made("smollm3", tie_word_embeddings=False)
    export_gguf(folder, like, tmp_path / "out.gguf")
    assert "output.weight" in read(tmp_path / "out.gguf")[1]
    folder, like, _ = made("gemma")
    tiny("gemma", tie_word_embeddings=False).save_pretrained(folder)
    with pytest.raises(AdapterError, match=r"'lm_head.weight': was untied from the table"):
        check_gguf(folder, like, tmp_path / "x.gguf")


def test_a_file_of_another_base_is_refused_with_every_problem(made, tmp_path):
    folder, like, _ = made("llama")
    rewrite(like, more={"blk.0.strange.weight": torch.ones(3), "output_norm.weight": torch.ones(5)})
    with pytest.raises(AdapterError) as caught:
        export_gguf(folder, like, tmp_path / "out.gguf")
    assert any("'blk.0.strange.weight': " in one and "the checkpoint has none" in one for one in caught.value.problems)
    assert any("'model.norm.weight': is (64,) as 'output_norm.weight'" in one for one in caught.value.problems)
    rewrite(like, without=("blk.0.strange.weight", "blk.1.attn_q.weight"), more={"output_norm.weight": torch.ones(64)})
    with pytest.raises(AdapterError, match=r"like.gguf holds no 'blk.1.attn_q.weight'"):
        export_gguf(folder, like, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_attention_heads": 8, "head_dim": 8}, "llama.attention.head_count: is 4, config.json says 8"),
        ({"rope_theta": 5e5}, "llama.rope.freq_base: is 10000.0, config.json says 500000.0"),
        ({"num_attention_heads": 2, "head_dim": 16}, "expected 2 heads of 16 outputs, got 64"),
        ({"num_hidden_layers": 3}, "llama.block_count: is 2, config.json says 3"),
        ({"model_type": "bert"}, "got 'bert'"),
        ({"model_type": "qwen2"}, "general.architecture: expected 'qwen2', got 'llama'"),
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(change, told, made, tmp_path):
    folder, like, _ = made("llama")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({"rope_theta": 10000.0, **config, **change}))
    with pytest.raises(AdapterError) as caught:
        check_gguf(folder, like, tmp_path / "out.gguf")
    assert told in str(caught.value)


def test_what_else_is_refused(made, tmp_path):
    folder, like, right = made("llama")
    with pytest.raises(ConfigError, match="float32, float16, bfloat16 for GGUF, got 'float64'"):
        check_gguf(folder, like, tmp_path / "out.gguf", dtype="float64")
    with pytest.raises(OutputError, match="exists already"):
        check_gguf(folder, like, right)
    with pytest.raises(AdapterError, match="expected a file that begins with"):
        check_gguf(folder, folder / "config.json", tmp_path / "out.gguf")
    with pytest.raises(AdapterError, match="cannot be read"):
        check_gguf(folder, tmp_path / "none.gguf", tmp_path / "out.gguf")
    rewrite(like, split__count=2)
    with pytest.raises(AdapterError, match="it is one of 2 files; join them"):
        check_gguf(folder, like, tmp_path / "out.gguf")
    state = load_file(folder / "model.safetensors")
    save_file({name: one.to(torch.uint8) for name, one in state.items()}, folder / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"its matrices are torch.uint8"):
        check_gguf(folder, right, tmp_path / "out.gguf")


def test_a_weight_out_of_range_is_refused_and_nothing_is_left(made, tmp_path):
    folder, like, _ = made("llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, folder / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=r"up_proj.weight: reaches 1e"):
        export_gguf(folder, like, tmp_path / "out.gguf", dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


def test_a_proof_that_fails_leaves_nothing(made, tmp_path):
    folder, like, _ = made("llama")
    before = sorted(tmp_path.iterdir())

    def prove(path):
        assert path.exists()
        raise AdapterError("other logits")

    with pytest.raises(AdapterError, match="other logits"):
        export_gguf(folder, like, tmp_path / "out.gguf", prove=prove)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("byte", [40, 700, -33])
def test_a_disk_that_gives_back_something_else_is_seen(byte, made, tmp_path):
    folder, like, _ = made("llama")

    class Forgetful(FileSystem):
        def close(self, handle):
            super().close(handle)
            for path in tmp_path.glob(".out.gguf.*"):
                data = bytearray(path.read_bytes())
                data[byte] ^= 1
                path.write_bytes(data)

    with pytest.raises((DamagedArtefactError, AdapterError)):
        export_gguf(folder, like, tmp_path / "out.gguf", fs=Forgetful())
    assert not list(tmp_path.glob("*out.gguf*"))


def test_a_full_disk_is_told_before(made, tmp_path):
    folder, like, _ = made("llama")

    class Full(FileSystem):
        def free_bytes(self, folder):
            return 1000

    with pytest.raises(OutputError, match="make room"):
        export_gguf(folder, like, tmp_path / "out.gguf", fs=Full())


@pytest.mark.parametrize("mode", ["kill", "kill in a write", "EIO", "EIO for ever", "ENOSPC", "short write"])
def test_at_every_operation_the_file_is_there_whole_or_not_at_all(mode, made, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.files.pieces.ROOM", 16384)
    folder, like, _ = made("gpt2")
    export_gguf(folder, like, tmp_path / "whole.gguf")
    whole, failed, at, home = (tmp_path / "whole.gguf").read_bytes(), 0, 0, tmp_path / "home"
    while True:
        home.mkdir()
        fs = Faulty(home, at, mode)
        try:
            export_gguf(folder, like, home / "out.gguf", fs=fs)
        except (VeneerError, OSError, KilledError):
            failed += 1
            if mode == "EIO":
                assert [path.name for path in home.iterdir() if path.name != "out.gguf"] == []
        if (home / "out.gguf").exists():
            assert (home / "out.gguf").read_bytes() == whole
        if fs.count <= at:
            break
        shutil.rmtree(home)
        at += 1
    assert failed > 15 or mode == "short write"
    assert (home / "out.gguf").read_bytes() == whole
