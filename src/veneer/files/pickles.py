"""Pickles of tensors (`.bin`, `.pt`, `.pth`, `.ckpt`), opened only when asked for, in a process of no rights.

A pickle is a program. It is run by `veneer.files.unpickle` in a process of its own, where it can name a fixed list of
things that tensors are made of, none of them torch's own code; where no file can be opened, no socket made, no process
started, and memory and time end. What comes back is the bytes of a safetensors file, which are checked like any other.

Why not `torch.load(weights_only=True)`: it runs inside of torch, in the process that asks, and was got around before
(CVE-2025-32434, CVE-2026-24747; research: failures.md A01 to A03).
"""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapter import Adapter
from veneer.errors import AdapterError
from veneer.files import unpickle
from veneer.files.filesystem import REAL
from veneer.files.foreign import refuse
from veneer.files.format import Format, Hints, Sight
from veneer.files.peft import adapter_from_files
from veneer.files.peft_folder import CONFIG, MAX_CONFIG, TENSORS
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import MAX_FILE, MAX_HEADER, dump_tensors, non_finite, parse_header, parse_tensors

MEMORY = 1 << 30
"""Address space of the process, in bytes; storages pass through it in pieces."""
SECONDS = 120
"""Longest time of the process, of a processor and on the clock."""
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PEFT_BIN = "adapter_model.bin"

_CHUNK = 1 << 20
_CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")


def read_pickle(
    path: str | Path, *, max_bytes: int = MAX_FILE, memory: int = MEMORY, seconds: int = SECONDS
) -> dict[str, Tensor]:
    """Return the tensors of a pickle that `torch.save` wrote, on the CPU, without trusting the file.

    Equals, for files that can be trusted: `torch.load(path, map_location="cpu", weights_only=True)`, flat. A dictionary
    under a name such as `state_dict` is taken out of it, if nothing but notes stands beside.

    Args:
        path: The file.
        max_bytes: Longest file, and most bytes of tensors.
        memory: Address space of the process that opens it, in bytes.
        seconds: Longest time.

    Raises:
        AdapterError: If it is no dictionary of tensors, names anything but what they need, or asks for too much. No
            code of the file was run.

    Cost:
        A process, about 0.1 s; the file is read once; about four times its bytes in memory for a moment.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"x": torch.ones(2)}, f"{folder}/a.pt")
        ...     read_pickle(f"{folder}/a.pt")
        {'x': tensor([1., 1.])}
    """
    path = Path(path)
    try:
        if not REAL.is_plain_file(path.resolve()):
            raise AdapterError(f"{path}: not a regular file")
        if (size := REAL.size_of(path)) > max_bytes:
            raise AdapterError(f"{path}: expected at most {max_bytes} bytes, got {size}")
        data, told, code = _run(path, max_bytes, memory, seconds)
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    if code == unpickle.REFUSED:
        _raise_refusal(path, told)
    if code != 0:
        raise AdapterError(
            f"{path}: the process that opened it ended with {code}: it took over {memory >> 20} MiB or {seconds} s, or"
            " the file is made to break it; it is not read"
        )
    return _tensors(data, str(path), max_bytes)


def read_peft_bin(folder: str | Path, hints: Hints | None = None) -> Adapter:  # noqa: ARG001 (all formats take hints)
    """Read the folder of a LoRA adapter that PEFT wrote with `adapter_model.bin`, a pickle.

    Raises:
        AdapterError: If the pickle is refused, or anything in it is missing, unknown, unsupported or wrong.

    Example:
        read_peft_bin("old_adapter").config.rank
    """
    folder = Path(folder)
    try:
        settings = REAL.read_bytes(folder / CONFIG, MAX_CONFIG)
    except OSError as cause:
        raise AdapterError(f"{folder / CONFIG}: cannot be read: {cause}") from cause
    tensors = read_pickle(folder / PEFT_BIN)
    files = {CONFIG: _as_now(settings, f"{folder / CONFIG}"), TENSORS: dump_tensors(tensors)}
    return adapter_from_files(files, str(folder))


