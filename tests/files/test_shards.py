"""Reading checkpoints tensor by tensor."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.errors import AdapterError, BaseModelError
from veneer.files.filesystem import REAL
from veneer.files.manifest import FileRecord
from veneer.files.shards import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Edit,
    copy_file,
    read_checkpoint,
    read_config,
    read_tensor,
    write_shard,
)
from veneer.files.tensors import DTYPES, dump_tensors


@pytest.fixture
def folder(tmp_path):
    """Two shards with an index, and a configuration."""
    tensors = {f"layers.{n}.weight": torch.randn(3, n + 1) for n in range(4)} | {"empty": torch.zeros(0, 2)}
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    return tmp_path, tensors, places


def test_every_tensor_of_every_shard_is_found_and_read_bit_for_bit(folder):
    path, tensors, places = folder
    found = read_checkpoint(path)
    assert found.shapes == {name: tuple(one.shape) for name, one in tensors.items()}
    assert {name: one.file for name, one in found.tensors.items()} == places
    assert found.config == {"model_type": "llama"}
    assert found.metadata["model-1.safetensors"] == {"format": "pt"}
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(found, name), tensor)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_dtype_comes_back(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    (tmp_path / WEIGHTS).write_bytes(dump_tensors({"x": tensor}))
    assert torch.equal(read_tensor(read_checkpoint(tmp_path), "x"), tensor)


def test_all_that_an_index_promises_falsely_is_listed(folder):
    path, _, places = folder
    held = places | {"gone": "model-1.safetensors", "far": "model-9.safetensors"}
    del held["layers.3.weight"]
    (path / INDEX).write_text(json.dumps({"weight_map": held}))
    with pytest.raises(BaseModelError) as caught:
        read_checkpoint(path)
    gone, unnamed, missing = caught.value.problems
    assert gone == f"'gone': {INDEX} says it is in model-1.safetensors; it is not"
    assert unnamed == f"'layers.3.weight': in model-2.safetensors, but not named by {INDEX}"
    assert missing.startswith(f"model-9.safetensors: named by {INDEX}, but missing; nearest: 'model-2.safetensors'")


def test_an_index_cannot_lead_out_of_its_folder(folder):
    path, _, _ = folder
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(BaseModelError, match="outside of the folder"):
        read_checkpoint(path)


@pytest.mark.parametrize("index", [[], {"weight_map": {}}, {"weight_map": {"x": 3}}, {"weight_map": []}])
def test_an_index_that_is_none_is_refused(folder, index):
    path, _, _ = folder
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="expected"):
        read_checkpoint(path)


def test_a_file_that_was_cut_short_is_refused_by_its_header(tmp_path):
    data = dump_tensors({"x": torch.ones(100)})
    (tmp_path / WEIGHTS).write_bytes(data[:-8])
    with pytest.raises(AdapterError, match="8 bytes are missing at the end"):
        read_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(data)
    found = read_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(data[:-8])
    with pytest.raises(BaseModelError, match="cannot be read"):
        read_tensor(found, "x")


def test_near_names_are_told(folder, tmp_path):
    found = read_checkpoint(folder[0])
    with pytest.raises(BaseModelError, match=r"nearest: 'layers\.1\.weight'"):
        read_tensor(found, "layer.1.weight")
    with pytest.raises(BaseModelError, match="expected a folder with"):
        read_checkpoint(tmp_path / "nowhere")


def halves(stored, _):
    return stored.mul_(0.5)


@pytest.mark.parametrize("lanes", [False, True])
def test_a_file_is_written_byte_for_byte_but_for_its_edits(folder, monkeypatch, lanes):
    path, tensors, _ = folder
    monkeypatch.setattr("veneer.files.shards.BLOCK", 16)  # so that tensors take several
    found, told = read_checkpoint(path), []
    for file in found.metadata:
        target = path / f"new-{file}"
        assert write_shard(found, file, target, {}, on_bytes=told.append) == (FileRecord(*REAL.measure(target)),) * 2
        assert target.read_bytes() == (path / file).read_bytes()
    assert sum(told) == sum((path / file).stat().st_size for file in found.metadata)
    file = found.tensors["layers.1.weight"].file
    edits = {"layers.1.weight": Edit("layers.1.weight", torch.float32, halves)}
    read, written = write_shard(found, file, path / "edited", edits, lanes=lanes)
    assert read == FileRecord(*REAL.measure(path / file))
    assert written == FileRecord(*REAL.measure(path / "edited"))
    assert (path / "edited").read_bytes()[: found.tensors["empty"].start] == (path / file).read_bytes()[
        : found.tensors["empty"].start
    ]
    for name, one in load_file(path / "edited").items():
        assert torch.equal(one, tensors[name] * (0.5 if name in edits else 1))


def test_new_tensors_and_other_dtypes_make_a_new_header_that_safetensors_reads(tmp_path):
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 2), "c": torch.zeros(0, 2)}
    (tmp_path / WEIGHTS).write_bytes(dump_tensors(tensors))
    found = read_checkpoint(tmp_path)
    edits = {
        "b": Edit("b", torch.bfloat16, lambda one, _: one.bfloat16()),
        "new": Edit("b", torch.float64, lambda one, _: one.double()),
    }
    read, _ = write_shard(found, WEIGHTS, tmp_path / "new", edits)
    assert read == FileRecord(*REAL.measure(tmp_path / WEIGHTS))  # though it was not read in its order
    again = load_file(tmp_path / "new")
    assert torch.equal(again["new"], tensors["b"].double())
    assert torch.equal(again["b"], tensors["b"].bfloat16())
    assert torch.equal(again["a"], tensors["a"])
    assert again["c"].shape == (0, 2)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "new").read_bytes())
    places = read_checkpoint(tmp_path)
    assert all(one.start % DTYPES[one.dtype].itemsize == 0 for one in places.tensors.values())
    assert places.metadata[WEIGHTS] == {"format": "pt"}


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_an_edit_is_given_its_tensor_in_steps(tmp_path, monkeypatch, lanes, step):
    monkeypatch.setattr("veneer.files.shards.BLOCK", 24)
    tensors = {"a": torch.randn(30, 5).half(), "b": torch.randn(11), "c": torch.arange(90)}
    (tmp_path / WEIGHTS).write_bytes(dump_tensors(tensors))
    found, asked = read_checkpoint(tmp_path), []

    def number(stored, start):
        asked.append((start, len(stored)))
        return stored + torch.arange(start, start + len(stored)).to(stored.dtype)

    edits = {name: Edit(name, tensors[name].dtype, number, step) for name in "ab"}
    read, written = write_shard(found, WEIGHTS, tmp_path / "new", edits, lanes=lanes)
    assert read == FileRecord(*REAL.measure(tmp_path / WEIGHTS))
    assert written == FileRecord(*REAL.measure(tmp_path / "new"))
    again = load_file(tmp_path / "new")
    assert torch.equal(again["c"], tensors["c"])
    for name in "ab":
        flat = tensors[name].flatten()
        assert torch.equal(again[name].flatten(), flat + torch.arange(len(flat)).to(flat.dtype))
    assert sum(count for _, count in asked) == 161


def test_a_lane_computes_with_as_many_threads_as_who_asks(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(dump_tensors({"a": torch.zeros(8)}))
    seen, before = [], torch.get_num_threads()

    def look(stored, _):
        seen.append((torch.get_num_threads(), threading.get_ident()))
        return stored

    torch.set_num_threads(1)
    try:
        for number, lanes in enumerate((False, True)):
            edits = {"a": Edit("a", torch.float32, look)}
            write_shard(read_checkpoint(tmp_path), WEIGHTS, tmp_path / f"new-{number}", edits, lanes=lanes)
    finally:
        torch.set_num_threads(before)
    assert [count for count, _ in seen] == [1, 1]
    assert seen[0][1] == threading.get_ident() != seen[1][1]


def test_a_base_that_is_cut_while_it_is_read_is_said_so(folder):
    path, _, places = folder
    found, file = read_checkpoint(path), places["layers.0.weight"]
    (path / file).write_bytes((path / file).read_bytes()[:-1])
    with pytest.raises(BaseModelError, match=f"{file}: cannot be read at byte"):
        write_shard(found, file, path / "new", {})


def test_a_copy_is_hashed_on_its_way(tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.files.shards.BLOCK", 3)
    for content in (b"", b"hello world"):
        (tmp_path / "a").write_bytes(content)
        assert copy_file(tmp_path / "a", tmp_path / f"b{len(content)}") == FileRecord(*REAL.measure(tmp_path / "a"))
        assert (tmp_path / f"b{len(content)}").read_bytes() == content


def test_a_configuration_alone_is_read(folder, tmp_path):
    assert read_config(folder[0]) == {"model_type": "llama"}


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_diffusers_are_read(tmp_path, sharded):
    stem, tensor = "diffusion_pytorch_model", torch.randn(2, 3)
    file = f"{stem}-00001-of-00001.safetensors" if sharded else f"{stem}.safetensors"
    (tmp_path / file).write_bytes(dump_tensors({"conv_in.weight": tensor}))
    index = f"{stem}.safetensors.index.json" if sharded else None
    if index is not None:
        (tmp_path / index).write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))
    found = read_checkpoint(tmp_path)
    assert found.index == index
    assert torch.equal(read_tensor(found, "conv_in.weight"), tensor)
