"""Bases whose files the verbs read: where they lie, and a bar for how far the reading is."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import veneer

if TYPE_CHECKING:
    from veneer.files.shards import Checkpoint

BASE = "folder, hub id in the cache, .gguf file or smollm2"
"""What a base may be that is read from files, for help."""


def folder_of(base: str) -> str:
    """Return the folder of a base's files, see `veneer.base_folder`; nothing is imported for one that is a folder.

    Raises:
        BaseModelError: If it is not on this machine.
    """
    return base if Path(base).is_dir() else veneer.base_folder(base)


def checkpoint_of(base: str) -> "Checkpoint":
    """Return what a base's safetensors files hold, by their headers alone.

    Raises:
        BaseModelError: If it is not on this machine, or its files are not what they say.
    """
    return veneer.read_checkpoint(folder_of(base))


def weight_bytes(folder: str) -> int:
    """Return the bytes of the safetensors files in a folder: what a bar shows as all of it."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done, on standard error where that is a terminal."""
    columns: Sequence[TextColumn | BarColumn | DownloadColumn | TransferSpeedColumn | TimeRemainingColumn] = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
