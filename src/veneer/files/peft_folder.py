"""The folder of an adapter of any of PEFT's methods: its two files, read whole or refused with the reason."""

import shlex
from pathlib import Path

from veneer.errors import AdapterError
from veneer.files.commit import Manifest, read_steadily
from veneer.files.filesystem import FileSystem
from veneer.files.manifest import read_verified
from veneer.names import did_you_mean

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What every key of a module's tensors begins with."""
MAX_CONFIG = 8 << 20

_PICKLE = "adapter_model.bin"
_OTHERS = "`veneer check` tells what it is, `veneer convert` reads other programs' files"


def read_folder(folder: str | Path, *, max_bytes: int, fs: FileSystem) -> tuple[dict[str, bytes], Manifest | None]:
    """Return the bytes of an adapter's two files by name, and the manifest that vouches for them, if there is one.

    Args:
        folder: The folder.
        max_bytes: Longest file that is read.
        fs: Where it lies.

    Raises:
        AdapterError: If there is no such folder, a file is missing or cannot be read.
        DamagedArtefactError: If it has a manifest and does not match it.
    """
    return read_steadily(folder, lambda found: _read(found, str(folder), max_bytes, fs), fs=fs)


def _read(found: Path, folder: str, max_bytes: int, fs: FileSystem) -> tuple[dict[str, bytes], Manifest | None]:
    if not fs.is_folder(found):
        if fs.exists(found):
            raise AdapterError(f"{folder}: expected an adapter's folder, found a file; {_OTHERS}")
        beside = (
            [str(found.parent / name) for name in fs.list_folder(found.parent)] if fs.is_folder(found.parent) else []
        )
        raise AdapterError(f"{folder}: expected an adapter's folder, found nothing{did_you_mean(str(found), beside)}")
    present = fs.list_folder(found)
    missing = [name for name in (CONFIG, TENSORS) if name not in present]
    if TENSORS in missing and _PICKLE in present:
        raise AdapterError(
            f"{folder}: holds {_PICKLE} but no {TENSORS}; a pickle can run any code, so it is not read."
            f" Where you trust it: veneer convert {shlex.quote(folder)} --to peft --out NEW --allow-pickle"
        )
    if missing:
        problems = [f"{name}: missing{did_you_mean(name, present)}" for name in missing]
        raise AdapterError(f"{folder}: not an adapter's folder in PEFT's layout; {_OTHERS}", problems)
    try:
        return read_verified(found, (CONFIG, TENSORS), max_bytes=max_bytes, fs=fs)
    except OSError as cause:
        raise AdapterError(f"{folder}: cannot be read: {cause}") from cause
