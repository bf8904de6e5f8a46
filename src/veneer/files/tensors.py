"""The safetensors file of an adapter, checked before anything is built from it.

The header is checked here by our own reading and then again by safetensors, so that a file must mean the same
to both (research: failures.md A04 to A08, A12, A16; the format: https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from veneer.errors import AdapterError, shortened
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.strict_json import parse_json
from veneer.names import did_you_mean

MAX_HEADER = 16 << 20
MAX_TENSORS = 20_000
MAX_FILE = 2 << 30
MAX_DIMS = 16
_SHOWN = 50
_LENGTH = 8
_METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Torch's dtype for each of the format's names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's name for each of torch's dtypes."""
_ORDER = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64")
_RANKS = {DTYPES[name]: rank for rank, name in enumerate(_ORDER)}
"""Tensors stand by dtype, the widest first, as safetensors orders them."""


def read_tensors(
    path: str | Path, *, max_bytes: int = MAX_FILE, finite: bool = True, fs: FileSystem = REAL
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in memory of their own.

    Args:
        path: The file.
        max_bytes: Longest file.
        finite: Refuse values that are not; an optimiser's moments may overflow where a run goes on all the same.
        fs: Where it lies.

    Raises:
        AdapterError: If it cannot be read, or anything in it is wrong.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.safetensors"
        ...     _ = path.write_bytes(dump_tensors({"x": torch.ones(2)}))
        ...     read_tensors(path)
        {'x': tensor([1., 1.])}
    """
    try:
        data = fs.read_bytes(Path(path), max_bytes)
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    return parse_tensors(data, str(path), finite=finite)


def parse_tensors(data: bytes, where: str, *, finite: bool = True) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file.

    Args:
        data: The whole file.
        where: What errors call it.
        finite: Refuse values that are NaN or infinite.

    Raises:
        AdapterError: If the header lies about the file, a dtype is not supported, or a value is NaN or infinite;
            every problem is listed.

    Example:
        >>> parse_tensors(dump_tensors({"x": torch.ones(2)}), "a.safetensors")
        {'x': tensor([1., 1.])}
    """
    parse_header(data, where, len(data))
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as cause:
        raise AdapterError(f"{where}: refused by safetensors: {cause}") from cause
    if finite:
        _refuse(where, "weights must be finite; do not use this file", non_finite(tensors))
    return {name: tensors[name] for name in sorted(tensors)}


def header_length(first: bytes, where: str, size: int) -> int:
    """Return how many bytes the header of a safetensors file takes behind the first eight, which say so.

    Args:
        first: The first eight bytes.
        where: What errors call the file.
        size: Bytes of the whole file.

    Raises:
        AdapterError: If the header would be longer than the file, or than what is read.

    Example:
        >>> header_length((96).to_bytes(8, "little"), "a.safetensors", 1000)
        96
    """
    if len(first) < _LENGTH:
        raise AdapterError(f"{where}: expected the {_LENGTH}-byte length of a header, got {len(first)} bytes")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise AdapterError(
            f"{where}: expected a header of at most {MAX_HEADER} bytes, its length field says {length};"
            " it is not a safetensors file, or not an adapter's"
        )
    if _LENGTH + length > size:
        raise AdapterError(
            f"{where}: its header takes {length} bytes, {_LENGTH + length - size} more than there are;"
            " the file was cut short"
        )
    return length


def parse_header(data: bytes, where: str, size: int) -> tuple[dict[str, Any], int]:
    """Return the checked header of a safetensors file, and where in the file the values begin.

    Args:
        data: The beginning of the file, with the whole header.
        where: What errors call it.
        size: Bytes of the whole file.

    Raises:
        AdapterError: If the header lies about the file or a dtype is not supported; every problem is listed.

    Example:
        >>> data = dump_tensors({"x": torch.ones(2)})
        >>> header, start = parse_header(data, "a.safetensors", len(data))
        >>> header["x"], start
        ({'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}, 96)
    """
    header, start = _read_header(data, where, size)
    _refuse(where, "the header does not fit the file", _header_problems(header, size - start))
    return header, start


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file, as PEFT writes it: equal tensors give equal bytes.

    Args:
        tensors: The tensors by name.
        metadata: What the header says besides.

    Example:
        >>> dump_tensors({"x": torch.ones(2)}) == dump_tensors({"x": torch.ones(2)})
        True
    """
    return b"".join(tensor_pieces(tensors, metadata))


def tensor_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """Return the bytes of a safetensors file in pieces: the header, and the memory of each tensor itself.

    Equals, and is tested against:

        safetensors.torch.save(tensors, metadata={"format": "pt"})

    Args:
        tensors: They must not change as long as the pieces are used.
        metadata: What the header says besides.

    Raises:
        AdapterError: If a dtype is none of the format's.

    Cost:
        No copy of tensors that are contiguous and on the CPU.

    Example:
        >>> [len(piece) for piece in tensor_pieces({"x": torch.ones(2)})]
        [96, 8]
    """
    if unknown := [f"{name!r}: {one.dtype}" for name, one in tensors.items() if one.dtype not in DTYPE_NAMES]:
        raise AdapterError("tensors of these dtypes cannot be written", unknown)
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    held = [tensors[name].detach().cpu().contiguous() for name in order]
    entries = {name: (DTYPE_NAMES[one.dtype], tuple(one.shape)) for name, one in zip(order, held, strict=True)}
    header = dump_header(entries, {"format": "pt"} | dict(sorted((metadata or {}).items())))
    return [header, *(one.reshape(-1).view(torch.uint8).numpy().data for one in held)]


def dump_header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file whose tensors stand in this order.

    Args:
        entries: Name to dtype, in the format's words, and shape.
        metadata: What the header says besides.

    Example:
        >>> dump_header({"x": ("F32", (2,))}, {})[8:].decode()
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    stop = 0
    for name, (dtype, shape) in entries.items():
        start, stop = stop, stop + DTYPES[dtype].itemsize * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text


def _refuse(where: str, message: str, problems: list[str]) -> None:
    if problems:
        raise AdapterError(f"{where}: {message}", shortened(problems, _SHOWN))


def _read_header(data: bytes, where: str, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and where the values begin."""
    length = header_length(data[:_LENGTH], where, size)
    raw = data[_LENGTH : _LENGTH + length]
    if not raw.startswith(b"{"):
        raise AdapterError(f"{where}: expected a header that begins with '{{', got {raw[:1]!r}")
    # Counting brackets first bounds the memory that the parsed header takes.
    if raw.count(b"{") > 2 * MAX_TENSORS or raw.count(b"[") > 4 * MAX_TENSORS:
        raise AdapterError(f"{where}: more than {MAX_TENSORS} tensors")
    header = parse_json(raw, f"{where} (header)", max_bytes=MAX_HEADER, max_depth=8)
    return header, _LENGTH + length


def _header_problems(header: dict[str, Any], available: int) -> list[str]:
    """Return what is wrong with the table of tensors."""
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    if len(entries) > MAX_TENSORS:
        return [f"{len(entries)} tensors; at most {MAX_TENSORS} are read"]
    problems: list[str] = []
    metadata = header.get(_METADATA)
    # mlx writes null where it has none, and safetensors takes it.
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"{_METADATA} must map strings to strings")
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        found = _entry_problem(entry)
        if found is None:
            begin, end = entry["data_offsets"]
            ranges.append((begin, end, name))
        else:
            problems.append(f"{name!r}: {found}")
    # Where an entry cannot be read, what it covers is not known.
    return problems or _cover_problems(sorted(ranges), available)


