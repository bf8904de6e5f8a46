"""A merged checkpoint written as one GGUF file that llama.cpp loads, tensor by tensor, every one read back."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.errors import ConfigError, DamagedArtefactError, OutputError
from veneer.files.commit import commit_file
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.gguf_container import (
    Head,
    dump_gguf_head,
    padding,
    read_gguf_head,
    read_gguf_tensor,
)
from veneer.files.gguf_model import CONSTANTS, FILE_TYPES, Laid, lay_out, matrix_dtype, model_fields
from veneer.files.manifest import FileRecord
from veneer.files.pieces import OnBytes, write_pieces
from veneer.files.shards import Checkpoint, read_checkpoint, read_tensor
from veneer.tools.merge_checkpoint_plan import dtype_of
from veneer.tools.merge_checkpoint_weights import converted
from veneer.tools.merge_record import ProbeResult

Prove = Callable[[Path], ProbeResult]
"""From the written file, which does not bear its name yet, to what a probe of it found; it raises where it is wrong."""

_UNASKED = ProbeResult(False, "not asked for")


@dataclass(frozen=True)
class GgufExport:
    """What was written as GGUF.

    Args:
        out: The file.
        like: The GGUF file that metadata and tokenizer are from.
        architecture: llama.cpp's name of the family.
        dtype: Of the matrices.
        tensors: How many were written, each read back and compared with the checkpoint's, bit for bit.
        constants: Those that are the other file's: no checkpoint holds them.
        file: Size and SHA-256.
        probe: What the checkpoint and the file computed.
    """

    out: str
    like: str
    architecture: str
    dtype: str
    tensors: int
    constants: tuple[str, ...]
    file: FileRecord
    probe: ProbeResult

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Plan:
    """What a file is to hold."""

    checkpoint: Checkpoint
    like: Path
    source: Head
    dtype: torch.dtype
    laid: Mapping[str, Laid]
    constants: tuple[str, ...]
    fs: FileSystem

    def head(self) -> bytes:
        """Return what stands before the values."""
        entries = {name: (one.dtype, one.shape) for name, one in self.laid.items()}
        entries |= {name: (torch.float32, self.source.tensors[name].shape) for name in self.constants}
        return dump_gguf_head(model_fields(self.source, self.dtype), entries)

    def size(self) -> int:
        """Return about how many bytes the file takes: those of its values."""
        return sum(prod(one.shape) * one.dtype.itemsize for one in self.laid.values())

    def constant(self, name: str) -> Tensor:
        """Return a tensor of the other file."""
        return converted(read_gguf_tensor(self.like, self.source, name, fs=self.fs), torch.float32, name)


def check_gguf(
    folder: str | Path,
    like: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
    fs: FileSystem = REAL,
) -> None:
    """Raise what `export_gguf` would raise before it begins, without writing anything.

    Raises:
        AdapterError, BaseModelError, ConfigError, MissingDependencyError, OutputError: As there.

    Cost:
        Reads headers, no values.

    Example:
        check_gguf("models/llama", "llama.gguf", "llama-a.gguf")
    """
    _check_target(Path(out), _plan(Path(folder), Path(like), dtype, fs), replace)


def export_gguf(
    folder: str | Path,
    like: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    prove: Prove | ProbeResult = _UNASKED,
    on_bytes: OnBytes | None = None,
    replace: bool = False,
    fs: FileSystem = REAL,
) -> GgufExport:
    """Write a checkpoint as one GGUF file that llama.cpp and transformers load.

    Names, order of rows and what is added to norms are those of llama.cpp's converter; every tensor is read back from
    the written file and compared, bit for bit, with the checkpoint's, before the file gets its name.

    Args:
        folder: The checkpoint, such as a merge made it.
        like: A GGUF file of the same base, of any type: its metadata and its tokenizer are taken.
        out: The file to make.
        dtype: Of matrices: float32, float16 or bfloat16; None takes that of the checkpoint. Vectors are float32.
        prove: Is asked for a proof of the file, see `veneer.gguf_proof`; or what the result says instead.
        on_bytes: Told how many bytes were written, as they are.
        replace: Put it in the place of a file that exists.
        fs: Where all of it lies.

    Raises:
        AdapterError: If the family is not known, the two are not of one base, or a weight leaves the range of the
            dtype.
        BaseModelError: If the checkpoint's files are not what they say, or quantised.
        ConfigError: If the dtype is unknown.
        DamagedArtefactError: If what is read back is not what was to be written.
        MissingDependencyError: If the `gguf` package is not installed, which holds the names.
        OutputError: If the file exists, or the disk refuses. Nothing is left then.

    Cost:
        Reads the checkpoint twice and the file once. Memory: about three times the largest tensor.

    Example:
        export_gguf("models/llama-a", "models/llama.gguf", "models/llama-a.gguf", dtype="float16").tensors

    Source:
        llama.cpp, `convert_hf_to_gguf.py`. Differs from it: the tokenizer is another file's, as is the metadata.
    """
    out = Path(out)
    plan = _plan(Path(folder), Path(like), dtype, fs)
    _check_target(out, plan, replace)
    found: tuple[FileRecord, ProbeResult] | None = None

    def write(path: Path) -> None:
        nonlocal found
        record = write_pieces(path, _pieces(plan), read_back=False, fs=fs, on_bytes=on_bytes)
        _read_back(path, plan)
        found = record, prove if isinstance(prove, ProbeResult) else prove(path)

    fs.make_parents(Path(os.path.abspath(out)).parent)  # noqa: PTH100 - a link is not followed, as the commit does not
    commit_file(out, write, size=plan.size(), fs=fs)
    assert found is not None
    return GgufExport(
        out=str(out),
        like=str(like),
        architecture=str(plan.source.fields["general.architecture"]),
        dtype=str(plan.dtype).removeprefix("torch."),
        tensors=len(plan.laid),
        constants=plan.constants,
        file=found[0],
        probe=found[1],
    )


def _plan(folder: Path, like: Path, dtype: str | torch.dtype | None, fs: FileSystem) -> _Plan:
    checkpoint, source = read_checkpoint(folder, fs=fs), read_gguf_head(like, fs=fs)
    kind = dtype_of(dtype) or matrix_dtype(checkpoint)
    if kind not in FILE_TYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in FILE_TYPES)
        raise ConfigError(f"dtype must be one of {known} for GGUF, got {str(kind).removeprefix('torch.')!r}")
    laid = lay_out(checkpoint, source, str(like), kind)
    constants = tuple(name for name in source.tensors if name in CONSTANTS)
    return _Plan(checkpoint, like, source, kind, laid, constants, fs)


def _check_target(out: Path, plan: _Plan, replace: bool) -> None:
    """Raise before any work where the file exists, or the disk has no room for it."""
    fs = plan.fs
    if fs.exists(out) and not replace:
        raise OutputError(f"{out}: exists already; choose another name")
    if fs.is_folder(out):
        raise OutputError(f"{out}: expected a file to write, but a folder is there; choose another name")
    parent = Path(os.path.abspath(out)).parent  # noqa: PTH100 - as above
    while not fs.exists(parent):
        parent = parent.parent
    if plan.size() > (free := fs.free_bytes(parent)):
        raise OutputError(
            f"{out}: could not be written: it takes {plan.size() / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there; "
            "make room"
        )


def _stored(plan: _Plan, one: Laid, source: str) -> Tensor:
    """Return a stored tensor, rounded once to what it is written in."""
    return converted(read_tensor(plan.checkpoint, source, fs=plan.fs), one.dtype, source)


def _pieces(plan: _Plan) -> Iterator[memoryview]:
    yield memoryview(plan.head())
    for one in plan.laid.values():
        for source in one.sources:
            yield _bytes(one.lay(_stored(plan, one, source))).data
        yield _gap(prod(one.shape) * one.dtype.itemsize)
    for name in plan.constants:
        values = plan.constant(name)
        yield _bytes(values).data
        yield _gap(values.nbytes)


def _gap(size: int) -> memoryview:
    return memoryview(bytes(padding(size)))


def _read_back(path: Path, plan: _Plan) -> None:
    """Raise unless a file holds what it should: each tensor found by what the file says, and put back in order."""
    head, problems = read_gguf_head(path, fs=plan.fs), []
    fields = model_fields(plan.source, plan.dtype)
    problems += [f"{key}: not what was written" for key, value in fields.items() if head.packed.get(key) != value]
    if list(head.tensors) != [*plan.laid, *plan.constants]:
        problems.append("it holds other tensors than were written")
    for name, one in plan.laid.items():
        laid = read_gguf_tensor(path, head, name, fs=plan.fs)
        parts = laid.unbind() if len(one.sources) > 1 else [laid]
        for source, part in zip(one.sources, parts, strict=True):
            stored = _stored(plan, one, source)
            if one.half is not None:
                stored = stored.chunk(2, 1)[one.half]
            if not _same(one.lift(part), stored + one.shift if one.shift else stored):
                problems.append(f"{name!r}: is not {source!r} of the checkpoint")
    problems += [
        f"{name!r}: is not that of {plan.like}"
        for name in plan.constants
        if not _same(read_gguf_tensor(path, head, name, fs=plan.fs), plan.constant(name))
    ]
    if problems:
        raise DamagedArtefactError(f"{path}: does not hold what was written to it (it was removed)", problems)


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same bits; shapes may differ by axes of one."""
    return one.dtype == other.dtype and np.array_equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> "np.ndarray[Any, Any]":
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
