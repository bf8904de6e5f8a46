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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import AdapterError, MissingDependencyError
from veneer.files.tensors import MAX_TENSORS

MAGIC = b"GGUF"
MAX_FIELDS = 4096
MAX_TEXT = 1 << 20
MAX_ITEMS = 1 << 16
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
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


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
    cursor = _Cursor(data, where)
    if cursor.take(4) != MAGIC:
        raise AdapterError(f"{where}: expected a file that begins with {MAGIC!r}, got {data[:4]!r}")
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
    for _ in range(num_fields):
        key = cursor.text()
        if key in fields:
            raise AdapterError(f"{where}: field {key[:80]!r} stands twice")
        fields[key] = cursor.value(cursor.number("<I"))
    entries = [cursor.entry() for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise AdapterError(f"{where}: expected general.alignment to be a power of two, got {str(alignment)[:80]}")
    return Container(fields, _tensors(entries, data, -(-cursor.place // alignment) * alignment, alignment, where))


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
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(fields))]
    for key, value in fields.items():
        parts += [_packed_text(key), _packed(value)]
    values, offset = [], 0
    for name, tensor in tensors.items():
        sizes = tuple(reversed(tensor.shape))
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts += [_packed_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", _NUMBERS[tensor.dtype], offset))
        raw += bytes(-len(raw) % ALIGNMENT)
        offset += len(raw)
        values.append(raw)
    head = b"".join(parts)
    return b"".join([head, bytes(-len(head) % ALIGNMENT), *values])


class _Cursor:
    """A place in the bytes of a file, which moves as it is read, and never past the end."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.place = data, where, 0

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
        if length > MAX_ITEMS or inner == _ARRAY:
            raise AdapterError(f"{self.where}: expected an array of at most {MAX_ITEMS} plain items, got {length}")
        return tuple(self.value(inner) for _ in range(length))

    def entry(self) -> _Entry:
        """Return the next tensor's entry."""
        name, axes = self.text(), self.number("<I")
        if axes > MAX_AXES:
            raise AdapterError(f"{self.where}: {name[:80]!r} has {axes} axes; GGUF has at most {MAX_AXES}")
        sizes = [self.number("<Q") for _ in range(axes)]
        return _Entry(name, tuple(reversed(sizes)), self.number("<I"), self.number("<Q"))


def _tensors(entries: list[_Entry], data: bytes, start: int, alignment: int, where: str) -> dict[str, Tensor]:
    """Return the tensors of a file whose entries cover it: no holes but for the alignment, no overlaps."""
    problems = []
    ranges: list[tuple[int, int, _Entry]] = []
    for entry in entries:
        size = _byte_size(entry)
        if size is None or entry.offset % alignment:
            what = f"type {entry.kind} of shape {entry.shape}" if size is None else f"offset {entry.offset}"
            problems.append(f"{entry.name[:80]!r}: {what} is not possible")
            continue
        ranges.append((entry.offset, size, entry))
    counts = Counter(entry.name for entry in entries)
    problems += [f"{name[:80]!r}: stands twice" for name, count in sorted(counts.items()) if count > 1]
    reached = 0
    for offset, size, entry in sorted(ranges, key=lambda one: one[:2]):
        if not problems and offset != -(-reached // alignment) * alignment:
            problems.append(f"{entry.name[:80]!r}: begins at {offset}, the tensor before ends at {reached}")
        reached = offset + size
    left = len(data) - start - reached
    if not problems and entries and not 0 <= left < alignment:
        problems.append(f"the tensors end {abs(left)} bytes {'before' if left > 0 else 'behind'} the file")
    if problems:
        raise AdapterError(f"{where}: its tensors do not fit the file", problems[:_SHOWN])
    return {entry.name: _values(entry, data[start + offset : start + offset + size]) for offset, size, entry in ranges}


def _byte_size(entry: _Entry) -> int | None:
    """Return how many bytes a tensor takes, or None if it cannot be."""
    if entry.kind in _PLAIN:
        return prod(entry.shape) * _PLAIN[entry.kind].itemsize
    block = _quantised_block(entry.kind)
    if block is None or not entry.shape or entry.shape[-1] % block[0]:
        return None
    return prod(entry.shape) // block[0] * block[1]


def _values(entry: _Entry, raw: bytes) -> Tensor:
    if entry.kind in _PLAIN:
        if not raw:
            return torch.empty(entry.shape, dtype=_PLAIN[entry.kind])
        return torch.frombuffer(bytearray(raw), dtype=_PLAIN[entry.kind]).reshape(entry.shape)
    gguf = gguf_package()
    blocks = np.frombuffer(raw, np.uint8).reshape(*entry.shape[:-1], -1)
    try:
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(entry.kind))
    except NotImplementedError:
        kind = gguf.GGMLQuantizationType(entry.kind).name
        raise AdapterError(f"{entry.name!r}: quantised as {kind}, which the gguf package cannot undo") from None
    return torch.from_numpy(np.array(values, np.float32)).reshape(entry.shape)


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
