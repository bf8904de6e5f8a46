"""MANIFEST.json: what an artefact's folder must hold, by size and SHA-256.

It is written last, so a folder that has one was written whole.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import DamagedArtefactError
from veneer.files.filesystem import REAL, Content, FileSystem, pieces_of
from veneer.files.strict_json import dump_json, parse_json
from veneer.names import did_you_mean

MANIFEST = "MANIFEST.json"
VERSION = 1
_MAX_BYTES = 16 << 20
_HEX = re.compile(r"[0-9a-f]{64}")
_WHAT_TO_DO = "restore the folder, or remove MANIFEST.json if the change was meant"


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file.

    Args:
        bytes: Its size.
        sha256: Its SHA-256 in lower-case hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder vouches for.

    Args:
        kind: What the artefact is, such as `adapter`.
        files: Relative name to size and hash; the manifest itself is not among them.
        notes: What the writer says about the artefact.
        version: Version of the manifest's own format.
    """

    kind: str
    files: Mapping[str, FileRecord]
    notes: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION


def is_safe_name(name: str) -> bool:
    """Tell whether a relative file name stays in its folder, on every system.

    Example:
        >>> [is_safe_name(name) for name in ("a/b.json", "../b", "/b", "a//b", "c:b")]
        [True, False, False, False, False]
    """
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not re.search(r'[\x00-\x1f\\:*?"<>|]', name)


def record_content(content: Content) -> FileRecord:
    """Return the size and hash of a file's content.

    Example:
        >>> record_content([b"a", b"bc"]).bytes
        3
    """
    sha, size = hashlib.sha256(), 0
    for piece in pieces_of(content):
        sha.update(piece)
        size += len(piece)
    return FileRecord(size, sha.hexdigest())


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the text of a manifest; it holds no time, so equal artefacts have equal manifests.

    Example:
        >>> parse_manifest(dump_manifest(Manifest("adapter", {})), "MANIFEST.json").kind
        'adapter'
    """
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in manifest.files.items()}
    return dump_json(
        {"version": manifest.version, "kind": manifest.kind, "notes": dict(manifest.notes), "files": files}
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that a text stands for.

    Raises:
        DamagedArtefactError: If it is not one; every problem is listed.
    """
    raw = parse_json(data, where, max_bytes=_MAX_BYTES, error=DamagedArtefactError)
    if not isinstance(raw, dict) or set(raw) != {"version", "kind", "notes", "files"}:
        raise DamagedArtefactError(f"{where}: expected an object of version, kind, notes and files")
    version, kind, notes, files = raw["version"], raw["kind"], raw["notes"], raw["files"]
    if type(version) is not int or version != VERSION:
        raise DamagedArtefactError(f"{where}: expected manifest version {VERSION}, got {version!r}; update Veneer")
    if not isinstance(kind, str) or not isinstance(notes, dict) or not isinstance(files, dict):
        raise DamagedArtefactError(f"{where}: expected kind to be a string, notes and files to be objects")
    problems = [f"{name!r}: {problem}" for name, entry in files.items() if (problem := _entry_problem(name, entry))]
    if problems:
        raise DamagedArtefactError(f"{where}: {len(problems)} entries cannot be used", problems)
    records = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    return Manifest(kind, records, notes, version)


def read_manifest(folder: str | Path, *, fs: FileSystem = REAL) -> Manifest | None:
    """Return the manifest of a folder, or None where it has none.

    Raises:
        DamagedArtefactError: If there is one that cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not fs.exists(path):
        return None
    try:
        data = fs.read_bytes(path, _MAX_BYTES)
    except OSError as cause:
        raise DamagedArtefactError(f"{path}: cannot be read: {cause}") from cause
    return parse_manifest(data, str(path))


def unknown_files(folder: str | Path, *, fs: FileSystem = REAL) -> list[str]:
    """Return the names of what a folder holds and its manifest does not know: of all, where it has none that is whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "mine.txt").write_text("x")
        ...     unknown_files(folder)
        ['mine.txt']
    """
    try:
        manifest = read_manifest(folder, fs=fs)
    except DamagedArtefactError:
        manifest = None
    known = {MANIFEST, *manifest.files} if manifest is not None else set()
    return sorted(set(fs.list_files(Path(folder))) - known)


def verify_folder(folder: str | Path, only: Collection[str] | None = None, *, fs: FileSystem = REAL) -> Manifest | None:
    """Compare a folder with its manifest, every byte.

    Args:
        folder: The folder.
        only: Names to look at; None means all, and then files that the manifest does not know are a problem too.
        fs: Where it lies.

    Returns:
        The manifest, or None where the folder has none.

    Raises:
        DamagedArtefactError: Listing every file that is missing, changed or not vouched for.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, fs=fs)
    if manifest is None:
        return None
    problems = []
    for name in sorted(manifest.files if only is None else only):
        record = manifest.files.get(name)
        if record is None:
            problems.append(_not_vouched_for(name, manifest))
            continue
        try:
            problems += _differences(name, record, FileRecord(*fs.measure(folder / name)))
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as cause:
            problems.append(f"{name}: cannot be read: {cause}")
    if only is None:
        extra = sorted(set(fs.list_files(folder)) - set(manifest.files) - {MANIFEST})
        problems += [_not_vouched_for(name, manifest) for name in extra]
    _refuse(folder, problems)
    return manifest


def read_verified(
    folder: str | Path, names: Collection[str], *, max_bytes: int | None = None, fs: FileSystem = REAL
) -> tuple[dict[str, bytes], Manifest | None]:
    """Read files once each and compare what was read with the manifest, where there is one.

    What is returned is what was hashed: nothing can change a file in between.

    Args:
        folder: The folder.
        names: Names of files in it.
        max_bytes: Longest file.
        fs: Where it lies.

    Raises:
        DamagedArtefactError: If a file is not what the manifest says.
        OSError: If a file cannot be read or is too long.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, fs=fs)
    content = {name: fs.read_bytes(folder / name, max_bytes) for name in names}
    if manifest is not None:
        problems = []
        for name, data in content.items():
            record = manifest.files.get(name)
            if record is None:
                problems.append(_not_vouched_for(name, manifest))
            else:
                problems += _differences(name, record, record_content(data))
        _refuse(folder, problems)
    return content, manifest


def _entry_problem(name: str, entry: Any) -> str | None:
    if not is_safe_name(name) or name == MANIFEST:
        return "not a name of a file in the folder"
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        return "expected an object of bytes and sha256"
    if type(entry["bytes"]) is not int or entry["bytes"] < 0:
        return f"bytes must be a size, got {entry['bytes']!r}"
    if not isinstance(entry["sha256"], str) or not _HEX.fullmatch(entry["sha256"]):
        return "sha256 must be 64 lower-case hexadecimal digits"
    return None


def _differences(name: str, expected: FileRecord, got: FileRecord) -> list[str]:
    if expected.bytes != got.bytes:
        return [f"{name}: expected {expected.bytes} bytes, got {got.bytes}"]
    if expected.sha256 != got.sha256:
        return [f"{name}: expected SHA-256 {expected.sha256[:12]}…, got {got.sha256[:12]}…"]
    return []


def _not_vouched_for(name: str, manifest: Manifest) -> str:
    return f"{name}: the manifest does not know it{did_you_mean(name, manifest.files)}"


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise DamagedArtefactError(f"{folder}: not what its {MANIFEST} vouches for; {_WHAT_TO_DO}", problems)
