"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint folder holds the adapter in PEFT's layout, so that it can be used as it is, and beside it the optimiser's
moments, the random state and a few counters. The order of the rows needs no state: it is a function of the seed.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from veneer.adapter import Adapter
from veneer.errors import DamagedArtefactError, OutputError, VeneerError
from veneer.files.commit import commit_folder, verify_folder
from veneer.files.filesystem import REAL
from veneer.files.peft import adapter_to_files, load_adapter
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import dump_tensors, read_tensors
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


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: FlatAdamW) -> tuple[TrainState, Tensor]:
    """Put a checkpoint's values into the attached parameters and the optimiser, in place.

    Returns:
        Where the run was, and the random state to go on with.

    Raises:
        OutputError: If its parameters are not those of the attached adapter.
    """
    state = TrainState(**parse_json((path / _STATE).read_bytes(), str(path / _STATE), error=DamagedArtefactError))
    tensors = load_adapter(path).tensors()
    if set(tensors) != set(parameters):
        raise OutputError(
            f"{path} holds other parameters than the attached adapter", sorted(set(tensors) ^ set(parameters))
        )
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    moments = read_tensors(path / _TENSORS)
    random_state = moments.pop(_RANDOM)
    if moments:
        optimizer.load_state(moments, state.step)
    return state, random_state
