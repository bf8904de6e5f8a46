"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint folder holds the adapter in PEFT's layout, so that it can be used as it is, and beside it the optimiser's
moments, the random state and a few counters. The order of the rows needs no state: it is a function of the seed.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import DamagedArtefactError, OutputError, VeneerError
from veneer.files.commit import commit_folder, verify_folder
from veneer.files.filesystem import REAL
from veneer.files.peft import adapter_to_files, load_adapter
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import dump_tensors, read_tensors
from veneer.nn.attach import Attachment
from veneer.nn.slots import Slot
from veneer.train.optimizer import FlatAdamW

_NAME = re.compile(r"step-(\d{6,})")
_STATE, _TENSORS, _RANDOM = "state.json", "optimizer.safetensors", "random_state"


@dataclass
class TrainState:
    """Where a run is.

    Args:
        step: Optimiser steps done.
        tokens: Tokens seen.
        seconds: Seconds spent in steps.
        best_eval_loss: Lowest evaluation loss so far.
        stale_evaluations: Evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_eval_loss: float | None = None
    stale_evaluations: int = 0


def save_checkpoint(
    folder: Path, adapter: Adapter, optimizer: FlatAdamW, state: TrainState, random_state: Tensor, keep: int
) -> Path:
    """Commit a checkpoint of a step; then remove all but the newest ones.

    Args:
        folder: The run's `checkpoints` folder.
        adapter: The adapter as it is.
        optimizer: Gives the moments.
        state: Where the run is.
        random_state: Of torch's CPU generator, before the next step.
        keep: How many stay.

    Raises:
        OutputError: If it cannot be written; older checkpoints stand.
    """
    target = folder / f"step-{state.step:06d}"
    files = adapter_to_files(adapter)
    files[_STATE] = dump_json(asdict(state))
    files[_TENSORS] = dump_tensors({**optimizer.state(), _RANDOM: random_state})
    commit_folder(target, files, kind="checkpoint", notes={"adapter": adapter.digest, "step": state.step}, replace=True)
    for old in checkpoints(folder)[:-keep]:
        REAL.remove_tree(old)
    return target


def forget_checkpoints_after(folder: Path, step: int) -> None:
    """Remove checkpoints behind a step: damaged ones that were passed over, whose steps will be done again."""
    for path in checkpoints(folder):
        if int(path.name.partition("-")[2]) > step:
            REAL.remove_tree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that its manifest vouches for, and a line for each newer one that is damaged."""
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            if verify_folder(path) is None:
                raise DamagedArtefactError(f"{path} has no MANIFEST.json")
        except VeneerError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def load_checkpoint(path: Path, attachment: Attachment, optimizer: FlatAdamW) -> tuple[TrainState, Tensor]:
    """Put a checkpoint's values into an attached adapter and its optimiser, in place.

    The adapter began as the checkpoint's did: what is fixed (ranks, parts, scalings) is checked, what trains and the
    frozen halves of a compensated start are taken from the checkpoint, bit for bit.

    Returns:
        Where the run was, and the random state to go on with.

    Raises:
        OutputError: If its parameters are not those of the attached adapter.
    """
    state = TrainState(**parse_json((path / _STATE).read_bytes(), str(path / _STATE), error=DamagedArtefactError))
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
    moments = read_tensors(path / _TENSORS)
    random_state = moments.pop(_RANDOM)
    if moments:
        optimizer.load_state(moments, state.step)
    return state, random_state


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
