"""The container that GGUF files are: fields, then tensors, checked before anything is built from it.

Little-endian; strings and arrays begin with their length in 8 bytes. A field is key, type, value; a tensor's entry is
its name, its sizes with the fastest axis first, its type, and where its values lie behind the last entry, each at a
multiple of the alignment (research: failures.md A04 to A07; the format: ggml's docs/gguf.md, version 3).
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import AdapterError, MissingDependencyError, shortened
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.tensors import MAX_TENSORS

MAGIC = b"GGUF"
MAX_FIELDS = 4096
MAX_TEXT = 1 << 20
MAX_ITEMS = 1 << 16
MAX_WORDS = 1 << 20
"""Items in an array of a model's file: its vocabulary."""
MAX_HEAD = 64 << 20
MAX_AXES = 4
ALIGNMENT = 32

_VERSION = 3
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_UINT32, _FLOAT32, _TEXT, _ARRAY = 4, 6, 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_NUMBERS = {dtype: number for number, dtype in _PLAIN.items()}
_SHOWN = 50


@dataclass(frozen=True)
class Container:
    """What a GGUF file holds.

    Args:
        fields: Key to value: numbers, texts, tuples of them.
        tensors: Name to values, the slowest axis first; quantised ones as float32.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """What a GGUF file says of a tensor.

    Args:
        name: Its name.
        shape: The slowest axis first.
        kind: Number of its type.
        offset: Where its values begin, from those of the first tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its values; None where they are quantised."""
        return _PLAIN.get(self.kind)


@dataclass(frozen=True)
class Head:
    """What stands before the values in a GGUF file.

    Args:
        fields: Key to value, as in a `Container`.
        packed: Key to the bytes of type and value, as they stand in the file.
        tensors: Name to entry, in the order of the file.
        start: Where the values of the first tensor begin.
    """

    fields: Mapping[str, Any]
    packed: Mapping[str, bytes]
    tensors: Mapping[str, Entry]
    start: int


def parse_gguf(data: bytes, where: str) -> Container:
    """Return the fields and tensors in the bytes of a GGUF file.

    Args:
        data: The whole file.
        where: What errors call it.

    Raises:
        AdapterError: If the file is malformed; every tensor that lies wrongly is listed.
        MissingDependencyError: If a tensor is quantised and the `gguf` package is not installed.

    Example:
        >>> file = dump_gguf({"general.type": "adapter"}, {"x": torch.ones(2)})
        >>> parse_gguf(file, "a.gguf").tensors
        {'x': tensor([1., 1.])}
    """
    head, entries, alignment = _head(_Cursor(data, where))
    return Container(head.fields, _tensors(entries, data, head.start, alignment, where))


def read_gguf_head(path: str | Path, *, fs: FileSystem = REAL) -> Head:
    """Return what stands before the values in a model's GGUF file.

    Raises:
        AdapterError: If it is malformed, or ends before the values of a tensor whose type is known here.

    Cost:
        Reads the first 64 MiB at most; the tokenizer is most of it.

    Example:
        read_gguf_head("models/llama.gguf").fields["general.architecture"]
    """
    path = Path(path)
    try:
        size = fs.size_of(path)
        data = bytes(fs.read_range(path, 0, min(size, MAX_HEAD)))
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    head, entries, alignment = _head(_Cursor(data, str(path), MAX_WORDS))
    problems = [f"{name[:80]!r}: stands twice" for name, count in _counts(entries).items() if count > 1]
    for entry in entries:
        length = _byte_size(entry) if entry.kind in _PLAIN else 0
        if entry.offset % alignment or head.start + entry.offset + (length or 0) > size:
            problems.append(f"{entry.name[:80]!r}: its values lie at {entry.offset}, which is not possible")
    if problems:
        raise AdapterError(f"{path}: its tensors do not fit the file", shortened(problems, _SHOWN))
    return head


def read_gguf_tensor(path: Path, head: Head, name: str, *, fs: FileSystem = REAL) -> Tensor:
    """Return one tensor of a GGUF file, in memory of its own.

    Raises:
        AdapterError: If there is none of this name, it is quantised, or it cannot be read.

    Example:
        read_gguf_tensor(path, read_gguf_head(path), "output_norm.weight")
    """
    entry = head.tensors.get(name)
    if entry is None or entry.dtype is None:
        what = "holds no such tensor" if entry is None else f"it is quantised, of type {entry.kind}"
        raise AdapterError(f"{path}: {name!r}: {what}")
    try:
        raw = fs.read_range(path, head.start + entry.offset, prod(entry.shape) * entry.dtype.itemsize)
    except OSError as cause:
        raise AdapterError(f"{path}: {name!r} cannot be read: {cause}") from cause
    return _plain(entry, entry.dtype, raw)


def _head(cursor: "_Cursor") -> tuple[Head, list[Entry], int]:
    """Return what stands before the values, the entries as they stand, and the alignment."""
    where = cursor.where
    if cursor.take(4) != MAGIC:
        raise AdapterError(f"{where}: expected a file that begins with {MAGIC!r}, got {cursor.data[:4]!r}")
    version = cursor.number("<I")
    if version not in (2, _VERSION):
        raise AdapterError(f"{where}: expected version 2 or {_VERSION} of GGUF in little-endian order, got {version}")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
        raise AdapterError(
            f"{where}: expected at most {MAX_TENSORS} tensors and {MAX_FIELDS} fields, got {num_tensors} and"
            f" {num_fields}"
        )
    fields: dict[str, Any] = {}
    packed: dict[str, bytes] = {}
    for _ in range(num_fields):
        key = cursor.text()
        if key in fields:
            raise AdapterError(f"{where}: field {key[:80]!r} stands twice")
        begin = cursor.place
        fields[key] = cursor.value(cursor.number("<I"))
        packed[key] = cursor.data[begin : cursor.place]
    entries = [cursor.entry() for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise AdapterError(f"{where}: expected general.alignment to be a power of two, got {str(alignment)[:80]}")
    start = -(-cursor.place // alignment) * alignment
    return Head(fields, packed, {entry.name: entry for entry in entries}, start), entries, alignment


def dump_gguf(fields: Mapping[str, str | float | tuple[int, ...]], tensors: Mapping[str, Tensor]) -> bytes:
    r"""Return the bytes of a GGUF file: equal values give equal bytes.

    Args:
        fields: Texts, floats (as float32) and tuples of whole numbers (as uint32), in their order.
        tensors: Of float64, float32, float16 or bfloat16, in their order.

    Raises:
        AdapterError: If a dtype has no place in GGUF.

    Example:
        >>> dump_gguf({}, {})[:8]
        b'GGUF\x03\x00\x00\x00'
    """
    if unknown := [f"{name!r}: {one.dtype}" for name, one in tensors.items() if one.dtype not in _NUMBERS]:
        raise AdapterError("tensors of these dtypes cannot be written to GGUF", unknown)
    head = dump_gguf_head(
        {key: _packed(value) for key, value in fields.items()},
        {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()},
    )
    values = []
    for tensor in tensors.values():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        values += [raw, bytes(padding(len(raw)))]
    return b"".join([head, *values])


def dump_gguf_head(packed: Mapping[str, bytes], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    r"""Return what stands before the values in a GGUF file, up to the first of them.

    The values follow in the same order, `padding` bytes behind each.

    Args:
        packed: Key to the bytes of type and value, as a `Head` has them.
        tensors: Name to dtype and shape, the slowest axis first.

    Example:
        >>> dump_gguf_head({}, {"x": (torch.float16, (2, 3))})[24:38]
        b'\x01\x00\x00\x00\x00\x00\x00\x00x\x02\x00\x00\x00\x03'
    """
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(packed))]
    for key, value in packed.items():
        parts += [_packed_text(key), value]
    offset = 0
    for name, (dtype, shape) in tensors.items():
        sizes = tuple(reversed(shape))
        parts += [_packed_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", _NUMBERS[dtype], offset))
        size = prod(shape) * dtype.itemsize
        offset += size + padding(size)
    head = b"".join(parts)
    return head + bytes(padding(len(head)))


def padding(size: int) -> int:
    """Return how many bytes stand behind so many, so that what follows is aligned.

    Example:
        >>> padding(30), padding(32)
        (2, 0)
    """
    return -size % ALIGNMENT


def packed_count(value: int) -> bytes:
    r"""Return type and value of a whole number, as uint32.

    Example:
        >>> packed_count(1)
        b'\x04\x00\x00\x00\x01\x00\x00\x00'
    """
    return struct.pack("<II", _UINT32, value)


class _Cursor:
    """A place in the bytes of a file, which moves as it is read, and never past the end."""

    def __init__(self, data: bytes, where: str, max_items: int = MAX_ITEMS) -> None:
        self.data, self.where, self.place, self.max_items = data, where, 0, max_items

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self.data) - self.place:
            raise AdapterError(
                f"{self.where}: ends at byte {len(self.data)}, {self.place + count - len(self.data)} bytes early"
            )
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, kind: str) -> Any:
        """Return the next number of a kind that `struct` knows."""
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        """Return the next text."""
        length = self.number("<Q")
        if length > MAX_TEXT:
            raise AdapterError(f"{self.where}: a text of {length} bytes; at most {MAX_TEXT} are read")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise AdapterError(f"{self.where}: a text before byte {self.place} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Return the next value of a field."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise AdapterError(f"{self.where}: a field of type {kind}, which GGUF has not")
        inner, length = self.number("<I"), self.number("<Q")
        if length > self.max_items or inner == _ARRAY:
            raise AdapterError(f"{self.where}: expected an array of at most {self.max_items} plain items, got {length}")
        return tuple(self.value(inner) for _ in range(length))

    def entry(self) -> Entry:
        """Return the next tensor's entry."""
        name, axes = self.text(), self.number("<I")
        if axes > MAX_AXES:
            raise AdapterError(f"{self.where}: {name[:80]!r} has {axes} axes; GGUF has at most {MAX_AXES}")
        sizes = [self.number("<Q") for _ in range(axes)]
        return Entry(name, tuple(reversed(sizes)), self.number("<I"), self.number("<Q"))


