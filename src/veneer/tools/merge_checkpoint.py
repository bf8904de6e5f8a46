"""Adapters merged into a checkpoint's files, shard by shard, in the memory of a few tensors.

Nothing of transformers is needed: names come from the files. What proves the result is given by the caller, see
`veneer.scoring.merge_checkpoint`.
"""

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError, OutputError
from veneer.files.commit import commit_folder
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import MANIFEST, FileRecord
from veneer.files.pieces import OnBytes
from veneer.files.shards import (
    CONFIG,
    MAX_INDEX,
    Checkpoint,
    Edit,
    copy_file,
    read_checkpoint,
    read_config,
    write_shard,
)
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import DTYPES
from veneer.storage.plain import DTYPES as PLAIN
from veneer.tools.merge_checkpoint_plan import Plan, Work, dtype_of, make_plan, refuse_quantised_config, sum_adapters
from veneer.tools.merge_checkpoint_record import RECORD, CheckpointMerge
from veneer.tools.merge_checkpoint_ties import typed_config, untied_config
from veneer.tools.merge_checkpoint_weights import PIECE, add_update, converted, plan_update, workers
from veneer.tools.merge_record import MergedModule, ProbeResult
from veneer.tools.merge_weights import Change

KIND = "merged"

Prove = Callable[[Path], ProbeResult]
"""From the folder of merged files, not yet committed, to what a probe of them found; it raises where they are wrong."""

_UNASKED = ProbeResult(False, "not asked for")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite")


def merge_files(
    base: str | Path,
    parts: Sequence[tuple[Adapter, float]],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    any_base: bool = False,
    prove: Prove | ProbeResult | None = _UNASKED,
    on_bytes: OnBytes | None = None,
    replace: bool = False,
) -> CheckpointMerge:
    """Write a checkpoint with adapters merged in: the same shards, the same index, all other files beside them.

    For each weight W that the adapters change, whatever its form:

        W = round_once(W + Σ weight · scaling · lora_B @ lora_A)      # float64's result, one rounding

    Tensors that no adapter names are copied byte for byte. Where head and table are one tensor and the adapters change
    one of them, they are untied, and `config.json` says so.

    Args:
        base: Folder with `model.safetensors`, or with shards and their index.
        parts: Adapters, each with its weight.
        out: The folder to make.
        dtype: What all floating weights are stored in; None leaves them as they are.
        any_base: Merge even where the adapter's file carries other base weights.
        prove: Is asked for a proof of the files before they are committed; or what the record says instead. Either way
            every file is read back from the disk while the next piece is made; None leaves that out too.
        on_bytes: Told how many bytes of weights were written, as they are.
        replace: Put the new folder in the place of one that exists.

    Returns:
        What was done; the same is in `veneer_merge.json` beside the weights.

    Raises:
        AdapterError: If an adapter does not fit the files, cannot be weighted, or a merged weight leaves the range of
            its dtype.
        BaseModelError: If the base's files are not what they say, or quantised.
        TargetError: If a tie cannot be undone in a saved configuration.
        OutputError: If the folder exists, or the disk refuses. All is as it was then.

    Cost:
        One pass over the files, which takes 1.2 to 1.5 times what copying them does, a tenth more with reading back
        (benchmarks/README.md). Memory: the adapters and some MB; the largest tensor a few times, where it cannot be
        changed a piece at a time: magnitudes, float32, rows of a table.

    Example:
        merge_files("models/llama", [(load_adapter("runs/a/adapter"), 1.0)], "models/llama-a")

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1, for the sum.
    """
    return carry_out(Order(Path(base), parts, Path(out), dtype_of(dtype), any_base, prove, on_bytes, replace))


@dataclass(frozen=True)
class Order:
    """A merge as it is asked for; see `merge_files` for what each part means."""

    base: Path
    parts: Sequence[tuple[Adapter, float]]
    out: Path
    dtype: torch.dtype | None = None
    any_base: bool = False
    prove: Prove | ProbeResult | None = _UNASKED
    on_bytes: OnBytes | None = None
    replace: bool = False


def carry_out(order: Order, fs: FileSystem = REAL) -> CheckpointMerge:
    """Do what `merge_files` does, wherever its files lie."""
    base, parts, out, prove = order.base, order.parts, order.out, order.prove
    refuse_quantised_config(str(base), read_config(base, fs=fs))
    checkpoint, adapter = read_checkpoint(base, fs=fs), sum_adapters(parts)
    beside = fs.list_files(base)  # before the new folder is made, which may lie inside
    job = _Job(
        checkpoint,
        make_plan(checkpoint, adapter, any_base=order.any_base),
        order.dtype,
        beside,
        fs,
        order.on_bytes,
        read_back=prove is not None,
    )
    _check_place(job, out)
    _check_room(job, out)
    record: CheckpointMerge | None = None

    def write(folder: Path) -> Mapping[str, FileRecord]:
        nonlocal record
        written = _write_all(job, folder)
        proved = prove(folder) if callable(prove) else prove
        record = _record(job, parts, written, proved)
        fs.write_bytes(folder / RECORD, dump_json(record.to_json()))
        return written

    notes = {"adapters": [[one.digest, weight] for one, weight in parts], "base": base.name}
    commit_folder(out, write, kind=KIND, notes=notes, replace=order.replace, trusted=True, fs=fs)
    assert record is not None
    return record


