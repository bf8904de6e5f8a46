"""A checkpoint's safetensors files, read tensor by tensor: nothing is held but what is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BaseModelError
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.strict_json import parse_json
from veneer.files.tensors import header_length, parse_header
from veneer.names import did_you_mean

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
MAX_INDEX = 64 << 20
_METADATA = "__metadata__"
_LENGTH = 8

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Torch's dtype for each of the format's names."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a checkpoint.

    Args:
        file: Name of its file.
        dtype: In the format's words, a key of `DTYPES`.
        shape: Its shape.
        start: Its first byte in the file.
        size: In bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """What a folder of safetensors files holds, by its headers alone.

    Args:
        folder: The folder.
        tensors: Name to place, in the order of the files and of the bytes within each.
        metadata: File name to what its header says besides.
        config: What `config.json` says; empty without one.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name."""
        return {name: one.shape for name, one in self.tensors.items()}


def read_checkpoint(folder: str | Path, *, fs: FileSystem = REAL) -> Checkpoint:
    """Read the headers of a checkpoint: of `model.safetensors`, or of the files that its index names.

    Raises:
        BaseModelError: If there is none, or a file that the index names lacks what it says; every problem is listed.
        AdapterError: If a file is malformed.

    Cost:
        Reads headers, no values.

    Example:
        read_checkpoint("models/llama").tensors["lm_head.weight"].shape
    """
    folder = Path(folder)
    present = fs.list_folder(folder) if fs.is_folder(folder) else []
    if INDEX in present:
        files = _files_of_index(folder, fs)
    elif WEIGHTS in present:
        files = {WEIGHTS: None}
    else:
        raise BaseModelError(
            f"{folder}: expected a folder with {WEIGHTS} or {INDEX}, found neither{did_you_mean(WEIGHTS, present)}"
        )
    tensors: dict[str, StoredTensor] = {}
    metadata, problems = {}, []
    for file, promised in files.items():
        if file not in present:
            problems.append(f"{file}: named by {INDEX}, but missing{did_you_mean(file, present)}")
            continue
        found, metadata[file] = _read_file(folder, file, fs)
        problems += [f"{name!r}: in {file} and in {tensors[name].file}" for name in found if name in tensors]
        if promised is not None:
            problems += [f"{name!r}: {INDEX} says it is in {file}; it is not" for name in sorted(promised - set(found))]
            problems += [f"{name!r}: in {file}, but not named by {INDEX}" for name in found if name not in promised]
        tensors |= found
    if problems:
        raise BaseModelError(f"{folder}: its files are not what its index says", problems)
    config = _json(folder / CONFIG, fs) if CONFIG in present else {}
    return Checkpoint(folder, MappingProxyType(tensors), MappingProxyType(metadata), MappingProxyType(config))


def read_tensor(checkpoint: Checkpoint, name: str, *, fs: FileSystem = REAL) -> Tensor:
    """Return one tensor, in memory of its own.

    Raises:
        BaseModelError: If the checkpoint holds none of this name, or it cannot be read.

    Example:
        read_tensor(read_checkpoint("models/llama"), "lm_head.weight")
    """
    place = checkpoint.tensors.get(name)
    if place is None:
        raise BaseModelError(f"{checkpoint.folder}: holds no {name!r}{did_you_mean(name, checkpoint.tensors)}")
    try:
        data = fs.read_range(checkpoint.folder / place.file, place.start, place.size)
    except OSError as cause:
        raise BaseModelError(f"{checkpoint.folder / place.file}: {name!r} cannot be read: {cause}") from cause
    if not place.size:
        return torch.empty(place.shape, dtype=DTYPES[place.dtype])
    return torch.frombuffer(data, dtype=DTYPES[place.dtype]).reshape(place.shape)


def _files_of_index(folder: Path, fs: FileSystem) -> dict[str, set[str] | None]:
    """Return the files that an index names, in its order of names, with the tensors that it promises in each."""
    held = _json(folder / INDEX, fs)
    places = held.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise BaseModelError(f"{folder / INDEX}: expected `weight_map`, from tensors to files")
    if unsafe := sorted({file for file in places.values() if Path(file).name != file}):
        raise BaseModelError(f"{folder / INDEX}: names files outside of the folder", unsafe)
    files: dict[str, set[str] | None] = {file: set() for file in sorted(set(places.values()))}
    for name, file in places.items():
        promised = files[file]
        if promised is not None:
            promised.add(name)
    return files


def _read_file(folder: Path, file: str, fs: FileSystem) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    path = folder / file
    try:
        size = fs.size_of(path)
        first = bytes(fs.read_range(path, 0, min(_LENGTH, size)))
        length = header_length(first, str(path), size)
        header, start = parse_header(first + bytes(fs.read_range(path, _LENGTH, length)), str(path), size)
    except OSError as cause:
        raise BaseModelError(f"{path}: cannot be read: {cause}") from cause
    metadata = header.pop(_METADATA, None) or {}
    by_place = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    tensors = {
        name: StoredTensor(file, one["dtype"], tuple(one["shape"]), start + begin, end - begin)
        for name, one in by_place
        for begin, end in [one["data_offsets"]]
    }
    return tensors, metadata


def _json(path: Path, fs: FileSystem) -> dict[str, Any]:
    try:
        held = parse_json(fs.read_bytes(path, MAX_INDEX), str(path), max_bytes=MAX_INDEX, error=BaseModelError)
    except OSError as cause:
        raise BaseModelError(f"{path}: cannot be read: {cause}") from cause
    if not isinstance(held, dict):
        raise BaseModelError(f"{path}: expected an object of JSON, got {type(held).__name__}")
    return held
