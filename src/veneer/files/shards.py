"""A checkpoint's safetensors files, read and written tensor by tensor: nothing is held but what is asked for."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import BaseModelError
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import FileRecord
from veneer.files.pieces import BLOCK, OnBytes, ahead, blocks, write_pieces
from veneer.files.strict_json import parse_json
from veneer.files.tensors import DTYPE_NAMES, DTYPES, dump_header, header_length, parse_header
from veneer.names import did_you_mean

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_STEMS = ("model", "diffusion_pytorch_model")
"""How the weights of transformers are named, and those of diffusers' U-Nets and transformers."""
MAX_INDEX = 64 << 20
_ROOM = 4 << 20
"""How long a part may be that is read to where another one was."""
_METADATA = "__metadata__"
_LENGTH = 8


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
        index: Name of the index that names the files, where there is one.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any]
    index: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name."""
        return {name: one.shape for name, one in self.tensors.items()}


def read_checkpoint(folder: str | Path, *, fs: FileSystem = REAL) -> Checkpoint:
    """Read the headers of a checkpoint: of `model.safetensors`, or of the files that its index names.

    diffusers' folders, whose files are called `diffusion_pytorch_model`, are read as well.

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
    index, files = _named_files(folder, present, fs)
    tensors: dict[str, StoredTensor] = {}
    metadata, problems = {}, []
    for file, promised in files.items():
        if file not in present:
            problems.append(f"{file}: named by {index}, but missing{did_you_mean(file, present)}")
            continue
        found, metadata[file] = _read_file(folder, file, fs)
        problems += [f"{name!r}: in {file} and in {tensors[name].file}" for name in found if name in tensors]
        if promised is not None:
            problems += [f"{name!r}: {index} says it is in {file}; it is not" for name in sorted(promised - set(found))]
            problems += [f"{name!r}: in {file}, but not named by {index}" for name in found if name not in promised]
        tensors |= found
    if problems:
        raise BaseModelError(f"{folder}: its files are not what its index says", problems)
    config = _json(folder / CONFIG, fs) if CONFIG in present else {}
    return Checkpoint(folder, MappingProxyType(tensors), MappingProxyType(metadata), MappingProxyType(config), index)


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


def read_config(folder: str | Path, *, fs: FileSystem = REAL) -> dict[str, Any]:
    """Return what `config.json` says; nothing without one.

    Raises:
        BaseModelError: If it is no object of JSON.

    Example:
        >>> read_config("no/such/folder")
        {}
    """
    path = Path(folder) / CONFIG
    return _json(path, fs) if fs.exists(path) else {}


@dataclass(frozen=True, eq=False)
class Edit:
    """What a written tensor is made of, where it is not the stored one.

    Args:
        source: The stored tensor that is read for it.
        dtype: What it is written in.
        make: From that tensor, which is its own to change, to what is written: of the same shape, in `dtype`. With
            steps it is asked for each, in their order: flat, with the number of its first element.
        step: How many elements it is given at a time; None gives it all of them at once, in their shape.
    """

    source: str
    dtype: torch.dtype
    make: Callable[[Tensor, int], Tensor]
    step: int | None = None


@dataclass(frozen=True)
class _Part:
    """Bytes to read, and the edit that makes others of them; without one they are written as they are."""

    place: StoredTensor
    start: int
    size: int
    edit: Edit | None


def write_shard(
    checkpoint: Checkpoint,
    file: str,
    target: Path,
    edits: Mapping[str, Edit],
    *,
    lanes: bool = True,
    read_back: bool = True,
    fs: FileSystem = REAL,
    on_bytes: OnBytes | None = None,
) -> tuple[FileRecord, FileRecord]:
    """Write a file of a checkpoint anew, some of its tensors edited, all others byte for byte.

    Where no size changes the header is the stored one, byte for byte; else the tensors stand by the size of their
    numbers, the widest first, so that each begins where its numbers may.

    Args:
        checkpoint: What is read.
        file: Which of its files.
        target: The new file; its folder exists.
        edits: Name to edit, for tensors of this file, and for new ones that are to stand in it.
        lanes: Read, edit and write in threads of their own; else all is done in this one, piece by piece, while each is
            in the core's cache: less work, for who has other files to keep all cores busy.
        read_back: Compare what the disk gives back with what was written.
        fs: Where both lie.
        on_bytes: Told how many bytes were written, as they are; what it raises ends the writing.

    Returns:
        Size and SHA-256 of what was read and of what was written, hashed on their way.

    Raises:
        BaseModelError: If a tensor cannot be read.
        DamagedArtefactError: If what was written does not read back.
        OSError: If the disk refuses.

    Cost:
        One pass over the bytes: read, hashed, edited, hashed, written, read back. Files that are not read in their
        order are read twice. Memory: that of `write_pieces` and 4 MiB, three times that with lanes, or what an edit
        asks for at a time.

    Example:
        write_shard(read_checkpoint("base"), "model.safetensors", Path("new/model.safetensors"), {})
    """
    source = checkpoint.folder / file
    inside = {name: place for name, place in checkpoint.tensors.items() if place.file == file}
    entries = {name: (place.dtype, place.shape) for name, place in inside.items()}
    entries |= {name: (DTYPE_NAMES[one.dtype], checkpoint.tensors[one.source].shape) for name, one in edits.items()}
    seen = _Seen()
    if entries == {name: (place.dtype, place.shape) for name, place in inside.items()}:
        start = min((place.start for place in inside.values()), default=fs.size_of(source))
        header, order = bytes(fs.read_range(source, 0, start)), list(inside)
        seen.look(0, memoryview(header))
    else:
        order = sorted(entries, key=lambda name: -DTYPES[entries[name][0]].itemsize)
        header = dump_header({name: entries[name] for name in order}, checkpoint.metadata.get(file, {}))
    parts = (part for name in order for part in _parts(checkpoint, name, edits.get(name)))
    with ExitStack() as stack:
        read = _read(checkpoint.folder, parts, seen if edits else None, lanes, fs)
        made = _made(ahead(read, stack) if lanes else read)
        pieces = chain([memoryview(header)], made)
        written = write_pieces(target, pieces, lanes=lanes, read_back=read_back, fs=fs, on_bytes=on_bytes)
    if not edits:
        return written, written
    whole = seen.size == fs.size_of(source)
    return FileRecord(*((seen.size, seen.sha.hexdigest()) if whole else fs.measure(source))), written


