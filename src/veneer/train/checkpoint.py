"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint folder holds the adapter in PEFT's layout, so that it can be used as it is, and beside it the optimiser's
moments and a few counters. The order of the rows and all that is drawn at random need no state: both are functions of
the seed and the step.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import DamagedArtefactError, OutputError
from veneer.files.filesystem import REAL, Content, FileSystem
from veneer.files.peft import adapter_pieces, adapter_to_files, load_adapter
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import read_tensors, tensor_pieces
from veneer.nn.attach import Attachment
from veneer.nn.slots import Slot
from veneer.train.keeping import commit_checkpoint, step_of, try_checkpoint
from veneer.train.optimizer import FlatAdamW
from veneer.train.trend import Trend

_STATE, _TENSORS = "state.json", "optimizer.safetensors"


@dataclass
class TrainState:
    """Where a run is.

    Args:
        step: Optimiser steps done.
        evaluated: The step after which the last evaluation was done; -1 before the first.
        tokens: Tokens seen.
        seconds: Seconds spent in steps.
        loss: Training loss of the last step.
        eval_loss_before: Evaluation loss before the first step.
        eval_loss: Evaluation loss of the last evaluation.
        best_eval_loss: Lowest evaluation loss after a step.
        stale_evaluations: Evaluations since then.
        token_limit: Most tokens of a micro-batch, where memory did not suffice for the configured budget.
        trend: The course of the training loss.
        spikes: Steps whose loss lay far above it.
        inexact: Why the run is not the one that was begun: what it was gone on with by force.
    """

    step: int = 0
    evaluated: int = -1
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    stale_evaluations: int = 0
    token_limit: int | None = None
    trend: Trend = field(default_factory=Trend)
    spikes: list[int] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)


def save_checkpoint(
    folder: Path, adapter: Adapter, optimizer: FlatAdamW, state: TrainState, keep: int, *, fs: FileSystem = REAL
) -> Path:
    """Commit a checkpoint of a step, read it back, and only then remove all but the newest ones.

    Args:
        folder: The run's `checkpoints` folder.
        adapter: The adapter as it is.
        optimizer: Gives the moments.
        state: Where the run is.
        keep: How many stay, at least two.
        fs: Where it lies.

    Raises:
        OutputError: If it cannot be written; older checkpoints stand.
        DamagedArtefactError: If the disk does not give back what was written; older checkpoints stand.

    Cost:
        benchmarks/results/checkpoint.json.
    """
    files: dict[str, Content] = {**adapter_pieces(adapter), _STATE: dump_json(asdict(state))}
    files[_TENSORS] = tensor_pieces(optimizer.state())
    with ThreadPoolExecutor(1) as hashing:  # beside the writing, in memory
        digest = hashing.submit(lambda: adapter.digest)

        def notes() -> dict[str, Any]:
            return {"adapter": digest.result(), "exact": not state.inexact}

        return commit_checkpoint(folder, state.step, files, notes, keep, fs=fs)


def check_room(folder: Path, adapter: Adapter, keep: int, *, fs: FileSystem = REAL) -> None:
    """Prove before the first step that checkpoints of an adapter can be written, by writing one as large.

    Raises:
        OutputError: If there is no room, or the disk refuses.
        DamagedArtefactError: If the disk does not give back what was written.
    """
    tensors = {f"{name}.{moment}": one for name, one in adapter.tensors().items() for moment in ("first", "second")}
    try_checkpoint(folder, {**adapter_to_files(adapter), _TENSORS: tensor_pieces(tensors)}, keep, fs=fs)


def load_checkpoint(path: Path, attachment: Attachment, optimizer: FlatAdamW) -> TrainState:
    """Put a checkpoint's values into an attached adapter and its optimiser, in place.

    The adapter began as the checkpoint's did: what is fixed (ranks, parts, scalings) is checked, what trains and the
    frozen halves of a compensated start are taken from the checkpoint, bit for bit.

    Returns:
        Where the run was.

    Raises:
        OutputError: If its parameters are not those of the attached adapter.
        DamagedArtefactError: If a counter or a moment is missing, of another kind, or not known.
    """
    state = _read_state(path / _STATE)
    if state.step != step_of(path):
        raise DamagedArtefactError(f"{path / _STATE}: expected step {step_of(path)}, got {state.step}")
    adapter = load_adapter(path)
    saved, slots = adapter.tensors(), {target.path: attachment.slot(target) for target in attachment.targets}
    in_slots = {f"{one}.{name}": each for one, slot in slots.items() for name, each in slot.pair().tensors().items()}
    others = {name: one for name, one in attachment.parameters().items() if name not in in_slots}
    problems = _differences({**in_slots, **others}, saved)
    if problems:
        raise OutputError(f"{path} holds other parameters than the attached adapter", problems)
    for module, slot in slots.items():
        _take(slot, adapter.modules[module])
    for name, parameter in others.items():
        parameter.data.copy_(saved[name])
    optimizer.load_state(read_tensors(path / _TENSORS, finite=False), state.step)
    return state


def _read_state(path: Path) -> TrainState:
    """Read the counters; all of them must be there, and of their kind."""
    try:
        data = REAL.read_bytes(path)
    except OSError as error:
        raise DamagedArtefactError(f"{path} cannot be read: {error}") from None
    raw = parse_json(data, str(path), error=DamagedArtefactError)
    _check_fields(TrainState, raw, str(path))
    _check_fields(Trend, raw["trend"], f"{path}: trend")
    return TrainState(**{**raw, "trend": Trend(**raw["trend"])})


def _check_fields(kind: type[TrainState | Trend], raw: Any, where: str) -> None:
    expected: dict[str, Any] = {one.name: one.type for one in fields(kind)}
    if not isinstance(raw, dict):
        raise DamagedArtefactError(f"{where}: expected an object of {', '.join(expected)}")
    problems = [f"{name}: missing" for name in expected if name not in raw]
    problems += [f"{name}: not known" for name in raw if name not in expected]
    accepted: dict[Any, Any] = {Trend: dict, list[int]: list, list[str]: list}
    for name, value in raw.items():
        of: Any = accepted.get(expected.get(name), expected.get(name, object))
        if isinstance(value, bool) or not isinstance(value, of):
            problems.append(f"{name}: {value!r} is of another kind")
    if problems:
        raise DamagedArtefactError(f"{where}: cannot be gone on from", problems)


def _differences(attached: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each tensor that is not in both, or of another shape."""
    names = dict.fromkeys([*attached, *saved])
    shapes = [{name: tuple(one.shape) for name, one in tensors.items()} for tensors in (attached, saved)]
    pairs = {name: [of.get(name) for of in shapes] for name in names}
    return [f"{name}: attached {now}, saved {before}" for name, (now, before) in pairs.items() if now != before]


def _take(slot: Slot, pair: LowRank) -> None:
    """Put values into a slot, cut as a slot cuts them: into halves where one is frozen, into parts."""
    now = slot.pair()
    cut = Slot(replace(pair, form=now.form, frozen_rank=now.frozen_rank), parts=slot.parts, dtype=slot.lora_A.dtype)
    for into, values in ((slot.trainable(), cut.trainable()), (_frozen(slot), _frozen(cut))):
        for name, tensor in values.items():
            into[name].data.copy_(tensor)


def _frozen(slot: Slot) -> dict[str, Tensor]:
    named = {"frozen_A": slot.frozen_A, "frozen_B": slot.frozen_B}
    return {name: one for name, one in named.items() if one is not None}
