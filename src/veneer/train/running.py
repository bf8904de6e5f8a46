"""A run under way: the parts that its functions share."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from veneer.base.batching import Way
from veneer.config import RunConfig
from veneer.data.batches import Step
from veneer.nn.attach import current_adapter
from veneer.train.checkpoint import TrainState, save_checkpoint
from veneer.train.folder import CHECKPOINTS, Metrics
from veneer.train.interrupt import StopFlag
from veneer.train.optimizer import FlatAdamW
from veneer.train.prefix_cache import Recalls
from veneer.train.prepare import PreparedData
from veneer.train.progress import Progress


@dataclass
class Running:
    """What a run works with and where it is.

    Args:
        model: The model with the adapter attached.
        data: The run's rows.
        config: The run.
        folder: The run folder.
        schedule: Every step of the run, with the epochs that are done after it.
        metrics: The lines of `metrics.jsonl`.
        optimizer: Over what trains.
        state: Where the run is.
        saved: Where it was when it was last committed, see `position`.
        stop: Whether it was asked to stop.
        progress: What is told of it.
        recalls: What the frozen lowest layers make of rows.
        way: How losses are computed.
    """

    model: PreTrainedModel
    data: PreparedData
    config: RunConfig
    folder: Path
    schedule: list[tuple[float, Step]]
    metrics: Metrics
    optimizer: FlatAdamW
    state: TrainState
    saved: tuple[int, int, int | None]
    stop: StopFlag
    progress: Progress
    recalls: Recalls = field(default_factory=Recalls)
    way: Way = field(default_factory=Way)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each training row."""
        return [int(length) for length in self.data.train.lengths]

    @property
    def position(self) -> tuple[int, int, int | None]:
        """What tells one checkpoint from another: the step, the evaluation, the limit of memory."""
        return position_of(self.state)

    def commit(self) -> None:
        """Save a checkpoint of where the run is, unless there is one."""
        if self.saved != self.position:
            self.metrics.sync()  # a checkpoint that outlives a power loss finds the lines up to it
            keep = self.config.train.keep_checkpoints
            self.metrics.sync()  # a checkpoint that is there has its lines
            save_checkpoint(self.folder / CHECKPOINTS, current_adapter(self.model), self.optimizer, self.state, keep)
            self.saved = self.position


def position_of(state: TrainState) -> tuple[int, int, int | None]:
    """Return the position that a checkpoint of a state has."""
    return state.step, state.evaluated, state.token_limit
