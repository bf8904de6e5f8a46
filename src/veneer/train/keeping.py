"""The folder of checkpoints: which one is written, which ones stay, which one is gone on from.

A checkpoint is any set of files that `files.commit` vouches for, named by its step. What is in it, `train.checkpoint`
knows.
"""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import DamagedArtefactError, OutputError, VeneerError
from veneer.files.commit import commit_folder, discard, read_manifest, sweep, verify_folder
from veneer.files.filesystem import REAL, Content, FileSystem, pieces_of
from veneer.files.peft import load_adapter

log = logging.getLogger("veneer")

AT_LEAST = 2
"""So many checkpoints stay whatever a run asks for: one of them may turn out damaged."""

_NAME = re.compile(r"step-(\d{6,})")
_KIND, _TRIAL = "checkpoint", "trial"


def commit_checkpoint(
    folder: Path,
    step: int,
    files: Mapping[str, Content],
    notes: Callable[[], Mapping[str, Any]],
    keep: int,
    *,
    fs: FileSystem = REAL,
) -> Path:
    """Write the checkpoint of a step, read it back, and only then remove all but the newest ones.

    Args:
        folder: The run's `checkpoints` folder.
        step: Optimiser steps done.
        files: Names and contents, an adapter's two files among them.
        notes: Asked, when the files are written, for what its manifest says besides; `adapter` is the digest of the
            adapter in it.
        keep: How many stay, at least two. Damaged ones do not count, and neither does any other folder.
        fs: Where it lies.

    Raises:
        OutputError: If it cannot be written; the checkpoints that were there stand.
        DamagedArtefactError: If the disk does not give back what was written; likewise.
    """
    target = folder / f"step-{step:06d}"
    try:
        commit_folder(target, files, kind=_KIND, notes=lambda: {**notes(), "step": step}, replace=True, fs=fs)
    except OutputError as error:
        stands = next((f"{path.name} stands" for path in reversed(checkpoints(folder, fs=fs))), "none stands yet")
        raise OutputError(f"{error.message}; of the checkpoints {stands}: go on with --resume") from error
    try:
        _retire(folder, max(keep, AT_LEAST), fs)
    except OSError as error:  # the new one stands; the next save tries again
        log.warning("old checkpoints could not be removed: %s", error)
    return target


def try_checkpoint(folder: Path, files: Mapping[str, Content], keep: int, *, fs: FileSystem = REAL) -> None:
    """Prove before the first step that checkpoints can be written: there is room, and one is written and read back.

    Args:
        folder: The run's `checkpoints` folder.
        files: As large as a checkpoint's will be.
        keep: How many stay.
        fs: Where it lies.

    Raises:
        OutputError: Naming what is needed and what is there, or what the disk refused.
        DamagedArtefactError: If the disk does not give back what was written.
    """
    size = sum(len(piece) for content in files.values() for piece in pieces_of(content))
    # One more than stay stands while the newest is written; as much as one is left for the adapter and the rest.
    count = max(0, max(keep, AT_LEAST) + 1 - len(checkpoints(folder, fs=fs))) + 1
    free = fs.free_bytes(folder)
    if free < count * size:
        raise OutputError(
            f"{folder}: {count * size / 1e6:,.1f} MB are needed for {count} checkpoints of {size / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free there; make room, or choose another `out`"
        )
    commit_folder(folder / _TRIAL, files, kind="trial", replace=True, fs=fs)
    with suppress(OSError):  # it does no harm there, and the next one takes its place
        discard(folder / _TRIAL, fs=fs)


def forget_checkpoints_after(folder: Path, step: int, *, fs: FileSystem = REAL) -> None:
    """Remove checkpoints behind a step: damaged ones that were passed over, whose steps will be done again."""
    for path in checkpoints(folder, fs=fs):
        if step_of(path) > step:
            discard(path, fs=fs)


def checkpoints(folder: Path, *, fs: FileSystem = REAL) -> list[Path]:
    """Return the checkpoints of a run, oldest first, damaged ones among them."""
    names = fs.list_folder(folder) if fs.is_folder(folder) else []
    return sorted((folder / name for name in names if _NAME.fullmatch(name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint is named by.

    Example:
        >>> step_of(Path("runs/a/checkpoints/step-000200"))
        200
    """
    return int(checkpoint.name.partition("-")[2])


def newest_checkpoint(folder: Path, *, fs: FileSystem = REAL) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is sound, and a line for each newer one that is not.

    What a killed writer left is put in order first.
    """
    with suppress(OSError):  # a folder that cannot be changed can still be read
        sweep(folder, fs=fs)
    damaged = []
    for path in reversed(checkpoints(folder, fs=fs)):
        try:
            _check_sound(path, fs)
        except (VeneerError, OSError) as error:
            damaged.append(f"{path.name}: {error}")
        else:
            return path, damaged
    return None, damaged


def _check_sound(path: Path, fs: FileSystem) -> None:
    """Raise unless a checkpoint is what its manifest vouches for, and the manifest speaks of this step's checkpoint."""
    manifest = verify_folder(path, fs=fs)
    if manifest is None:
        raise DamagedArtefactError(f"{path} has no MANIFEST.json")
    if manifest.kind != _KIND or manifest.notes.get("step") != step_of(path):
        raise DamagedArtefactError(
            f"{path}: expected the checkpoint of step {step_of(path)}, its MANIFEST.json speaks of "
            f"{manifest.kind} {manifest.notes.get('step')}; it was moved here from elsewhere"
        )
    if links := [name for name in manifest.files if not fs.is_plain_file(path / name)]:
        raise DamagedArtefactError(f"{path}: only regular files are committed, these are none", links)
    digest = load_adapter(path, fs=fs).digest
    if digest != manifest.notes.get("adapter"):
        raise DamagedArtefactError(f"{path}: expected adapter {manifest.notes.get('adapter')}, it holds {digest}")


def _retire(folder: Path, keep: int, fs: FileSystem) -> None:
    """Remove the checkpoints behind the newest `keep` ones that look whole, and what dead writers left."""
    sweep(folder, fs=fs)
    whole = 0
    for path in reversed(checkpoints(folder, fs=fs)):
        if whole >= keep:
            discard(path, fs=fs)
        elif _looks_whole(path, fs):
            whole += 1


def _looks_whole(path: Path, fs: FileSystem) -> bool:
    """Tell whether a checkpoint has a manifest and files of its sizes; what they hold is not read."""
    try:
        manifest = read_manifest(path, fs=fs)
        return manifest is not None and all(
            fs.size_of(path / name) == record.bytes for name, record in manifest.files.items()
        )
    except (VeneerError, OSError):
        return False
