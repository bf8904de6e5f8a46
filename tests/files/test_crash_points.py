"""Every artefact, at every operation of its writing, under every fault: the old state or the new one, never neither.

Exhaustive: no instant is drawn at random. The count of cases is printed.
"""

import shutil
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.files.faulty import MODES, Faulty, KilledError

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import OutputError, VeneerError
from veneer.files.commit import commit_file, commit_folder, readable_folder, verify_folder
from veneer.files.filesystem import FileSystem
from veneer.files.peft import adapter_to_files, load_adapter, save_adapter
from veneer.train.keeping import checkpoints, commit_checkpoint, newest_checkpoint


class Quick(FileSystem):
    """The disk without waiting for it: nothing is tested of it here."""

    def fsync(self, handle):
        pass


QUICK = Quick()
OLD = {"a.txt": b"old" * 20, "deep/b.bin": b"\0\1" * 30}
NEW = {"a.txt": b"new" * 30, "c.txt": b""}


def adapter(value: float) -> Adapter:
    pair = LowRank(torch.full((1, 3), value), torch.full((2, 1), -value), scaling=2.0)
    return Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=1, alpha=2))


@dataclass(frozen=True)
class Artefact:
    """What is written over what.

    Args:
        prepare: Makes the old state in a folder.
        write: Writes the new one.
        read: Returns what a reader sees; raises where that is not whole.
        stands: What must stand under its own name after any failure that the writer outlived.
    """

    prepare: Callable[[Path], None]
    write: Callable[[Path, FileSystem], object]
    read: Callable[[Path], Hashable]
    stands: str = ""


def read_folder(root: Path) -> Hashable:
    folder = readable_folder(root / "x")
    if not folder.exists():
        return None
    manifest = verify_folder(folder)
    assert manifest is not None
    return tuple((name, (folder / name).read_bytes()) for name in manifest.files)


def read_file(root: Path) -> Hashable:
    return (root / "x.json").read_bytes() if (root / "x.json").exists() else None


def by_function(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "model.bin").write_bytes(b"m" * 50)
    (folder / "config.json").write_bytes(b"{}")


def checkpoint(root: Path, step: int, value: float, fs: FileSystem = QUICK) -> None:
    one = adapter(value)
    files = {**adapter_to_files(one), "state.json": b'{"step": %d}' % step, "optimizer.safetensors": b"o" * 40}
    commit_checkpoint(root / "checkpoints", step, files, lambda: {"adapter": one.digest}, keep=1, fs=fs)


def checkpoints_before(root: Path) -> None:
    """Three of them, one more than stay: the save was killed before it had removed the oldest."""
    for step in (2, 4, 6):
        checkpoint(root, step, 1.0)
    two = root / "checkpoints" / "step-000002"
    shutil.copytree(root / "checkpoints" / "step-000004", two)


def read_checkpoints(root: Path) -> Hashable:
    newest, _ = newest_checkpoint(root / "checkpoints")
    assert newest is not None
    whole = [path for path in checkpoints(root / "checkpoints") if path.name != "step-000002" and verified(path)]
    assert len(whole) >= 2
    return newest.name, load_adapter(newest).digest


def verified(path: Path) -> bool:
    try:
        return verify_folder(path) is not None
    except VeneerError:
        return False


def nothing(root: Path) -> None:
    """Nothing is there before."""


