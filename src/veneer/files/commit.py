"""Writing a folder, or a file, so that it is there whole or not at all.

The steps of a folder (research: failures.md 5.1): a temporary sibling; every file, on the disk; MANIFEST.json last; one
rename; the parent on the disk; read back. A folder that is replaced is put aside first and removed last, so at each
moment either the target or what was put aside is whole. Readers ask `readable_folder`.

Who writes holds a lock on his temporary folder, and one on its parent while names change. Locks go with their process,
so what nobody holds is what a dead writer left: no process number is asked, which another process may have by now.
"""

import errno
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from veneer.errors import DamagedArtefactError, OutputError, VeneerError
from veneer.files.filesystem import NOT_GIVEN_BACK, REAL, Content, FileSystem, pieces_of
from veneer.files.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    dump_manifest,
    is_safe_name,
    read_manifest,
    record_content,
    verify_folder,
)

__all__ = [
    "Manifest",
    "commit_file",
    "commit_folder",
    "discard",
    "read_manifest",
    "read_steadily",
    "readable_folder",
    "sweep",
    "verify_folder",
]

_TEMPORARY = "tmp"
_ASIDE = "old"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TRIES = 10

Read = TypeVar("Read")

Written = Mapping[str, FileRecord] | None
"""What a function that writes may tell of its files, so that they are not read again to be hashed."""
Writer = Callable[[Path], Written] | Mapping[str, Content]
"""What fills a folder: names and contents, or a function that writes files into the folder that it is given."""

Notes = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def commit_folder(
    target: str | Path,
    write: Writer,
    *,
    kind: str,
    notes: Notes | None = None,
    replace: bool = False,
    trusted: bool = False,
    fs: FileSystem = REAL,
) -> Manifest:
    """Write a folder in one step, with a manifest that vouches for it.

    Args:
        target: The folder to make; parents are made too.
        write: Relative names and contents, or a function that writes files into the folder that it is given.
        kind: What the artefact is, such as `adapter`.
        notes: What the manifest says about it besides, any JSON; or a function that is asked for it after the files
            are written.
        replace: Put the new folder in the place of one that exists.
        trusted: Of files whose hashes the writer tells, only the sizes are compared with what is there.
        fs: Where it lies.

    Raises:
        OutputError: If the target exists, a name leaves the folder, or the disk refuses. The target is then as it was.
        DamagedArtefactError: If what the disk gives back is not what was written. The target is then as it was.

    Cost:
        Contents are written, hashed beside that, and read back to be compared; nothing is copied.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = commit_folder(Path(folder) / "new", {"a.txt": b"hello"}, kind="example")
        ...     verify_folder(Path(folder) / "new") == manifest
        True
    """
    target = _absolute(target)
    temporary = _sibling(target, _TEMPORARY)
    size = 0 if callable(write) else sum(len(piece) for one in write.values() for piece in pieces_of(one))
    with _told(target, size, fs), ExitStack() as stack:
        fs.make_parents(target.parent)
        stack.callback(_remove_quietly, temporary, fs)
        with fs.locked(target.parent) as alone:
            _sweep(target, fs, alone)
            _check_target(target, replace, fs)
            fs.make_folder(temporary)
            stack.enter_context(fs.locked(temporary))
        manifest, told = _fill(temporary, write, kind, notes or {}, fs)
        known = told if trusted else frozenset()
        with fs.locked(target.parent):
            _swap(temporary, target, replace, fs, lambda: _read_back(target, manifest, write, known, fs))
    return manifest


def commit_file(
    target: str | Path, content: Content | Callable[[Path], object], *, size: int | None = None, fs: FileSystem = REAL
) -> None:
    """Write a single file in one step, in the place of one that may be there; its folder must exist.

    Args:
        target: The file.
        content: What it is to hold; or a function that writes the file that it is given, waits for the disk, and
            raises where that is not what it should be.
        size: How many bytes such a function writes, for what is said of a full disk.
        fs: Where it lies.

    Raises:
        OutputError: If the disk refuses. The target is then as it was.

    Cost:
        Other writers into the same folder wait meanwhile.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     commit_file(Path(folder) / "a.txt", b"hello")
        ...     (Path(folder) / "a.txt").read_text()
        'hello'
    """
    target = _absolute(target)
    temporary = _sibling(target, _TEMPORARY)
    if not callable(content):
        size = sum(len(piece) for piece in pieces_of(content))
    with _told(target, size or 0, fs), fs.locked(target.parent) as alone, ExitStack() as stack:
        stack.callback(_remove_quietly, temporary, fs)
        if alone:  # the whole of it is done under this lock, so that any other one was left by a dead writer
            for stale in _leftovers(target, _TEMPORARY, fs):
                fs.remove_tree(stale)
        if callable(content):
            content(temporary)
        else:
            fs.write_bytes(temporary, content)
        fs.rename(temporary, target)
        fs.fsync_folder(target.parent)


