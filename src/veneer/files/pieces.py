"""A large file written piece by piece: hashed on its way, and past the system's cache where that can be."""

import errno
import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import torch

from veneer.errors import DamagedArtefactError
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import FileRecord

BLOCK = 1 << 20
"""How many bytes are read or hashed at a time: a core's cache holds them meanwhile."""
ROOM = 4 << 20
"""How many bytes the disk is given at a time."""
ALIGNED = 4096
"""What goes past the system's cache begins, and is as long as, a multiple of so many bytes."""

OnBytes = Callable[[int], None]
"""Told how many bytes were written, as they are."""

Value = TypeVar("Value")


def write_pieces(
    target: Path,
    pieces: Iterable[memoryview],
    *,
    lanes: bool = True,
    fs: FileSystem = REAL,
    on_bytes: OnBytes | None = None,
) -> FileRecord:
    """Write a new file of pieces, each hashed on its way, and wait for the disk.

    What is hashed is the memory that the disk is given. Large files go past the system's cache, which costs half of
    the time otherwise and drives out what others have there; where a file system knows no such way, through it.

    Args:
        target: The new file; its folder exists.
        pieces: What it is to hold; each may be written to again when the next is asked for.
        lanes: Make the next piece in a thread of its own while one is hashed.
        fs: Where it lies.
        on_bytes: Told how many bytes were taken, as they are; what it raises ends the writing.

    Returns:
        Size and SHA-256.

    Raises:
        DamagedArtefactError: If the file has another size then.
        OSError: If the disk refuses; what was written stays, for whoever made the folder to remove.

    Cost:
        One pass over the bytes in the core's cache, and the disk's time beside it. Memory: 8 MiB.
    """
    sha, size = hashlib.sha256(), 0
    with ExitStack() as stack:
        handle = fs.open_new(target)
        stack.callback(fs.close, handle)
        disk = _Disk(handle, fs, stack)
        for piece in ahead(iter(pieces), stack) if lanes else pieces:
            for block in blocks(piece):
                for held in disk.take(block):
                    sha.update(held)
            size += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
        disk.finish()
        fs.fsync(handle)
    if fs.size_of(target) != size:
        raise DamagedArtefactError(f"{target}: the disk does not give back what was written to it")
    return FileRecord(size, sha.hexdigest())


def blocks(piece: memoryview) -> Iterator[memoryview]:
    """Yield the blocks of a piece."""
    return (piece[at : at + BLOCK] for at in range(0, len(piece), BLOCK))


def ahead(items: Iterator[Value], stack: ExitStack) -> Iterator[Value]:
    """Yield items, of which the next is made meanwhile, in a thread that computes with as many as this one does."""
    threads = (torch.get_num_threads(),)
    pool = stack.enter_context(ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=threads))
    waiting = pool.submit(next, items, None)
    while (item := waiting.result()) is not None:
        waiting = pool.submit(next, items, None)
        yield item


class _Disk:
    """Takes bytes into rooms in turn; a full one is written by a thread while the next is filled."""

    def __init__(self, handle: int, fs: FileSystem, stack: ExitStack) -> None:
        self._handle, self._fs = handle, fs
        self._rooms = cycle([mmap.mmap(-1, ROOM) for _ in range(2)])  # aligned to pages
        self._room, self._filled, self._past_cache = memoryview(next(self._rooms)), 0, False
        self._beside = stack.enter_context(ThreadPoolExecutor(1))
        self._waiting: Future[None] | None = None

    def take(self, data: memoryview) -> Iterator[memoryview]:
        """Copy bytes; yield where they lie, which the disk is given when the next is asked for."""
        while data:
            count = min(len(data), len(self._room) - self._filled)
            held = self._room[self._filled : self._filled + count]
            held[:] = data[:count]
            yield held
            data, self._filled = data[count:], self._filled + count
            if self._filled == len(self._room):
                self._send()

    def finish(self) -> None:
        """Wait until everything is written."""
        self._send()
        self._wait()

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()

    def _send(self) -> None:
        self._wait()
        self._waiting = self._beside.submit(self._write, self._room[: self._filled])
        self._room, self._filled = memoryview(next(self._rooms)), 0

    def _write(self, data: memoryview) -> None:
        """Write a room: of a large file past the cache, but for what its end has beyond whole blocks."""
        large = len(data) == ROOM or self._past_cache
        aligned = len(data) // ALIGNED * ALIGNED if large else 0
        for part, past_cache in ((data[:aligned], True), (data[aligned:], False)):
            if part:
                self._past_cache = self._fs.past_cache(self._handle, past_cache)
                self._put(part)

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                written = self._fs.write(self._handle, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._past_cache:
                    raise
                self._past_cache = self._fs.past_cache(
                    self._handle, False
                )  # what the file system does not do after all
                continue
            data = data[written:]