@dataclass
class _Job:
    """What is to be done, and what was."""

    checkpoint: Checkpoint
    plan: Plan
    dtype: torch.dtype | None
    beside: list[str]
    fs: FileSystem
    on_bytes: OnBytes | None
    read_back: bool
    modules: dict[str, MergedModule] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    inputs: dict[str, FileRecord] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Files of weights."""
        return list(self.checkpoint.metadata)

    def stored_in(self, source: str) -> torch.dtype:
        """Return what a tensor made from a stored one is written in."""
        stored = DTYPES[self.checkpoint.tensors[source].dtype]
        return self.dtype if self.dtype is not None and stored in PLAIN else stored

    def edits(self, file: str) -> dict[str, Edit]:
        """Return the edits of a file's tensors, and of new ones that stand in it."""
        edits = {}
        for name, place in self.checkpoint.tensors.items():
            if place.file == file and name not in self.plan.works and self.stored_in(name) != DTYPES[place.dtype]:
                edits[name] = _conversion(name, self.stored_in(name))
        for name, work in self.plan.works.items():
            if self.file_of(name) == file:
                edits[name] = _edit(self, name, work)
        return edits

    def file_of(self, name: str) -> str:
        """Return the file that a tensor stands in, or that of what it is made from."""
        known = self.checkpoint.tensors
        return known[name].file if name in known else known[self.plan.works[name].source].file

    def size_of(self, name: str) -> int:
        """Return how many bytes a tensor is written in."""
        known = self.checkpoint.tensors
        source = name if name in known else self.plan.works[name].source
        return known[source].size // DTYPES[known[source].dtype].itemsize * self.stored_in(source).itemsize


def _conversion(name: str, dtype: torch.dtype) -> Edit:
    return Edit(name, dtype, lambda stored, _: converted(stored, dtype, name), PIECE)


def _edit(job: _Job, name: str, work: Work) -> Edit:
    dtype = job.stored_in(work.source)
    if work.pair is not None:
        return _addition(job, name, work, work.pair, dtype)

    def make(stored: Tensor, _: int) -> Tensor:
        job.trained.append(name)
        if work.whole is not None:
            return _finite(converted(work.whole, dtype, work.path), work.path)
        out = converted(stored, dtype, name)
        if work.rows is not None:
            out[list(work.rows.indices)] = _finite(converted(work.rows.rows, dtype, work.path), work.path)
        return out

    return Edit(work.source, dtype, make)


def _addition(job: _Job, name: str, work: Work, pair: LowRank, dtype: torch.dtype) -> Edit:
    """Return the edit that adds an update: a piece at a time where that can be, else to all of the weight."""
    place = job.checkpoint.tensors[work.source]
    shape, was = place.shape, DTYPES[place.dtype]
    update = plan_update(shape, was, dtype, pair, work.path, swapped=work.swapped)

    def note(change: Change) -> None:
        figures = (change.largest, change.relative, change.rounding_loss, change.unchanged)
        stored, became = (str(one).removeprefix("torch.") for one in (was, dtype))
        job.modules[name] = MergedModule(work.path, pair.form, stored, became, *figures)

    def make(stored: Tensor, start: int) -> Tensor:
        if update is None:
            out = stored if was == dtype else torch.empty(shape, dtype=dtype)
            note(add_update(stored, out, pair, work.path, swapped=work.swapped))
            return out
        out = update.add(stored, start)
        if start + len(stored) == math.prod(shape):
            note(update.change())
        return out

    return Edit(work.source, dtype, make, None if update is None else update.step)


