"""The process that opens a pickle: run by its path, from nothing but the standard library, with no rights left.

It reads the file from its standard input and writes a safetensors file to its standard output: the storages of the
pickle, and in the header's metadata which tensor is which part of which storage. Nothing of torch is imported: the few
names that a file of tensors needs are stood in for here, and every other name is refused. `veneer.files.pickles` starts
it; see there for what it may use.

The layout of the files: torch 2.13, `torch/serialization.py` (`_save`, `_legacy_save`).
"""

import collections
import encodings.cp437  # noqa: F401 - names in a zip may be in it, and later nothing can be imported
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

REFUSED = 3
"""The exit code that says that a line of standard error is what is wrong: JSON of a message and its problems."""
MAX_TENSORS = 20_000
MAX_DIMS = 16
MAX_PICKLE = 64 << 20
WRAPPERS = ("state_dict", "model", "module", "lora", "adapter", "weights")
"""Names under which programs put a dictionary of tensors beside notes of their own."""

_STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_CHUNK = 1 << 20
_SHOWN = 20


class RefusedError(Exception):
    """What is wrong with the file, for the process that asked."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message, self.problems = message, problems


class Fixed:
    """What a pickle may hold and not change: its `BUILD` instruction finds this instead of the attributes."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> NoReturn:
        raise RefusedError("changes a tensor after it was made")


