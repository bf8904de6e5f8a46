"""Files that are merged side by side: one outcome, whatever happens to which of them."""

import errno
import json
import threading

import pytest
import torch

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, DamagedArtefactError, OutputError
from veneer.files.commit import verify_folder
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.shards import INDEX, read_checkpoint, read_tensor
from veneer.files.tensors import dump_tensors
from veneer.tools import merge_checkpoint as tool
from veneer.tools.merge_checkpoint import Order, carry_out, merge_files
from veneer.tools.merge_weights import round_once

FILES, ROWS = 5, 40


@pytest.fixture
def base(tmp_path):
    """A checkpoint in five files, each of a weight and of something that stays."""
    folder, places = tmp_path / "base", {}
    folder.mkdir()
    for number in range(FILES):
        names = {f"layers.{number}.q.weight": torch.randn(ROWS, 16).bfloat16(), f"layers.{number}.norm": torch.ones(3)}
        (folder / f"model-{number}.safetensors").write_bytes(dump_tensors(names))
        places |= dict.fromkeys(names, f"model-{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def adapter(worst: float = 1.0) -> Adapter:
    """One for all files; the factors of the third are multiplied."""
    pairs = {f"layers.{n}.q": LowRank(torch.randn(2, 16), torch.randn(ROWS, 2), 0.5) for n in range(FILES)}
    third = pairs["layers.2.q"]
    return Adapter(
        pairs | {"layers.2.q": LowRank(third.lora_A.double(), third.lora_B.double() * worst, 0.5)}, LoRAConfig(rank=2)
    )


@pytest.mark.parametrize("cores", [1, 2, 3, 8, None])
def test_any_number_of_cores_gives_the_same_files(base, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(tool.os, "cpu_count", lambda: cores)
    monkeypatch.setattr("veneer.tools.merge_checkpoint_weights.PIECE", 100)
    monkeypatch.setattr("veneer.files.shards.BLOCK", 64)
    one, before, told = adapter(), torch.get_num_threads(), []
    record = merge_files(base, [(one, 1.0)], tmp_path / "out", on_bytes=told.append)
    assert torch.get_num_threads() == before
    assert verify_folder(tmp_path / "out") is not None
    after = read_checkpoint(tmp_path / "out")
    for name, place in read_checkpoint(base).tensors.items():
        expected = read_tensor(read_checkpoint(base), name)
        if name.endswith("q.weight"):
            expected = round_once(expected.double() + one.modules[name.removesuffix(".weight")].delta(),
                                  torch.bfloat16)  # fmt: skip
        assert torch.equal(read_tensor(after, name), expected)
        assert record.inputs[place.file].sha256 == REAL.measure(base / place.file)[1]
        assert record.outputs[place.file].sha256 == REAL.measure(tmp_path / "out" / place.file)[1]
    assert len(record.modules) == FILES
    assert sum(told) == sum(path.stat().st_size for path in base.glob("*.safetensors"))


def left(tmp_path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name != "base"]


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_what_is_wrong_with_one_file_is_what_is_said(base, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(tool.os, "cpu_count", lambda: cores)
    with pytest.raises(AdapterError, match=r"layers\.2\.q: the merged weight reaches"):
        merge_files(base, [(adapter(1e39), 1.0)], tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 7, 12])
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_disk_that_is_full_in_any_thread_leaves_nothing(base, tmp_path, monkeypatch, cores, at):
    class Full(FileSystem):
        lock, left = threading.Lock(), at

        def write(self, handle, data):
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, "injected: no space left on device")
            return super().write(handle, data)

    monkeypatch.setattr(tool.os, "cpu_count", lambda: cores)
    monkeypatch.setattr("veneer.files.pieces.ROOM", 300)
    with pytest.raises(OutputError, match="make room"):
        carry_out(Order(base, [(adapter(), 1.0)], tmp_path / "out"), Full())
    assert left(tmp_path) == []


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_who_wants_to_end_does_not_wait_for_other_files(base, tmp_path, monkeypatch, cores):
    """What is told of bytes ends a file: all files end with their next piece, and no other one begins."""
    monkeypatch.setattr(tool.os, "cpu_count", lambda: cores)
    told = []

    def tell(size):
        told.append(size)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, [(adapter(), 1.0)], tmp_path / "out", on_bytes=tell)
    assert len(told) < FILES * 3
    assert left(tmp_path) == []


def test_a_disk_that_gives_back_something_else_is_found(base, tmp_path):
    class Lying(FileSystem):
        def write(self, handle, data):
            spoilt = bytes(data)
            return super().write(handle, memoryview(spoilt.replace(b"\x80\x3f", b"\x80\x3e")))

    with pytest.raises(DamagedArtefactError, match="does not give back what was written"):
        carry_out(Order(base, [(adapter(), 1.0)], tmp_path / "out"), Lying())
    assert left(tmp_path) == []