def copy_file(source: Path, target: Path, *, fs: FileSystem = REAL, on_bytes: OnBytes | None = None) -> FileRecord:
    """Copy a file in blocks, hashed on its way; return size and SHA-256.

    Raises:
        OSError: If the disk refuses.

    Example:
        copy_file(Path("base/tokenizer.json"), Path("new/tokenizer.json"))
    """
    size = fs.size_of(source)
    pieces = (memoryview(fs.read_range(source, at, min(BLOCK, size - at))) for at in range(0, size, BLOCK))
    return write_pieces(target, pieces, lanes=False, fs=fs, on_bytes=on_bytes)


@dataclass
class _Seen:
    """A file's hash, of as much as was read of it from its beginning on."""

    size: int = 0
    sha: Any = field(default_factory=hashlib.sha256)

    def look(self, start: int, data: memoryview) -> None:
        """Take bytes that were read; those that do not follow the last ones are passed over."""
        if start == self.size:
            self.sha.update(data)
            self.size += len(data)


def _parts(checkpoint: Checkpoint, name: str, edit: Edit | None) -> Iterator[_Part]:
    place = checkpoint.tensors[name if edit is None else edit.source]
    block = BLOCK
    if edit is not None:
        block = place.size if edit.step is None else edit.step * DTYPES[place.dtype].itemsize
    for at in range(0, place.size, max(1, block)):
        yield _Part(place, place.start + at, min(block, place.size - at), edit)


def _read(
    folder: Path, parts: Iterable[_Part], seen: _Seen | None, lanes: bool, fs: FileSystem
) -> Iterator[tuple[_Part, memoryview]]:
    """Yield parts with their bytes, in memory of which the last three are not written to: read, edited, written."""
    rooms = cycle([np.empty(_ROOM, np.uint8) for _ in range(3 if lanes else 1)])
    for file, group in groupby(parts, lambda part: part.place.file):
        path, start = folder / file, 0
        try:
            with fs.reading(path) as read:
                for part in group:
                    start = part.start
                    data = (next(rooms)[: part.size] if part.size <= _ROOM else np.empty(part.size, np.uint8)).data
                    for block in blocks(data):
                        read(start, block)
                        if seen is not None:
                            seen.look(start, block)
                        start += len(block)
                    yield part, data
        except OSError as cause:
            raise BaseModelError(f"{path}: cannot be read at byte {start}: {cause}") from cause


def _made(read: Iterable[tuple[_Part, memoryview]]) -> Iterator[memoryview]:
    """Yield what is written for parts that were read."""
    for part, data in read:
        if part.edit is None:
            yield data
            continue
        stored = torch.frombuffer(data, dtype=DTYPES[part.place.dtype])
        if part.edit.step is None:
            stored = stored.reshape(part.place.shape)
        first = (part.start - part.place.start) // stored.element_size()
        yield part.edit.make(stored, first).contiguous().reshape(-1).view(torch.uint8).numpy().data


def _named_files(
    folder: Path, present: Collection[str], fs: FileSystem
) -> tuple[str | None, dict[str, set[str] | None]]:
    """Return the name of a folder's index, if it has one, and its files of weights with what is promised in each."""
    for stem in _STEMS:
        if (index := f"{stem}.safetensors.index.json") in present:
            return index, _files_of_index(folder, index, fs)
        if (weights := f"{stem}.safetensors") in present:
            return None, {weights: None}
    if not present and not fs.is_folder(folder):
        raise BaseModelError(f"{folder}: expected a folder with safetensors files, found none")
    near = did_you_mean(WEIGHTS, present)
    raise BaseModelError(
        f"{folder}: expected a folder with {WEIGHTS}, {INDEX} or diffusers' {_STEMS[1]}.safetensors, found none{near}"
    )


def _files_of_index(folder: Path, index: str, fs: FileSystem) -> dict[str, set[str] | None]:
    """Return the files that an index names, in its order of names, with the tensors that it promises in each."""
    held = _json(folder / index, fs)
    places = held.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise BaseModelError(f"{folder / index}: expected `weight_map`, from tensors to files")
    if unsafe := sorted({file for file in places.values() if Path(file).name != file}):
        raise BaseModelError(f"{folder / index}: names files outside of the folder", unsafe)
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