class StorageType(Fixed):
    """The dtype of a storage, in the place of torch's class of that name."""

    __slots__ = ("name", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size


class Storage(Fixed):
    """A run of numbers in the file."""

    __slots__ = ("count", "key", "kind")

    def __init__(self, kind: StorageType, key: str, count: int) -> None:
        self.kind, self.key, self.count = kind, key, count


class Part(Fixed):
    """A tensor: which part of which storage it is."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, offset: int, shape: list[int], strides: list[int]) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Part:
    """Stand in for `torch._utils._rebuild_tensor_v2`: note a tensor, compute nothing."""
    if type(storage) is not Storage or type(offset) is not int:
        raise RefusedError("holds a tensor that is not part of a storage")
    sizes, steps = _whole(shape), _whole(strides)
    if len(sizes) != len(steps) or len(sizes) > MAX_DIMS:
        raise RefusedError(
            f"holds a tensor of {len(sizes)} sizes and {len(steps)} strides; at most {MAX_DIMS} are read"
        )
    return Part(storage, offset, sizes, steps)


def rebuild_parameter(part: Any, *_: Any) -> Part:
    """Stand in for `torch._utils._rebuild_parameter`."""
    if type(part) is not Part:
        raise RefusedError("holds a parameter that is no tensor")
    return part


def _whole(numbers: Any) -> list[int]:
    if type(numbers) is not tuple or any(type(one) is not int for one in numbers):
        raise RefusedError("holds a tensor whose sizes or strides are not whole numbers")
    return list(numbers)


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): StorageType(*kind) for name, kind in _STORAGES.items()},
}
"""All that a pickle can name, and what it gets for it: a list of what is allowed, not of what is not."""


class Unpickler(pickle.Unpickler):
    """Reads a pickle that can name nothing but `GLOBALS`."""

    def __init__(self, file: IO[bytes], storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name, or refuse it."""
        found = GLOBALS.get((module, name))
        if found is None:
            raise RefusedError(
                f"names {module[:80]}.{name[:80]}, which a file of tensors does not need; it may run any code, so it is"
                " not read"
            )
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor lies in; where it once lay, such as on a GPU, does not matter."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise RefusedError("refers to something outside of itself that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if len(pid) == 6 and pid[5] is not None:
            raise RefusedError(
                "holds a view of a storage, as torch before 0.4 wrote it; save it again with a newer torch"
            )
        if type(kind) is not StorageType or type(key) is not str or type(count) is not int or count < 0:
            raise RefusedError("refers to a storage without a dtype that is read, or a size")
        known = self.storages.setdefault(key, Storage(kind, key, count))
        if known.kind is not kind or known.count != count:
            raise RefusedError(f"refers to storage {key[:80]!r} by two dtypes or sizes")
        return known


def unpickle(file: IO[bytes], storages: dict[str, Storage]) -> Any:
    """Return what a pickle holds, or refuse it."""
    try:
        return Unpickler(file, storages).load()
    except RefusedError:
        raise
    except MemoryError:
        raise RefusedError("asks for more memory than files of tensors need") from None
    except Exception as cause:  # whatever bytes that are no pickle may raise
        raise RefusedError(f"cannot be read as a pickle: {type(cause).__name__}: {str(cause)[:200]}") from None


def tensors_of(value: Any) -> dict[str, Part]:
    """Return the tensors of a dictionary by name; everything else in it is refused, but for notes beside a wrapper."""
    if not isinstance(value, dict):
        raise RefusedError(f"expected a dictionary of tensors, got {type(value).__name__}")
    wrappers = [name for name in WRAPPERS if isinstance(value.get(name), dict)]
    problems = []
    if wrappers and not any(isinstance(one, Part) for one in value.values()):
        if len(wrappers) > 1:
            raise RefusedError(f"holds several dictionaries, {', '.join(wrappers)}; which is meant cannot be told")
        problems += [
            f"{str(name)[:80]!r}: beside {wrappers[0]!r} only notes are read, got {type(one).__name__}"
            for name, one in value.items()
            if name != wrappers[0] and not (one is None or isinstance(one, (str, int, float, bool)))
        ]
        value = value[wrappers[0]]
    for name, one in value.items():
        if not isinstance(name, str):
            problems.append(f"{str(name)[:80]!r}: expected a name, got {type(name).__name__}")
        elif not isinstance(one, Part):
            problems.append(f"{name[:80]!r}: expected a tensor, got {type(one).__name__}")
    if len(value) > MAX_TENSORS:
        problems = [f"{len(value)} tensors; at most {MAX_TENSORS} are read"]
    if problems:
        more = (f"... and {len(problems) - _SHOWN} more",) if len(problems) > _SHOWN else ()
        raise RefusedError("is not a dictionary of tensors", (*problems[:_SHOWN], *more))
    return dict(value)


def write(
    out: IO[bytes], tensors: dict[str, Part], content: Callable[[Storage], Iterator[bytes]], max_bytes: int
) -> None:
    """Write the storages of tensors as a safetensors file, each once, and in its metadata where each tensor lies."""
    used = list({part.storage.key: part.storage for part in tensors.values()}.values())
    places = {storage.key: str(index) for index, storage in enumerate(used)}
    views = {name: [places[part.storage.key], part.offset, part.shape, part.strides] for name, part in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"views": json.dumps(views)}}
    stop = 0
    for storage in used:
        start, stop = stop, stop + storage.count * storage.kind.size
        header[places[storage.key]] = {
            "dtype": storage.kind.name, "shape": [storage.count], "data_offsets": [start, stop],
        }  # fmt: skip
    if stop > max_bytes:
        raise RefusedError(f"its tensors take {stop} bytes, more than the {max_bytes} that are read")
    text = json.dumps(header).encode()
    chunks = [content(storage) for storage in used]  # what is missing is refused before anything is written
    out.write(len(text).to_bytes(8, "little") + text)
    for storage, chunk in zip(used, chunks, strict=True):
        left = storage.count * storage.kind.size
        for piece in chunk:
            left -= len(piece)
            out.write(piece)
        if left:
            raise RefusedError(f"storage {storage.key[:80]!r} ends {left} bytes before its size")
    out.flush()