def discard(target: Path, *, fs: FileSystem = REAL) -> None:
    """Remove a folder so that at no moment a half of it stands under its name; nothing where it is not there.

    Raises:
        OSError: If the disk refuses; `sweep`, or the next commit of the same name, removes what is left.
    """
    target = _absolute(target)
    temporary = _sibling(target, _TEMPORARY)
    with fs.locked(target.parent):
        if not fs.exists(target):
            return
        fs.rename(target, temporary)
    fs.remove_tree(temporary)


def sweep(folder: Path, *, fs: FileSystem = REAL) -> None:
    """Put in order what dead writers left in a folder that holds artefacts of ours alone.

    Raises:
        OSError: If the disk refuses.
    """
    if not fs.is_folder(folder):
        return
    with fs.locked(folder) as alone:
        marks = (f".{_TEMPORARY}-", f".{_ASIDE}-")
        names = {name[1:].rpartition(mark)[0] for name in fs.list_folder(folder) for mark in marks if mark in name}
        for name in sorted(names - {""}):
            _sweep(_absolute(folder) / name, fs, alone)


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
    aside = _leftovers(target, _ASIDE, fs)
    return aside[-1] if aside else target


def read_steadily(target: str | Path, read: Callable[[Path], Read], *, fs: FileSystem = REAL) -> Read:
    """Return what a function reads from a folder; it is asked again where the folder was replaced meanwhile.

    Args:
        target: The folder.
        read: Reads the folder that it is given, and compares it with its manifest.
        fs: Where it lies.

    Raises:
        VeneerError, OSError: Whatever `read` raises of a folder that stays.

    Example:
        >>> read_steadily(".", lambda folder: folder.name)
        ''
    """
    for attempt in range(_TRIES):
        found = readable_folder(target, fs=fs)
        before = fs.identity(found)
        try:
            return read(found)
        except (VeneerError, OSError):
            now = readable_folder(target, fs=fs)
            if before is not None and (now, fs.identity(now)) == (found, before):
                raise  # it is what it was: the fault is in it
        time.sleep(attempt / 1000)
    return read(readable_folder(target, fs=fs))


@contextmanager
def _told(target: Path, size: int, fs: FileSystem) -> Iterator[None]:
    """Turn what the disk says into an error that says what to do."""
    try:
        yield
    except OSError as cause:
        message = f"{target}: could not be written: {cause}"
        if cause.errno in _NO_ROOM:
            with suppress(OSError):
                free = fs.free_bytes(target.parent)
                message += f"; it takes {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there; make room"
        raise OutputError(message) from cause


def _fill(folder: Path, write: Writer, kind: str, notes: Notes, fs: FileSystem) -> tuple[Manifest, Collection[str]]:
    """Write all files and then the manifest into a new folder, and wait until they are on the disk.

    Returns:
        The manifest, and of which files the writer told the hashes.
    """
    told: Mapping[str, FileRecord] = {}
    if callable(write):
        told = write(folder) or {}
        records = _record_written(folder, told, fs)
    else:
        records = _fill_by_name(folder, write, fs)
    manifest = Manifest(kind, records, dict(notes() if callable(notes) else notes))
    fs.write_bytes(folder / MANIFEST, dump_manifest(manifest))
    for inner in fs.list_folders(folder):
        fs.fsync_folder(inner)
    return manifest, told.keys()


def _fill_by_name(folder: Path, contents: Mapping[str, Content], fs: FileSystem) -> dict[str, FileRecord]:
    """Write contents; other threads hash them meanwhile, in memory: they never meet the disk."""
    _check_names(contents)
    with ThreadPoolExecutor(2) as hashing:
        try:
            pending = {name: hashing.submit(record_content, contents[name]) for name in sorted(contents)}
        except (RuntimeError, MemoryError):  # no room for a thread: where memory is short, what is saved is needed
            pending = {}
        for name, content in contents.items():
            fs.make_parents((folder / name).parent)
            fs.write_bytes(folder / name, content)
        return {name: _hashed(contents[name], pending.get(name)) for name in sorted(contents)}


def _hashed(content: Content, pending: Future[FileRecord] | None) -> FileRecord:
    """Return the hash that a thread made; a thread whose own heap found no room is done without.

    It may say so in many words (OpenSSL: "no reason supplied"). Whatever else is wrong comes up again here.
    """
    if pending is not None:
        with suppress(Exception):
            return pending.result()
    return record_content(content)