ARTEFACTS = {
    "new folder": Artefact(nothing, lambda root, fs: commit_folder(root / "x", NEW, kind="x", fs=fs), read_folder),
    "folder replaced": Artefact(
        lambda root: commit_folder(root / "x", OLD, kind="x", fs=QUICK),
        lambda root, fs: commit_folder(root / "x", NEW, kind="x", replace=True, fs=fs),
        read_folder,
        "x/MANIFEST.json",
    ),
    "folder by a function": Artefact(
        nothing,
        lambda root, fs: commit_folder(root / "x", by_function, kind="base", replace=True, fs=fs),
        read_folder,
    ),
    "new file": Artefact(nothing, lambda root, fs: commit_file(root / "x.json", b"new" * 30, fs=fs), read_file),
    "file replaced": Artefact(
        lambda root: (root / "x.json").write_bytes(b"old" * 20),
        lambda root, fs: commit_file(root / "x.json", b"new" * 30, fs=fs),
        read_file,
        "x.json",
    ),
    "adapter replaced": Artefact(
        lambda root: save_adapter(adapter(1.0), root / "x", fs=QUICK),
        lambda root, fs: save_adapter(adapter(2.0), root / "x", card="card", replace=True, fs=fs),
        lambda root: load_adapter(root / "x").digest,
        "x/MANIFEST.json",
    ),
    "checkpoint over others": Artefact(
        checkpoints_before,
        lambda root, fs: checkpoint(root, 8, 2.0, fs),
        read_checkpoints,
        "checkpoints/step-000006/MANIFEST.json",
    ),
    "checkpoint written again": Artefact(
        checkpoints_before,
        lambda root, fs: checkpoint(root, 6, 2.0, fs),
        read_checkpoints,
        "checkpoints/step-000006/MANIFEST.json",
    ),
}


class Case:
    """One artefact: its old and new state, and what it leaves in its folder when nothing goes wrong."""

    def __init__(self, artefact: Artefact, home: Path) -> None:
        self.artefact, self.home = artefact, home
        self.pristine = home / "pristine"
        self.pristine.mkdir()
        artefact.prepare(self.pristine)
        self.old = artefact.read(self.pristine)
        done = self.fresh("done")
        counter = Faulty(done)
        artefact.write(done, counter)
        self.new, self.clean, self.operations = artefact.read(done), names(done), counter.log
        assert self.old != self.new

    def fresh(self, name: str = "try") -> Path:
        root = self.home / name
        if root.exists():
            shutil.rmtree(root)
        shutil.copytree(self.pristine, root)
        return root

    def attempt(self, at: int, mode: str) -> tuple[Path, Faulty, bool]:
        """Write with a fault; return whether that was said to have succeeded."""
        root = self.fresh()
        fs = Faulty(root, at, mode)
        try:
            self.artefact.write(root, fs)
        except (KilledError, VeneerError):  # nothing else may come out
            return root, fs, False
        return root, fs, True

    def check(self, root: Path, said_done: bool, where: str) -> None:
        """The reader sees the old or the new state, and a second writer is not in the least hindered."""
        seen = self.artefact.read(root)
        assert seen == self.new or (seen == self.old and not said_done), where
        if seen == self.new and names(root) != self.clean:
            with suppress(OutputError):  # what is new and was not to be replaced stands; the attempt sweeps
                self.artefact.write(root, QUICK)
        elif seen != self.new:
            self.artefact.write(root, QUICK)
        assert self.artefact.read(root) == self.new, where
        assert names(root) == self.clean, where


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.mark.parametrize("name", ARTEFACTS)
def test_at_every_operation_and_under_every_fault_the_old_or_the_new_state_is_there(name, tmp_path, capsys):
    case, cases = Case(ARTEFACTS[name], tmp_path), 0
    seen: tuple[set[str], set[str]] = (set(), set())
    assert len(case.operations) >= (4 if "file" in name else 12)
    for mode in MODES:
        hits = 0
        for at in range(len(case.operations) + 1):
            where = f"{name}: {mode} at {at} of {case.operations}"
            root, fs, said_done = case.attempt(at, mode)
            hits += fs.hit
            if mode == "power loss":
                for what in fs.after_power_loss(tmp_path / "lost", seen[said_done]):
                    case.check(tmp_path / "lost", said_done, f"{where}: {what}")
                    cases += 1
            elif fs.hit:
                # What is removed loses its name first: no half of a checkpoint ever stands under one.
                assert all(verified(path) for path in checkpoints(root / "checkpoints")), where
                if mode in ("EIO", "ENOSPC", "short write"):
                    assert (root / ARTEFACTS[name].stands).exists(), where
                case.check(root, said_done, where)
                cases += 1
        assert hits or (mode == "done, then EIO"), mode
    with capsys.disabled():
        print(f"\n{name}: {len(case.operations)} operations, {len(MODES)} faults, {cases} cases")
    assert cases > 4 * len(case.operations)
