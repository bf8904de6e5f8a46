"""Which checkpoint is written, which ones stay, and that no damage is ever gone on from."""

import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from veneer.config import LoRAConfig
from veneer.errors import DamagedArtefactError, OutputError, VeneerError
from veneer.files.commit import verify_folder
from veneer.files.filesystem import FileSystem
from veneer.files.manifest import MANIFEST, Manifest, dump_manifest, read_manifest, record_content
from veneer.nn.attach import Attachment, attach, attachment_of, current_adapter
from veneer.train.checkpoint import TrainState, check_room, load_checkpoint, save_checkpoint
from veneer.train.keeping import checkpoints, commit_checkpoint, newest_checkpoint, try_checkpoint
from veneer.train.optimizer import FlatAdamW

NUM_DAMAGES = 200


class Training:
    """Two adapted layers and their optimiser, which draw their gradients."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        attach(self.model, LoRAConfig(rank=2))
        self.attachment: Attachment = attachment_of(self.model)
        self.optimizer = FlatAdamW(self.attachment.parameters(), weight_decay=0.0, max_grad_norm=1.0)
        self.state = TrainState()

    def step(self) -> None:
        for parameter in self.attachment.parameters().values():
            parameter.grad.normal_()
        self.optimizer.step(1e-2)
        self.state.step += 1

    def save(self, folder: Path, fs: FileSystem | None = None, keep: int = 2) -> Path:
        more = {} if fs is None else {"fs": fs}
        return save_checkpoint(folder, current_adapter(self.model), self.optimizer, self.state, keep, **more)

    def bits(self) -> dict[str, bytes]:
        values = {**self.attachment.parameters(), **self.optimizer.state()}
        return {name: one.detach().numpy().tobytes() for name, one in values.items()} | {
            "step": bytes([self.state.step])
        }

    def load(self, path: Path) -> dict[str, bytes]:
        self.state = load_checkpoint(path, self.attachment, self.optimizer)
        return self.bits()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """Two checkpoints, and the bits that each must give back."""
    torch.manual_seed(0)
    folder, training, bits = tmp_path_factory.mktemp("two") / "checkpoints", Training(), {}
    for _ in range(2):
        training.step()
        bits[training.save(folder).name] = training.bits()
    return folder, bits


# Damages. Each gets the newest checkpoint, the one before it, and a source of chance.


def a_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.iterdir()))


def truncated(newest: Path, before: Path, chance: random.Random) -> None:
    file = a_file(newest, chance)
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def zero_tail(newest: Path, before: Path, chance: random.Random) -> None:
    """What a kill leaves where the file was sized first: for tensors, a valid header over nothing."""
    file = a_file(newest, chance)
    data = file.read_bytes()
    count = chance.randrange(1, len(data))
    file.write_bytes(data[:-count] + bytes(count))


def flipped_byte(newest: Path, before: Path, chance: random.Random) -> None:
    file = a_file(newest, chance)
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    file.write_bytes(data)


def lengthened(newest: Path, before: Path, chance: random.Random) -> None:
    with a_file(newest, chance).open("ab") as file:
        file.write(b"\0" * chance.randrange(1, 600))


def missing(newest: Path, before: Path, chance: random.Random) -> None:
    a_file(newest, chance).unlink()


def extra(newest: Path, before: Path, chance: random.Random) -> None:
    (newest / chance.choice(["a.bin", "pytorch_model.bin", ".hidden", "MANIFEST.json.tmp"])).write_bytes(b"x")


def link(newest: Path, before: Path, chance: random.Random) -> None:
    file = a_file(newest, chance)
    file.unlink()
    file.symlink_to(before / file.name if chance.random() < 0.5 else newest / "nowhere")


def swapped_files(newest: Path, before: Path, chance: random.Random) -> None:
    name = chance.choice(["adapter_model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
    one, other = (newest / name).read_bytes(), (before / name).read_bytes()
    (newest / name).write_bytes(other), (before / name).write_bytes(one)


def swapped_folders(newest: Path, before: Path, chance: random.Random) -> None:
    beside = newest.with_name("beside")
    newest.rename(beside), before.rename(newest), beside.rename(before)


def another_step(newest: Path, before: Path, chance: random.Random) -> None:
    shutil.copytree(before, newest.with_name("step-000009"))


def emptied(newest: Path, before: Path, chance: random.Random) -> None:
    shutil.rmtree(newest)
    newest.mkdir()
    if chance.random() < 0.5:
        (newest / "adapter_config.json").write_bytes((before / "adapter_config.json").read_bytes())


def a_file_of_that_name(newest: Path, before: Path, chance: random.Random) -> None:
    shutil.rmtree(newest)
    newest.write_bytes(b"{}")


def edited_json(newest: Path, before: Path, chance: random.Random) -> None:
    file = newest / chance.choice(["state.json", "adapter_config.json", MANIFEST])
    raw = json.loads(file.read_bytes())
    key = chance.choice(sorted(raw))
    raw[key] = chance.choice([None, 1e9, -1, "x", [], {}])
    file.write_text(chance.choice([json.dumps(raw), json.dumps(raw)[:-1], json.dumps(raw)[:-1] + ',"step": 1}']))


def edited_with_its_manifest(newest: Path, before: Path, chance: random.Random) -> None:
    """The hash is made to fit: what the files say of each other is left to tell."""
    name = chance.choice(["adapter_model.safetensors", "state.json", "adapter_config.json", "optimizer.safetensors"])
    data = (newest / name).read_bytes()
    if name == "adapter_model.safetensors":
        data = data[:-1] + bytes([data[-1] ^ 1])
    elif name == "state.json":
        data = data.replace(b'"step": 2', b'"step": 1')
    else:
        data = data[: chance.randrange(len(data) - 2)]  # the last two are the brace and the end of the line
    (newest / name).write_bytes(data)
    manifest = read_manifest(newest)
    files = {**manifest.files, name: record_content(data)}
    (newest / MANIFEST).write_bytes(dump_manifest(Manifest(manifest.kind, files, manifest.notes)))


DAMAGES: tuple[Callable[[Path, Path, random.Random], None], ...] = (
    *(truncated, zero_tail, flipped_byte, lengthened, missing, extra, link, swapped_files, swapped_folders),
    *(another_step, emptied, a_file_of_that_name, edited_json, edited_with_its_manifest),
)


def test_200_damages_are_refused_or_gone_back_from_and_never_gone_on_from(two, tmp_path, capsys):
    origin, bits = two
    refused = recovered = 0
    for seed in range(NUM_DAMAGES):
        chance, damage = random.Random(seed), DAMAGES[seed % len(DAMAGES)]
        folder = tmp_path / "checkpoints"
        shutil.copytree(origin, folder)
        newest, before = folder / "step-000002", folder / "step-000001"
        damage(newest, before, chance)
        found, said = newest_checkpoint(folder)
        where = f"seed {seed}: {damage.__name__}: {said}"
        assert said or damage is edited_with_its_manifest, where  # that one is seen when it is loaded
        if found is None:
            refused += 1  # both were damaged
        else:
            try:
                given = Training().load(found)
            except VeneerError:
                refused += 1
            else:
                assert given == bits[found.name], where
                recovered += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{NUM_DAMAGES} damaged checkpoints: {recovered} recovered, {refused} refused")
    assert recovered + refused == NUM_DAMAGES
    assert recovered > NUM_DAMAGES // 2


def test_an_undamaged_checkpoint_gives_back_every_bit(two):
    origin, bits = two
    found, said = newest_checkpoint(origin)
    assert (found.name, said) == ("step-000002", [])
    assert Training().load(found) == bits["step-000002"] != bits["step-000001"]


def test_a_valid_header_over_a_zero_tail_is_refused_for_its_hash_alone(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "c")
    file = tmp_path / "c" / "step-000002" / "optimizer.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-40] + bytes(40))
    found, said = newest_checkpoint(tmp_path / "c")
    assert found.name == "step-000001"
    assert "optimizer.safetensors: expected SHA-256" in said[0]


def saved_steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize(("keep", "left"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_at_least_two_stay_and_no_other_folder_is_touched(tmp_path, keep, left):
    training = Training()
    (tmp_path / "best").mkdir()
    (tmp_path / "step-1-of-mine").mkdir()
    for _ in range(5):
        training.step()
        training.save(tmp_path, keep=keep)
    assert saved_steps(tmp_path) == [f"step-{step:06d}" for step in range(6 - left, 6)]
    assert {"best", "step-1-of-mine"} <= {path.name for path in tmp_path.iterdir()}


def test_a_damaged_one_does_not_count_as_one_of_those_that_stay(tmp_path):
    training = Training()
    for _ in range(3):
        training.step()
        training.save(tmp_path)
    (tmp_path / "step-000003" / "state.json").unlink()
    training.step()
    training.save(tmp_path)
    assert saved_steps(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_nothing_is_removed_before_the_new_one_is_read_back(tmp_path):
    class Lying(FileSystem):
        def rename(self, source, target):
            super().rename(source, target)
            if target.name == "step-000003":
                (target / "state.json").write_bytes((target / "state.json").read_bytes().replace(b"3", b"4"))

    training = Training()
    for _ in range(3):
        training.step()
        if training.state.step < 3:
            training.save(tmp_path)
    with pytest.raises(DamagedArtefactError, match=r"state\.json: not what was written"):
        training.save(tmp_path, Lying())
    assert saved_steps(tmp_path) == ["step-000001", "step-000002"]
    assert all(verify_folder(path) for path in checkpoints(tmp_path))


class Full(FileSystem):
    """A disk that takes so many bytes and no more, until there is room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, handle, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return super().write(handle, data)

    def free_bytes(self, folder):
        return self.room


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_is_needed(tmp_path):
    training = Training()
    training.step()
    training.save(tmp_path)
    before = training.bits()
    training.step()
    disk = Full(1500)
    with pytest.raises(OutputError, match=r"it takes 0\.0 MB, .* make room; of the checkpoints step-000001 stands"):
        training.save(tmp_path, disk)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert Training().load(newest_checkpoint(tmp_path)[0]) == before
    disk.room = 1 << 20
    training.save(tmp_path, disk)
    assert Training().load(newest_checkpoint(tmp_path)[0]) == training.bits()


