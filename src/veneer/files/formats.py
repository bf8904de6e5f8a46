"""The formats of adapter files: one row each, and how to tell which one files are of.

A new format is a module with a `Format` and a row here; the round-trip tests pick it up.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.adapter import Adapter
from veneer.errors import AdapterError
from veneer.files import diffusers, gguf_lora, kohya, loralib, mlx, pickles, torchtune
from veneer.files.commit import readable_folder
from veneer.files.filesystem import REAL, Content, FileSystem
from veneer.files.foreign import SUFFIX
from veneer.files.format import Format, Hints, Sight
from veneer.files.peft import adapter_to_files, load_adapter
from veneer.files.peft_folder import CONFIG, MAX_CONFIG, TENSORS
from veneer.files.peft_other import METHODS, OtherAdapter, read_other
from veneer.files.strict_json import parse_json
from veneer.files.tensors import header_length, parse_header
from veneer.names import did_you_mean

_LENGTH = 8
_MEANT = (TENSORS, "adapters.safetensors", diffusers.FILE)
"""Safetensors files that are the one meant where several lie in a folder; else the only one is."""
_SHOWN = 4


def _is_peft(sight: Sight) -> bool:
    return "peft_type" in sight.config and TENSORS in sight.files


def _read_peft(path: Path, hints: Hints) -> Adapter | OtherAdapter:
    if see(path).config.get("peft_type") not in METHODS:
        return load_adapter(path)
    shapes = None
    if hints.base is not None:
        shapes = {name.removesuffix(".weight"): shape for name, shape in hints.base.shapes.items()}
    return read_other(path, shapes=shapes)


def _write_peft(adapter: Adapter, hints: Hints) -> Mapping[str, Content]:  # noqa: ARG001 (one signature for all)
    return adapter_to_files(adapter)


PEFT = Format(
    name="peft",
    title=f"a folder with {CONFIG} and {TENSORS}",
    recognise=_is_peft,
    read=_read_peft,
    write=_write_peft,
)
"""PEFT's layout, which is ours too."""

_ROWS = (
    PEFT,
    pickles.FORMAT,
    kohya.FORMAT,
    diffusers.FORMAT,
    mlx.FORMAT,
    gguf_lora.FORMAT,
    loralib.FORMAT,
    loralib.PICKLE,
    torchtune.FORMAT,
    torchtune.PICKLE,
)
FORMATS: Mapping[str, Format] = MappingProxyType({one.name: one for one in _ROWS})
"""Every format by its name."""


def see(path: str | Path, *, fs: FileSystem = REAL) -> Sight:
    """Return what can be seen of an adapter's files without reading their values.

    Args:
        path: A file or a folder.
        fs: Where it lies.

    Raises:
        AdapterError: If nothing is there, or a header or a configuration is malformed.

    Cost:
        Reads the header of one safetensors file, and `adapter_config.json`.

    Example:
        see("pytorch_lora_weights.safetensors").keys
    """
    path = readable_folder(path, fs=fs)
    if not fs.exists(path):
        near = did_you_mean(path.name, fs.list_folder(path.parent)) if fs.is_folder(path.parent) else ""
        raise AdapterError(f"{path}: expected an adapter's file or folder, found nothing{near}")
    folder = fs.is_folder(path)
    files = tuple(fs.list_folder(path)) if folder else (path.name,)
    config: dict[str, Any] = {}
    try:
        if folder and CONFIG in files:
            config = parse_json(fs.read_bytes(path / CONFIG, MAX_CONFIG), str(path / CONFIG), max_bytes=MAX_CONFIG)
        file = _meant(path, files, fs) if folder else path if _is_safetensors(path, fs) else None
        keys, metadata = _header(file, fs) if file else ((), {})
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG}: expected a JSON object, got {type(config).__name__}")
    return Sight(path, files, keys, MappingProxyType(metadata), MappingProxyType(config))


def recognise(path: str | Path, formats: Mapping[str, Format] = FORMATS, *, fs: FileSystem = REAL) -> Format:
    """Return the format of an adapter's files.

    Args:
        path: A file or a folder.
        formats: Those that are tried.
        fs: Where it lies.

    Raises:
        AdapterError: If they are of no format, or could be of several: which, and what to say.

    Example:
        recognise("lora.safetensors").name
    """
    sight = see(path, fs=fs)
    found = [one for one in formats.values() if one.recognise(sight)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(one.name for one in found)
        raise AdapterError(f"{path}: could be of the format {names}; say which with --from")
    seen = ", ".join([*map(repr, sight.keys[:_SHOWN]), *(["…"] if len(sight.keys) > _SHOWN else [])])
    what = f"its tensors are {seen}" if sight.keys else f"it holds {', '.join(sight.files[:8]) or 'nothing'}"
    if sight.path.name in (TENSORS, pickles.PEFT_BIN) and fs.exists(sight.path.parent / CONFIG):
        raise AdapterError(f"{path}: is a part of the folder {sight.path.parent}, which says what it is; name that")
    if any(name.endswith(pickles.SUFFIXES) for name in sight.files) and not sight.keys:
        names = ", ".join(one.name for one in formats.values() if one.is_pickle)
        raise AdapterError(
            f"{path}: a pickle, and what wrote it cannot be seen before it is opened; say it: --from {names}"
        )
    raise AdapterError(
        f"{path}: of no format that is known ({what}); name one with --from if it is",
        [f"{one.name}: {one.title}" for one in formats.values()],
    )


def list_formats() -> tuple[Format, ...]:
    """Return every format: its name, its title, how it is read and written.

    Example:
        >>> "kohya" in [one.name for one in list_formats()]
        True
    """
    return tuple(FORMATS.values())


def find_format(name: str, formats: Mapping[str, Format] = FORMATS) -> Format:
    """Return a format by its name.

    Raises:
        AdapterError: If there is none of this name.

    Example:
        >>> find_format("peft").name
        'peft'
    """
    if name not in formats:
        raise AdapterError(f"{name!r}: no such format{did_you_mean(name, formats)}; there are {', '.join(formats)}")
    return formats[name]


def _meant(folder: Path, files: Collection[str], fs: FileSystem) -> Path | None:
    held = [name for name in files if name.endswith(SUFFIX) and fs.is_plain_file(folder / name)]
    name = next((name for name in _MEANT if name in held), held[0] if len(held) == 1 else None)
    return None if name is None else folder / name


def _is_safetensors(path: Path, fs: FileSystem) -> bool:
    """Tell by a file's name, or by its first bytes: the length of a header, and a bracket."""
    if path.name.endswith(SUFFIX):
        return True
    return fs.size_of(path) > _LENGTH and bytes(fs.read_range(path, _LENGTH, 1)) == b"{"


def _header(path: Path, fs: FileSystem) -> tuple[tuple[str, ...], dict[str, str]]:
    size = fs.size_of(path)
    first = bytes(fs.read_range(path, 0, min(_LENGTH, size)))
    length = header_length(first, str(path), size)
    header, _ = parse_header(first + bytes(fs.read_range(path, _LENGTH, length)), str(path), size)
    metadata = header.pop("__metadata__", None) or {}
    return tuple(sorted(header)), metadata