def from_zip(file: IO[bytes], out: IO[bytes], max_bytes: int) -> None:
    """Copy the tensors of a file as torch has written it since 1.6: a zip of a pickle and of raw storages."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as cause:
        raise RefusedError(f"cannot be read as a zip: {str(cause)[:200]}") from None
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise RefusedError("is a zip that holds a name twice")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in entries.values()):
        raise RefusedError("is a compressed or encrypted zip; torch writes none")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in entries:
        raise RefusedError(
            "is a zip, but not of a pickle of tensors as torch.save writes it (a TorchScript program, perhaps)"
        )
    root = roots[0]
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise RefusedError("was written on a machine of another byte order; save it again on a common one")
    if entries[f"{root}data.pkl"].file_size > MAX_PICKLE:
        raise RefusedError(f"its pickle is longer than {MAX_PICKLE} bytes")

    def content(storage: Storage) -> Iterator[bytes]:
        info = entries.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.count * storage.kind.size:
            raise RefusedError(f"storage {storage.key[:80]!r} is missing, or of another size than the pickle says")
        return _pieces(archive.open(info), info.file_size)

    with archive.open(f"{root}data.pkl") as stream:
        value = unpickle(stream, {})
    write(out, tensors_of(value), content, max_bytes)


def from_legacy(file: IO[bytes], out: IO[bytes], max_bytes: int) -> None:
    """Copy the tensors of a file as torch wrote it before 1.6: pickles one after another, then raw storages."""
    if unpickle(file, {}) != _MAGIC or unpickle(file, {}) != _PROTOCOL:
        raise RefusedError("is a pickle, but not one that torch.save wrote")
    system = unpickle(file, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("was written on a machine of another byte order; save it again on a common one")
    storages: dict[str, Storage] = {}
    value = unpickle(file, storages)
    order = unpickle(file, {})
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(storages):
        raise RefusedError("its list of storages is not what its pickle refers to")
    places = {}
    for key in order:
        count = file.read(8)
        storage = storages[key]
        if len(count) != 8 or int.from_bytes(count, "little", signed=True) != storage.count:
            raise RefusedError(f"storage {key[:80]!r} is missing, or of another size than the pickle says")
        places[key] = file.tell()
        file.seek(storage.count * storage.kind.size, 1)

    def content(storage: Storage) -> Iterator[bytes]:
        file.seek(places[storage.key])
        return _pieces(file, storage.count * storage.kind.size, places[storage.key])

    write(out, tensors_of(value), content, max_bytes)


def _pieces(file: IO[bytes], size: int, start: int | None = None) -> Iterator[bytes]:
    """Yield a stretch of a file."""
    if start is not None:
        file.seek(start)
    while size > 0:
        try:
            piece = file.read(min(size, _CHUNK))
        except (zipfile.BadZipFile, OSError, EOFError) as cause:
            raise RefusedError(f"its zip is damaged: {str(cause)[:200]}") from None
        if not piece:
            return
        size -= len(piece)
        yield piece


def give_up_rights(memory: int, seconds: int) -> None:
    """Leave this process nothing but the files that are open, some memory and some seconds."""
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, 3),  # no file, no socket: all three are open
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    sys.addaudithook(_refuse_event)


def _refuse_event(event: str, _: Any) -> None:
    """Refuse whatever Python is told to do that reading does not need: open, import, compile, run, connect."""
    if not event.startswith("object.__"):
        raise RefusedError(f"led to {event}, which reading a file of tensors does not need")


def main() -> NoReturn:
    """Copy the tensors of standard input to standard output."""
    memory, seconds, max_bytes = (int(one) for one in sys.argv[1:4])
    file, out = sys.stdin.buffer, sys.stdout.buffer
    give_up_rights(memory, seconds)
    try:
        first = file.read(2)
        file.seek(0)
        (from_zip if first == b"PK" else from_legacy)(file, out, max_bytes)
    except RefusedError as refusal:
        _tell(refusal.message, refusal.problems)
    except MemoryError:
        _tell("asks for more memory than files of tensors need", ())
    except RecursionError:
        _tell("is nested too deeply", ())
    os._exit(0)  # what Python does at its end, the hook would refuse


def _tell(message: str, problems: tuple[str, ...]) -> NoReturn:
    sys.stderr.buffer.write(b"\n" + json.dumps({"message": message, "problems": problems}).encode() + b"\n")
    sys.stderr.flush()
    os._exit(REFUSED)


if __name__ == "__main__":
    main()