def _entry_problem(entry: Any) -> str | None:
    """Return what is wrong with one tensor's entry taken alone."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        near = did_you_mean(dtype, DTYPES) if isinstance(dtype, str) else ""
        return f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}{near}"
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        return f"shape must be a list of at most {MAX_DIMS} sizes, got {str(shape)[:80]}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets must be [begin, end], got {str(offsets)[:80]}"
    expected, got = prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if expected != got:
        return f"shape {shape} of {dtype} takes {expected} bytes, data_offsets {offsets} give {got}"
    return None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**53 for size in value)


def _cover_problems(ranges: list[tuple[int, int, str]], available: int) -> list[str]:
    """Return where the tensors leave holes, overlap, or do not end where the file ends."""
    problems, reached = [], 0
    for begin, end, name in ranges:
        if begin > reached:
            problems.append(f"{name!r}: {begin - reached} bytes before it belong to no tensor")
        elif begin < reached:
            problems.append(f"{name!r}: shares {reached - begin} bytes with another tensor")
        reached = max(reached, end)
    if reached > available:
        problems.append(f"{reached - available} bytes are missing at the end; the file was cut short")
    elif reached < available:
        problems.append(f"{available - reached} bytes at the end belong to no tensor")
    return problems


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each tensor that holds NaN or infinity, with their counts.

    Example:
        >>> non_finite({"x": torch.tensor([1.0, float("inf")])})
        ["'x': 0 NaN and 1 infinite of 2 values"]
    """
    problems = []
    for name in sorted(tensors):
        tensor = tensors[name]
        # A sum is finite only if all of it is: one pass, no mask; where it overflows, the mask tells.
        if tensor.is_floating_point() and not isfinite(tensor.sum().item()) and not bool(tensor.isfinite().all()):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            problems.append(f"{name!r}: {nan} NaN and {infinite} infinite of {tensor.numel()} values")
    return problems