def _record_written(folder: Path, told: Mapping[str, FileRecord], fs: FileSystem) -> dict[str, FileRecord]:
    """Return what a manifest says of the files that a function wrote."""
    names = fs.list_files(folder)
    _check_names(names)
    records = {}
    for name in names:
        if not fs.is_plain_file(folder / name):
            raise OutputError(f"{name}: only regular files can be committed, got a link or a device")
        fs.fsync_file(folder / name)
        # What was hashed on its way is compared with the disk when the folder is read back.
        records[name] = told.get(name) or FileRecord(*fs.measure(folder / name))
    return records


def _read_back(target: Path, manifest: Manifest, write: Writer, known: Collection[str], fs: FileSystem) -> None:
    """Raise unless the disk gives back what was written: equal to the memory it came from, where there is one."""
    if callable(write):
        found = _verified(target, manifest.files.keys() - known, fs)
        wrong = [name for name in sorted(known) if fs.size_of(target / name) != manifest.files[name].bytes]
    else:
        found = read_manifest(target, fs=fs)
        wrong = [name for name, one in write.items() if not fs.holds(target / name, one)]
    problems = [] if found == manifest else [f"{MANIFEST}: not what was written"]
    problems += [f"{name}: not what was written" for name in wrong]
    if fs.list_files(target) != sorted([*manifest.files, MANIFEST]):
        problems.append("there are more or fewer files than were written")
    if problems:
        raise DamagedArtefactError(f"{target}: {NOT_GIVEN_BACK}", problems)


def _verified(target: Path, names: Collection[str], fs: FileSystem) -> Manifest | None:
    try:
        return verify_folder(target, names, fs=fs)
    except DamagedArtefactError as error:
        raise DamagedArtefactError(f"{target}: {NOT_GIVEN_BACK}", error.problems) from None


def _swap(temporary: Path, target: Path, replace: bool, fs: FileSystem, read_back: Callable[[], None]) -> None:
    """Give the new folder its name, read it back, and only then remove the old one."""
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
        read_back()
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


def _sweep(target: Path, fs: FileSystem, alone: bool | None) -> None:
    """Bring back what a dead writer put aside, and remove what else dead writers left; the parent is locked.

    Where it could not be locked nobody knows who is dead, and all stays as it is.
    """
    if not alone:
        return
    aside = _leftovers(target, _ASIDE, fs)
    if aside and not _is_sound(target, fs):
        best = next((path for path in reversed(aside) if _is_sound(path, fs)), None)
        if best is None and not fs.exists(target):
            best = aside[-1]  # damaged, but all there is
        if best is not None:
            if fs.exists(target):
                fs.rename(target, _sibling(target, _TEMPORARY))
            fs.rename(best, target)
            fs.fsync_folder(target.parent)
        aside = []  # nothing is removed as long as what stands in its place is not known to be sound
    for path in aside:
        fs.rename(path, _sibling(target, _TEMPORARY))
    for path in _leftovers(target, _TEMPORARY, fs):
        if _is_left(path, fs):
            fs.remove_tree(path)


def _is_sound(folder: Path, fs: FileSystem) -> bool:
    """Tell whether a folder is what its manifest vouches for, or is there and has none."""
    try:
        verify_folder(folder, fs=fs)
    except DamagedArtefactError:
        return False
    return fs.is_folder(folder)


def _is_left(path: Path, fs: FileSystem) -> bool:
    """Tell whether nobody holds what looks like a writer's temporary folder or file."""
    if not fs.is_folder(path):
        return True  # files are written under the lock of their folder, which we hold
    with suppress(FileNotFoundError), fs.locked(path, wait=False) as held:
        return bool(held)
    return False


def _check_target(target: Path, replace: bool, fs: FileSystem) -> None:
    if not fs.exists(target):
        return
    if not fs.is_folder(target):
        raise OutputError(f"{target}: expected a folder to write, but a file is there; choose another name")
    if not replace:
        raise OutputError(f"{target}: exists already; choose another name, or replace it with replace=True")


def _check_names(names: Mapping[str, Content] | list[str]) -> None:
    problems = [f"{name!r}: not a relative name inside the folder" for name in names if not is_safe_name(name)]
    problems += [f"{name!r}: written by the commit itself" for name in names if name == MANIFEST]
    if problems:
        raise OutputError("files cannot be committed under these names", problems)


def _absolute(target: str | Path) -> Path:
    return Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link that is to be replaced


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(8)}"


def _leftovers(target: Path, role: str, fs: FileSystem) -> list[Path]:
    """Return what commits of this target have beside it in a role, sorted."""
    prefix = f".{target.name}.{role}-"
    if not fs.is_folder(target.parent):
        return []
    return [target.parent / name for name in fs.list_folder(target.parent) if name.startswith(prefix)]


def _remove_quietly(path: Path, fs: FileSystem) -> None:
    with suppress(OSError):
        if fs.exists(path):
            fs.remove_tree(path)