def test_room_is_proved_before_the_first_step(tmp_path):
    check_room(tmp_path, current_adapter(Training().model), 2)
    assert list(tmp_path.iterdir()) == []
    try_checkpoint(tmp_path, _files(1000), 2, fs=Full(1 << 20))
    with pytest.raises(OutputError, match=r"MB are needed for 4 checkpoints of .* choose another `out`"):
        try_checkpoint(tmp_path, _files(1 << 20), 2, fs=Full(1 << 21))


def test_room_that_the_volume_promises_and_a_quota_denies_is_found_out(tmp_path):
    class Quota(Full):
        def free_bytes(self, folder):
            return 1 << 40

        def write(self, handle, data):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(OutputError, match=r"Disk quota exceeded"):
        check_room(tmp_path, current_adapter(Training().model), 2, fs=Quota(0))
    assert list(tmp_path.iterdir()) == []


def _files(size: int) -> dict[str, bytes]:
    return {"a.bin": bytes(size)}


def test_old_checkpoints_that_cannot_be_removed_are_no_reason_to_stop(tmp_path, caplog):
    class Stuck(FileSystem):
        def unlink(self, path):
            raise OSError(errno.EIO, "injected")

    training = Training()
    for _ in range(3):
        training.step()
        path = training.save(tmp_path, Stuck())
    assert verify_folder(path) is not None
    assert "old checkpoints could not be removed" in caplog.text
    assert any(one.name.startswith(".step-") for one in tmp_path.iterdir())
    training.step()
    training.save(tmp_path)  # the disk is well again
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_moments_that_overflowed_are_saved_and_come_back(tmp_path):
    training = Training()
    training.step()
    for run in training.optimizer._runs:
        training.optimizer._inner.state[run.values]["exp_avg_sq"][0] = torch.inf
    training.save(tmp_path)
    assert Training().load(newest_checkpoint(tmp_path)[0]) == training.bits()


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    training = Training()
    training.step()
    next(iter(training.attachment.parameters().values())).data[0, 0] = torch.nan
    with pytest.raises(VeneerError, match=r"not finite"):
        training.save(tmp_path)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_a_checkpoint_names_its_step_and_the_adapter_in_it(tmp_path):
    training = Training()
    training.step()
    adapter = current_adapter(training.model)
    path = training.save(tmp_path)
    manifest = read_manifest(path)
    assert (manifest.kind, manifest.notes["step"], manifest.notes["adapter"]) == ("checkpoint", 1, adapter.digest)
    files = {name: (path / name).read_bytes() for name in manifest.files}
    commit_checkpoint(tmp_path, 7, files, lambda: {"adapter": "0" * 64}, 2)
    found, said = newest_checkpoint(tmp_path)
    assert found == path
    assert "expected adapter 0000" in said[0]
