"""Writing a folder so that it is there whole or not at all.

The steps (research: failures.md 5.1): a temporary sibling folder; every file, on the disk; MANIFEST.json last;
one rename; the parent on the disk; verified. A folder that is replaced is put aside first and removed last, so at
each moment either the target or what was put aside is whole. Readers ask `readable_folder`.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import OutputError
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    dump_manifest,
    is_safe_name,
    read_manifest,
    verify_folder,
)

__all__ = ["Manifest", "commit_folder", "read_manifest", "readable_folder", "verify_folder"]

_TEMPORARY = "tmp"
_ASIDE = "old"


def commit_folder(
    target: str | Path,
    write: Callable[[Path], None] | Mapping[str, bytes],
    *,
    kind: str,
    notes: Mapping[str, Any] | None = None,
    replace: bool = False,
    fs: FileSystem = REAL,
) -> Manifest:
    """Write a folder in one step, with a manifest that vouches for it.

    Args:
        target: The folder to make; parents are made too.
        write: Relative names and contents, or a function that writes files into the folder that it is given.
        kind: What the artefact is, such as `adapter`.
        notes: What the manifest says about it besides; any JSON.
        replace: Put the new folder in the place of one that exists.
        fs: Where it lies.

    Raises:
        OutputError: If the target exists, a name leaves the folder, or the disk refuses. The target is then as it was.
        DamagedArtefactError: If what the disk gives back is not what was written. The target is then as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = commit_folder(Path(folder) / "new", {"a.txt": b"hello"}, kind="example")
        ...     verify_folder(Path(folder) / "new") == manifest
        True
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link that is to be replaced
    temporary = _sibling(target, _TEMPORARY)
    try:
        fs.make_parents(target.parent)
        _sweep(target, fs)
        _check_target(target, replace, fs)
        fs.make_folder(temporary)
        manifest = _fill(temporary, write, kind, dict(notes or {}), fs)
        _swap(temporary, target, replace, fs)
    except BaseException as cause:
        with suppress(OSError):
            if fs.exists(temporary):
                fs.remove_tree(temporary)
        if isinstance(cause, OSError):
            raise OutputError(f"{target}: could not be written: {cause}") from cause
        raise
    return manifest


def readable_folder(target: str | Path, *, fs: FileSystem = REAL) -> Path:
    """Return the folder to read: the target, or what a killed writer put aside while replacing it.

    Nothing is changed. Where neither is there, the target is returned.

    Example:
        >>> readable_folder("no/such/folder").as_posix()
        'no/such/folder'
    """
    target = Path(target)
    if fs.exists(target):
        return target
    aside = [path for path, _ in _leftovers(target, _ASIDE, fs)]
    return aside[-1] if aside else target


def _fill(
    folder: Path, write: Callable[[Path], None] | Mapping[str, bytes], kind: str, notes: dict[str, Any], fs: FileSystem
) -> Manifest:
    """Write all files and then the manifest into a new folder, and wait until they are on the disk."""
    if callable(write):
        write(folder)
    else:
        _check_names(write)
        for name, data in write.items():
            fs.make_parents((folder / name).parent)
            fs.write_bytes(folder / name, data)
    names = fs.list_files(folder)
    _check_names(names)
    records = {}
    for name in names:
        if not fs.is_plain_file(folder / name):
            raise OutputError(f"{name}: only regular files can be committed, got a link or a device")
        if callable(write):
            fs.fsync_file(folder / name)
        records[name] = FileRecord(*fs.measure(folder / name))
    manifest = Manifest(kind, records, notes)
    fs.write_bytes(folder / MANIFEST, dump_manifest(manifest))
    for inner in fs.list_folders(folder):
        fs.fsync_folder(inner)
    return manifest


def _swap(temporary: Path, target: Path, replace: bool, fs: FileSystem) -> None:
    """Give the new folder its name, verify it, and only then remove the old one."""
    aside = _sibling(target, _ASIDE)
    replacing = replace and fs.exists(target)
    if replacing:
        fs.rename(target, aside)
    placed = False
    try:
        # A rename onto a folder that appeared meanwhile fails, unless that folder is empty.
        fs.rename(temporary, target)
        placed = True
        fs.fsync_folder(target.parent)
        verify_folder(target, fs=fs)
    except BaseException:
        with suppress(OSError):
            if placed:
                fs.rename(target, temporary)
            if replacing:
                fs.rename(aside, target)
        raise
    if replacing:
        # The new folder is in place: whatever happens to the old one now is no failure of the commit. It gets a
        # temporary name first, so that one half removed is never taken for one put aside.
        with suppress(OSError):
            fs.rename(aside, temporary)
            fs.remove_tree(temporary)


def _check_target(target: Path, replace: bool, fs: FileSystem) -> None:
    if not fs.exists(target):
        return
    if not fs.is_folder(target):
        raise OutputError(f"{target}: expected a folder to write, but a file is there; choose another name")
    if not replace:
        raise OutputError(f"{target}: exists already; choose another name, or replace it with replace=True")


def _check_names(names: Mapping[str, bytes] | list[str]) -> None:
    problems = [f"{name!r}: not a relative name inside the folder" for name in names if not is_safe_name(name)]
    problems += [f"{name!r}: written by the commit itself" for name in names if name == MANIFEST]
    if problems:
        raise OutputError("files cannot be committed under these names", problems)


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(6)}"


def _leftovers(target: Path, role: str, fs: FileSystem) -> list[tuple[Path, int]]:
    """Return the siblings that commits of this target made in a role, with the processes that made them."""
    prefix, found = f".{target.name}.{role}-", []
    if not fs.is_folder(target.parent):
        return []
    for name in fs.list_folder(target.parent):
        pid, _, rest = name.removeprefix(prefix).partition("-")
        if name.startswith(prefix) and pid.isdigit() and rest:
            found.append((target.parent / name, int(pid)))
    return found


def _sweep(target: Path, fs: FileSystem) -> None:
    """Bring back what a dead process put aside, and remove what else dead processes left."""
    aside = [path for path, pid in _leftovers(target, _ASIDE, fs) if not _is_alive(pid)]
    if aside and not fs.exists(target):
        fs.rename(aside.pop(), target)
    stale = [path for path, pid in _leftovers(target, _TEMPORARY, fs) if not _is_alive(pid)]
    for path in [*aside, *stale]:
        fs.remove_tree(path)


def _is_alive(pid: int) -> bool:
    """Tell whether a process lives on this machine; where that cannot be told, it counts as alive."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
