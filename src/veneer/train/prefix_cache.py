"""What the frozen lowest layers give for each row: computed when it is first asked for, and kept for later epochs.

Rows are computed in fixed groups, those in which the first epoch meets them: matrix products of few rows may add in
another order, so a row's last bits depend on its batch. With fixed groups they do not depend on when a run was
stopped and gone on with.

Shapes: T tokens of all rows, D hidden.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.base.prefix import PrefixStates, check_prefix, prefix_layers, prefix_states, sole_layers
from veneer.config import TrainConfig
from veneer.data.batches import Step, make_batch, pack
from veneer.data.encode import EncodedRow
from veneer.errors import BaseModelError, OutputError
from veneer.files.filesystem import REAL
from veneer.files.memory import free_memory_bytes
from veneer.scoring.loss import Recall
from veneer.train.prepare import PreparedData

log = logging.getLogger("veneer")

_SHARE = 4
"""One part in so many of the free memory may be used without being asked for."""


@dataclass(frozen=True)
class Recalls:
    """What gives the lowest layers' states of rows by their numbers; None where all layers are run."""

    train: Recall | None = None
    eval: Recall | None = None


class PrefixCache:
    """The states of rows above the lowest layers.

    Args:
        model: The model, within `ragged_attention`.
        rows: The rows.
        groups: Row numbers that are computed together; each row stands in one of them.
        num_layers: How many layers are run.
        flat_TD: Where the states are kept, on the CPU; its values are not read before they are written.

    Cost:
        One forward of the lowest layers for each group; afterwards a copy of the rows' states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[EncodedRow],
        groups: Sequence[Sequence[int]],
        num_layers: int,
        flat_TD: Tensor,
    ) -> None:
        self._model, self._rows, self._groups, self._num_layers = model, rows, groups, num_layers
        self._group_of = {number: place for place, group in enumerate(groups) for number in group}
        stops = accumulate(len(row.token_ids) for row in rows)
        self._states = [flat_TD[stop - len(row.token_ids) : stop] for row, stop in zip(rows, stops, strict=True)]
        self._filled: set[int] = set()

    def recall(self, numbers: Sequence[int]) -> PrefixStates:
        """Return the states of rows one after another; the groups of those not met before are computed."""
        for place in sorted({self._group_of[number] for number in numbers} - self._filled):
            group = self._groups[place]
            batch = make_batch([self._rows[number] for number in group])
            found = prefix_states(self._model, batch, self._num_layers).states_TD
            for number, part in zip(group, found.split(batch.lengths), strict=True):
                self._states[number].copy_(part)
            self._filled.add(place)
        states_TD = torch.cat([self._states[number] for number in numbers])
        return PrefixStates(self._num_layers, states_TD.to(self._model.device))


def prefix_caches(
    model: PreTrainedModel, data: PreparedData, steps: Sequence[Step], settings: TrainConfig, folder: Path
) -> Recalls:
    """Return caches for a run's rows, where its lowest layers are frozen and rows are met more than once.

    Training rows are met again in a second epoch, evaluation rows in the second evaluation. One log line says what is
    kept, or why nothing is.

    Args:
        model: The attached model, in training mode.
        data: The run's rows.
        steps: Every step of the run, also those that are done.
        settings: Says whether and where states are kept.
        folder: Where a file may lie. It has no name, and is gone with the process.

    Raises:
        OutputError: If a file was asked for and there is no room for it.
    """
    num_layers = prefix_layers(model) if settings.cache_prefix != "off" else 0
    train_rows, eval_rows = data.train.rows, data.eval.rows if data.eval is not None else []
    groups = _first_meetings(micro for step in steps for micro in step)
    if groups is None:
        train_rows, groups = [], []
    asked = settings.cache_prefix in ("memory", "disk")
    if not num_layers or not (train_rows or eval_rows):
        if asked:
            log.warning("cache_prefix: %s is of no use: %s", settings.cache_prefix, _why_none(num_layers))
        return Recalls()
    try:
        sample_TD = check_prefix(model, num_layers)
    except BaseModelError as error:
        log.log(logging.WARNING if asked else logging.INFO, "all layers are run in every epoch: %s", error)
        return Recalls()
    counts = [sum(len(row.token_ids) for row in rows) for rows in (train_rows, eval_rows)]
    flat_TD = _room(settings.cache_prefix, (sum(counts), sample_TD.shape[1]), sample_TD.dtype, folder)
    if flat_TD is None:
        return Recalls()
    _tell(num_layers, len(sole_layers(model)), flat_TD, bool(train_rows))
    lengths = [len(row.token_ids) for row in eval_rows]
    eval_groups = pack(range(len(lengths)), lengths, settings.tokens_per_micro_batch)  # as they are evaluated
    train_TD, eval_TD = flat_TD.split(counts)
    return Recalls(
        PrefixCache(model, train_rows, groups, num_layers, train_TD).recall if train_rows else None,
        PrefixCache(model, eval_rows, eval_groups, num_layers, eval_TD).recall if eval_rows else None,
    )


def _first_meetings(micros: Iterable[list[int]]) -> list[list[int]] | None:
    """Return the micro-batches before any row comes again, or None where none does."""
    groups: list[list[int]] = []
    seen: set[int] = set()
    for micro in micros:
        if not seen.isdisjoint(micro):
            return groups
        groups.append(micro)
        seen.update(micro)
    return None


def _room(where: str, shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor | None:
    """Return a tensor for the states in memory or in a file, not filled, or None where neither has room."""
    size = shape[0] * shape[1] * dtype.itemsize
    if where == "memory" or (where == "auto" and size <= free_memory_bytes() // _SHARE):
        return torch.empty(shape, dtype=dtype)  # pages are taken when they are written
    try:
        return torch.frombuffer(REAL.scratch(folder, size), dtype=torch.uint8).view(dtype).view(shape)
    except OSError as error:
        line = f"{_megabytes(size)} for the states below the adapter cannot be had in {folder}: {error}"
        if where == "disk":
            raise OutputError(f"{line}; make room, or set train.cache_prefix: off") from None
        log.info("%s; all layers are run in every epoch", line)
        return None


def _why_none(num_layers: int) -> str:
    return "no row is met twice" if num_layers else "the lowest decoder layer is adapted or trains, or is not known"


def _tell(num_layers: int, all_layers: int, flat_TD: Tensor, trains: bool) -> None:
    """Say what is kept and what that saves: of a step's forward and backward, or of an evaluation's forward."""
    of, whole = ("later epochs", 2 * all_layers - num_layers) if trains else ("later evaluations", all_layers)
    log.info(
        "the lowest %d of %d decoder layers are frozen: what they give is computed once and kept (%s), "
        "which saves about %.0f %% of the layers' work in %s",
        *(num_layers, all_layers, _megabytes(flat_TD.nbytes), 100 * num_layers / whole, of),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