def _finite(value: Tensor, path: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise AdapterError(f"{path}: what the adapter trained leaves the range of {value.dtype}")
    return value


def _write_all(job: _Job, folder: Path) -> dict[str, FileRecord]:
    """Write all files; return what was written of each."""
    fs, base = job.fs, job.checkpoint.folder
    written = _write_weights(job, folder)
    changed = _changed_files(job)
    for name, content in changed.items():
        fs.write_bytes(folder / name, content)
    for name in job.beside:
        if name in written or name in changed or name in (MANIFEST, RECORD):
            continue
        if name.lower().endswith(_WEIGHTS) or name.startswith(".") or "/." in name or fs.is_folder(base / name):
            job.left_out.append(name)
            continue
        fs.make_parents((folder / name).parent)
        written[name] = copy_file(base / name, folder / name, fs=fs)
        job.copied.append(name)
    return written


def _write_weights(job: _Job, folder: Path) -> dict[str, FileRecord]:
    """Write the files of weights, as many at a time as there are cores; where cores are left, each in several lanes."""
    cores, stopped = min(os.cpu_count() or 1, 8), threading.Event()
    count = min(cores, len(job.files))

    def write(file: str) -> tuple[FileRecord, FileRecord]:
        options: dict[str, Any] = {"lanes": count < cores, "read_back": job.read_back, "fs": job.fs, "on_bytes": tell}
        return write_shard(job.checkpoint, file, folder / file, job.edits(file), **options)

    def tell(size: int) -> None:
        if stopped.is_set():
            raise CancelledError  # something went wrong with another file, or somebody wants to end
        if job.on_bytes is not None:
            with telling:
                job.on_bytes(size)

    telling = threading.Lock()
    with workers(count) as pool:
        try:
            every = {file: pool.submit(write, file) for file in job.files}
            for one in wait(every.values(), return_when=FIRST_EXCEPTION).done:
                one.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    job.inputs = {file: one.result()[0] for file, one in every.items()}
    return {file: one.result()[1] for file, one in every.items()}


def _changed_files(job: _Job) -> dict[str, bytes]:
    """Return configuration and index, where they say something else now."""
    changed: dict[str, bytes] = {}
    config: dict[str, Any] = dict(job.checkpoint.config)
    if job.plan.untied is not None:
        config = untied_config(config)
    if job.dtype is not None:
        config = typed_config(config, job.dtype)
    if config != job.checkpoint.config:
        changed[CONFIG] = dump_json(config)
    named = job.checkpoint.index
    names = [*job.checkpoint.tensors, *(name for name in job.plan.works if name not in job.checkpoint.tensors)]
    if named is not None and (len(names) > len(job.checkpoint.tensors) or job.dtype is not None):
        path = job.checkpoint.folder / named
        index = parse_json(job.fs.read_bytes(path, MAX_INDEX), str(path), max_bytes=MAX_INDEX)
        metadata = dict(index["metadata"]) if isinstance(index.get("metadata"), dict) else {}
        if "total_size" in metadata:
            metadata["total_size"] = sum(job.size_of(name) for name in names)
        if job.plan.untied is not None and isinstance(metadata.get("total_parameters"), int):
            head = job.checkpoint.tensors[job.plan.untied.table].shape
            metadata["total_parameters"] += 0 if job.plan.untied.stored else head[0] * head[1]
        changed[named] = dump_json({**index, "metadata": metadata, "weight_map": {n: job.file_of(n) for n in names}})
    return changed


def _check_place(job: _Job, out: Path) -> None:
    """Raise where the new folder would lie in one whose manifest does not know it, such as a converted base's."""
    base = job.checkpoint.folder.resolve()
    if out.resolve().is_relative_to(base) and job.fs.exists(base / MANIFEST):
        raise OutputError(
            f"{out}: lies in the base's own folder, whose {MANIFEST} would not vouch for it; choose another"
        )


def _check_room(job: _Job, out: Path) -> None:
    """Raise before any work where the disk has no room for the weights."""
    names = {*job.checkpoint.tensors, *job.plan.works}
    size = sum(job.size_of(name) for name in names)
    parent = Path(os.path.abspath(out)).parent  # noqa: PTH100 - a link is not followed, as the commit does not
    while not job.fs.exists(parent):
        parent = parent.parent
    free = job.fs.free_bytes(parent)
    if size > free:
        raise OutputError(
            f"{out}: could not be written: it takes {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there; "
            "make room"
        )


def _record(
    job: _Job, parts: Sequence[tuple[Adapter, float]], written: Mapping[str, FileRecord], proved: ProbeResult | None
) -> CheckpointMerge:
    untied = job.plan.untied
    return CheckpointMerge(
        base=str(job.checkpoint.folder),
        adapters=tuple((one.digest, weight) for one, weight in parts),
        dtype=None if job.dtype is None else str(job.dtype).removeprefix("torch."),
        inputs=dict(sorted(job.inputs.items())),
        outputs={file: written[file] for file in sorted(job.files)},
        modules=tuple(job.modules[name] for name in sorted(job.modules)),
        trained=tuple(sorted(job.trained)),
        untied=() if untied is None else (untied.head,),
        untouched=sum(name not in job.plan.works for name in job.checkpoint.tensors),
        copied=tuple(sorted(job.copied)),
        left_out=tuple(sorted(job.left_out)),
        read_back=job.read_back,
        probe=_UNASKED if proved is None else proved,
    )
