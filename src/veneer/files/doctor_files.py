"""What can be seen of an adapter's files from outside: what is there, what it is, and whose."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import DamagedArtefactError, VeneerError
from veneer.files.doctor_codes import Finding
from veneer.files.filesystem import FileSystem
from veneer.files.formats import FORMATS, PEFT, recognise
from veneer.files.manifest import MANIFEST, read_manifest
from veneer.files.peft_folder import CONFIG, TENSORS
from veneer.names import did_you_mean

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE = "adapter_model.bin"
_MARKS = (b"\x80", b"PK\x03\x04")
"""The first bytes of a pickle, and of the archive that torch puts one in."""
_TRAINER = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt")
"""A trainer's own state, which is no part of the adapter."""
_MAX_NAMES = 1000


@dataclass(frozen=True)
class Place:
    """What is seen of a path from outside.

    Args:
        path: The file or folder.
        name: What the user called it.
        is_folder: Whether it is a folder.
        exists: Whether it is anything.
        names: What is in the folder.
        files: Names of the regular files in it.
        format: The format that its files are in, where it is none of PEFT's; empty where it is not known.
        pickles: Files that are pickles, by name or by their first bytes.
        problem: Why it cannot be looked at.
        fs: Where it lies.
    """

    path: Path
    name: str
    is_folder: bool
    exists: bool
    names: tuple[str, ...]
    files: tuple[str, ...]
    format: str
    pickles: tuple[str, ...]
    problem: str
    fs: FileSystem


def look(path: Path, name: str, fs: FileSystem) -> Place:
    """Return what is seen of a path.

    Example:
        >>> from veneer.files.filesystem import REAL
        >>> look(Path("no/such"), "no/such", REAL).exists
        False
    """
    is_folder, problem = False, ""
    names: tuple[str, ...] = ()
    try:
        is_folder = fs.is_folder(path)
        names = tuple(fs.list_folder(path)[:_MAX_NAMES]) if is_folder else ()
    except (OSError, ValueError) as error:
        problem = str(error)
    own = [path / one for one in names] if is_folder else [path]
    files = tuple(one.name for one in own if _is_file(one, fs))
    pickles = tuple(one.name for one in own if one.name in files and one.name not in _TRAINER and _is_pickle(one, fs))
    exists = not problem and (is_folder or fs.exists(path))
    found = "" if not exists else _format(path, fs)
    return Place(path, name, is_folder, exists, names, files, found, pickles, problem, fs)


def convert_command(place: Place, *, to: str = "peft", pickle: bool = False) -> str:
    """Return the command that makes PEFT's layout of other files; what only the user knows stands in capitals."""
    name = place.name.rstrip("/") or place.name
    out = name if place.is_folder else str(Path(name).with_suffix(""))
    more = list(FORMATS[place.format].needs) if place.format else []
    if pickle:
        # What wrote a pickle cannot be seen without opening it, but for PEFT's by what lies beside it.
        more = ["--allow-pickle"] if CONFIG in place.names else ["--from FORMAT", "--allow-pickle"]
    start = f"veneer convert {shlex.quote(name)} --to {to} --out {shlex.quote(f'{out}-{to}')}"
    return " ".join([start, *more])


def is_there(place: Place) -> Iterator[Finding]:
    """Find a path that is nothing, or nothing that can be looked at."""
    if place.problem or not place.exists:
        yield Finding("V101", place.name, place.problem or "no such file or folder")
    elif not place.is_folder and not place.format and not place.pickles:
        command = None
        if place.path.name == TENSORS and _is_file(place.path.parent / CONFIG, place.fs):
            command = f"veneer check {shlex.quote(str(place.path.parent))}"
        yield Finding("V102", place.name, f"a single file; expected a folder with {CONFIG} and {TENSORS}", command)


def whose(place: Place) -> Iterator[Finding]:
    """Find files of another program."""
    if place.format and not {CONFIG, TENSORS} <= set(place.names):
        yield Finding("V106", place.name, f"files in the format {place.format!r}", convert_command(place))


def complete(place: Place) -> Iterator[Finding]:
    """Find a lacking file."""
    if not place.is_folder or place.problem or place.format:
        return
    for name in (CONFIG, TENSORS):
        if name not in place.names and not (name == TENSORS and place.pickles):
            yield Finding("V102", place.name, f"{name}: missing{did_you_mean(name, place.names)}")


def regular(place: Place) -> Iterator[Finding]:
    """Find what is no file where one is expected, or too long a one."""
    for name in (CONFIG, TENSORS):
        if name in place.names and name not in place.files:
            yield Finding("V103", name, "a folder, pipe, device or broken link; expected a file")


def pickled(place: Place) -> Iterator[Finding]:
    """Find pickles: in the place of the tensors, or beside them."""
    is_alone = TENSORS not in place.names
    formats = ", ".join(one.name for one in FORMATS.values() if one.is_pickle)
    unknown = "" if CONFIG in place.names else f"; what wrote it cannot be seen, FORMAT is one of {formats}"
    for name in place.pickles:
        if is_alone or name == TENSORS or not place.is_folder:
            yield Finding(
                "V104", name, f"a pickle, by its name or its first bytes{unknown}", convert_command(place, pickle=True)
            )
        elif name == _PICKLE:
            yield Finding("V105", name, f"a pickle beside {TENSORS}, which alone is read")


def vouched(place: Place) -> Iterator[Finding]:
    """Find other files of the folder that are not what its manifest says."""
    if MANIFEST not in place.files:
        return
    try:
        manifest = read_manifest(place.path, fs=place.fs)
    except DamagedArtefactError:  # `load_adapter` says so
        return
    known = manifest.files if manifest is not None else {}
    own = (CONFIG, TENSORS, MANIFEST)
    for name, record in known.items():
        path = place.path / name
        if name in own:
            continue
        if not _is_file(path, place.fs):
            yield Finding("V108", name, "missing, or no regular file")
        elif place.fs.size_of(path) != record.bytes or place.fs.measure(path)[1] != record.sha256:
            yield Finding("V108", name, "not what the manifest says")
    for name in sorted(set(place.files) - set(known) - set(own)):
        yield Finding("V108", name, f"the manifest does not know it{did_you_mean(name, known)}")


FILE_CHECKS: tuple[Callable[[Place], Iterator[Finding]], ...] = (is_there, whose, complete, regular, pickled, vouched)
"""What is looked for in the files from outside; a new one is a function and its name here."""


def _is_file(path: Path, fs: FileSystem) -> bool:
    try:
        return path.is_file() and fs.size_of(path) >= 0
    except (OSError, ValueError):
        return False


def _is_pickle(path: Path, fs: FileSystem) -> bool:
    return path.suffix in _PICKLES or _first(path, fs).startswith(_MARKS)


def _first(path: Path, fs: FileSystem) -> bytes:
    try:
        return bytes(fs.read_range(path, 0, min(8, fs.size_of(path))))
    except OSError:
        return b""


def _format(path: Path, fs: FileSystem) -> str:
    """Return the format of files that are not PEFT's and no pickle; else nothing."""
    try:
        found = recognise(path, fs=fs)
    except (VeneerError, OSError):
        return ""
    return "" if found is PEFT or found.is_pickle else found.name
