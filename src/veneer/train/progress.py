"""Progress of a run: a bar on standard error where that is a terminal, nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What the loop tells about itself."""

    def step(self, figures: Mapping[str, Any]) -> None:
        """A step is done."""

    def evaluated(self, loss: float) -> None:
        """An evaluation is done."""


class _Silent:
    """Where nobody looks."""

    def step(self, figures: Mapping[str, Any]) -> None:
        """Say nothing."""

    def evaluated(self, loss: float) -> None:
        """Say nothing."""


class _OnTerminal:
    """A bar with the figures that people look at."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def step(self, figures: Mapping[str, Any]) -> None:
        """Show the step's loss and speed."""
        self._bar.update(
            self._task,
            completed=figures["step"],
            loss=f"{figures['loss']:.4f}",
            speed=f"{figures['tokens_per_second']:,.0f} tokens/s",
        )

    def evaluated(self, loss: float) -> None:
        """Show the evaluation's loss."""
        self._bar.update(self._task, evaluation=f"eval {loss:.4f}")


@contextmanager
def progress_bar(num_steps: int) -> Iterator[Progress]:
    """Show how far a run is within the block."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[evaluation]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        yield _OnTerminal(bar, bar.add_task("", total=num_steps, loss="-", evaluation="", speed=""))


@contextmanager
def share_bar(title: str) -> Iterator[Callable[[float], None]]:
    """Show which share of a piece of work is done; the bar goes when the block ends."""
    if not sys.stderr.isatty():
        yield lambda share: None  # noqa: ARG005
        return
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)