def _as_now(settings: bytes, where: str) -> bytes:
    """Return settings of 2023 as PEFT has written them since: heads that it trains by itself are named."""
    raw = parse_json(settings, where, max_bytes=MAX_CONFIG)
    if isinstance(raw, dict) and raw.get("task_type") in _CLASSIFICATION and raw.get("modules_to_save") is None:
        return dump_json({**raw, "modules_to_save": ["classifier", "score"]})
    return settings


def _recognise_peft_bin(sight: Sight) -> bool:
    return PEFT_BIN in sight.files and TENSORS not in sight.files and CONFIG in sight.files


FORMAT = Format("peft-bin", "PEFT with a pickle", _recognise_peft_bin, read_peft_bin, is_pickle=True)


def _run(path: Path, max_bytes: int, memory: int, seconds: int) -> tuple[bytes, bytes, int]:
    """Return what the process wrote, up to a limit, what it said is wrong, and how it ended."""
    command = [sys.executable, "-I", "-S", "-B", unpickle.__file__, str(memory), str(seconds), str(max_bytes)]
    most = max_bytes + MAX_HEADER + 8
    with path.open("rb") as file:
        child = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        data, told = bytearray(), b""
        try:
            with child:
                if child.stdout is not None and child.stderr is not None:
                    while len(data) <= most and (piece := child.stdout.read(_CHUNK)):
                        data += piece
                    if len(data) > most:
                        child.kill()
                    told = child.stderr.read(_CHUNK)
        finally:
            clock.cancel()
            child.kill()
    return bytes(data), told, child.returncode


def _raise_refusal(path: Path, told: bytes) -> None:
    try:
        said = json.loads(next(line for line in told.splitlines() if line.startswith(b"{")))
        message, problems = str(said["message"]), [str(one) for one in said["problems"]]
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        message, problems = "was refused", []
    raise AdapterError(f"{path}: {message}", problems)


def _tensors(data: bytes, where: str, max_bytes: int) -> dict[str, Tensor]:
    """Return the tensors that lie in storages, each in memory of its own; what the process said is not trusted."""
    header, _ = parse_header(data, where, len(data))
    storages = parse_tensors(data, where, finite=False)
    told = header.get("__metadata__") or {}
    views = parse_json(str(told.get("views", "")).encode(), f"{where} (tensors)", max_bytes=MAX_HEADER)
    if not isinstance(views, dict):
        raise AdapterError(f"{where}: the process that opened it gave no tensors")
    problems = [f"{name!r}: {problem}" for name, one in views.items() if (problem := _view_problem(one, storages))]
    if not problems:
        total = sum(math.prod(shape) * storages[key].element_size() for key, _, shape, _ in views.values())
        if total > max_bytes:
            problems = [f"they take {total} bytes, more than the {max_bytes} that are read"]
    refuse(where, "its tensors cannot be read", problems)
    tensors = {
        name: storages[key].as_strided(shape, strides, offset).clone().contiguous()
        for name, (key, offset, shape, strides) in sorted(views.items())
    }
    refuse(where, "weights must be finite; do not use this file", non_finite(tensors))
    return tensors


def _view_problem(view: Any, storages: dict[str, Tensor]) -> str | None:
    """Return why a tensor is no part of its storage, or None."""
    if not isinstance(view, list) or list(map(type, view)) != [str, int, list, list] or view[0] not in storages:
        return "expected a storage, an offset, sizes and strides"
    key, offset, shape, strides = view
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or any(type(one) is not int or not 0 <= one < 2**53 for one in numbers):
        return "expected an offset, and as many sizes as strides, from 0"
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= len(storages[key]):
        return f"shape {tuple(shape)} from {offset} on leaves its storage of {len(storages[key])} values"
    return None