def _tensors(entries: list[Entry], data: bytes, start: int, alignment: int, where: str) -> dict[str, Tensor]:
    """Return the tensors of a file whose entries cover it: no holes but for the alignment, no overlaps."""
    problems = []
    ranges: list[tuple[int, int, Entry]] = []
    for entry in entries:
        size = _byte_size(entry)
        if size is None or entry.offset % alignment:
            what = f"type {entry.kind} of shape {entry.shape}" if size is None else f"offset {entry.offset}"
            problems.append(f"{entry.name[:80]!r}: {what} is not possible")
            continue
        ranges.append((entry.offset, size, entry))
    problems += [f"{name[:80]!r}: stands twice" for name, count in _counts(entries).items() if count > 1]
    reached = 0
    for offset, size, entry in sorted(ranges, key=lambda one: one[:2]):
        if not problems and offset != -(-reached // alignment) * alignment:
            problems.append(f"{entry.name[:80]!r}: begins at {offset}, the tensor before ends at {reached}")
        reached = offset + size
    left = len(data) - start - reached
    if not problems and entries and not 0 <= left < alignment:
        problems.append(f"the tensors end {abs(left)} bytes {'before' if left > 0 else 'behind'} the file")
    if problems:
        raise AdapterError(f"{where}: its tensors do not fit the file", shortened(problems, _SHOWN))
    return {entry.name: _values(entry, data[start + offset : start + offset + size]) for offset, size, entry in ranges}


def _counts(entries: list[Entry]) -> dict[str, int]:
    return dict(sorted(Counter(entry.name for entry in entries).items()))


def _byte_size(entry: Entry) -> int | None:
    """Return how many bytes a tensor takes, or None if it cannot be."""
    if entry.kind in _PLAIN:
        return prod(entry.shape) * _PLAIN[entry.kind].itemsize
    block = _quantised_block(entry.kind)
    if block is None or not entry.shape or entry.shape[-1] % block[0]:
        return None
    return prod(entry.shape) // block[0] * block[1]


def _values(entry: Entry, raw: bytes) -> Tensor:
    if entry.dtype is not None:
        return _plain(entry, entry.dtype, bytearray(raw))
    gguf = gguf_package()
    blocks = np.frombuffer(raw, np.uint8).reshape(*entry.shape[:-1], -1)
    try:
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(entry.kind))
    except NotImplementedError:
        kind = gguf.GGMLQuantizationType(entry.kind).name
        raise AdapterError(f"{entry.name!r}: quantised as {kind}, which the gguf package cannot undo") from None
    return torch.from_numpy(np.array(values, np.float32)).reshape(entry.shape)


def _plain(entry: Entry, dtype: torch.dtype, raw: bytearray) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape) if raw else torch.empty(entry.shape, dtype=dtype)


def _quantised_block(kind: int) -> tuple[int, int] | None:
    """Return how many values a block of a quantised type holds, and in how many bytes."""
    gguf = gguf_package()
    known = {int(one): sizes for one, sizes in gguf.GGML_QUANT_SIZES.items() if sizes[0] > 1}
    return known.get(kind)


def _packed_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _packed(value: str | float | tuple[int, ...]) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _packed_text(value)
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}I", _ARRAY, _UINT32, len(value), *value)
    return struct.pack("<If", _FLOAT32, value)


def gguf_package() -> Any:
    """Return the optional `gguf` package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingDependencyError("GGUF adapters need the gguf package: pip install 'veneer[gguf]'") from None
    return gguf
