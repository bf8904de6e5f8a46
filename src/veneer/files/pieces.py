"""A large file written piece by piece: hashed on its way, past the system's cache where that can be, and read back."""

import errno
import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from veneer.errors import DamagedArtefactError
from veneer.files.filesystem import NOT_GIVEN_BACK, REAL, FileSystem
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
    read_back: bool = True,
    fs: FileSystem = REAL,
    on_bytes: OnBytes | None = None,
) -> FileRecord:
    """Write a new file of pieces, each hashed on its way, and wait for the disk.

    What is hashed is the memory that the disk is given. Large files go past the system's cache, which takes half of
    the time otherwise and drives out what others have there, so that it is the disk that is read back; where a file
    system knows no such way, they go through it.

    Args:
        target: The new file; its folder exists.
        pieces: What it is to hold; each may be written to again when the next is asked for.
        lanes: Make the next piece in a thread of its own while one is hashed.
        read_back: Compare what the disk gives back with the memory that was hashed, every byte.
        fs: Where it lies.
        on_bytes: Told how many bytes were taken, as they are; what it raises ends the writing.

    Returns:
        Size and SHA-256.

    Raises:
        DamagedArtefactError: If the disk does not give back what was written, or the file has another size.
        OSError: If the disk refuses; what was written stays, for whoever made the folder to remove.

    Cost:
        One pass over the bytes in the core's cache, and the disk's time beside it. Memory: 12 MiB.
    """
    sha, size = hashlib.sha256(), 0
    with ExitStack() as stack:
        handle = fs.open_new(target)
        stack.callback(fs.close, handle)
        disk = _Disk(target, handle, fs, stack, mmap.mmap(-1, ROOM) if read_back else None)
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
        raise _damaged(target)
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
    """Takes bytes into rooms in turn; a full one is written, and read back, by a thread while the next is filled."""

    def __init__(self, path: Path, handle: int, fs: FileSystem, stack: ExitStack, check: mmap.mmap | None) -> None:
        self._path, self._handle, self._fs, self._check = path, handle, fs, check
        self._rooms = cycle([mmap.mmap(-1, ROOM) for _ in range(2)])  # aligned to pages
        self._room, self._filled, self._start, self._past_cache = memoryview(next(self._rooms)), 0, 0, False
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
                if self._check is not None and not _same(self._got(memoryview(self._check)[: len(part)]), part):
                    raise _damaged(self._path)
                self._start += len(part)

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._try(self._fs.write, data) :]

    def _got(self, into: memoryview) -> memoryview:
        """Return what the disk gives back of the part that was written last, as much as it does."""
        at, left = self._start, into
        while left and (count := self._try(self._fs.read_at, at, left)):
            at, left = at + count, left[count:]
        return into[: len(into) - len(left)]

    def _try(self, do: Callable[..., int], *given: Any) -> int:
        """Do something with the file; through the cache, where the file system has no other way after all."""
        try:
            return do(self._handle, *given)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._past_cache:
                raise
        self._past_cache = self._fs.past_cache(self._handle, False)
        return do(self._handle, *given)


def _same(one: memoryview, other: memoryview) -> bool:
    """Tell whether two pieces of memory hold the same; eight bytes at a time, a third of the work of one at a time."""
    whole = len(one) // 8 * 8
    if len(one) != len(other) or one[whole:] != other[whole:]:
        return False
    return np.array_equal(np.frombuffer(one[:whole], np.uint64), np.frombuffer(other[:whole], np.uint64))


def _damaged(path: Path) -> DamagedArtefactError:
    return DamagedArtefactError(f"{path}: {NOT_GIVEN_BACK}")
