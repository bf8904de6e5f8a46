"""The one door to the disk of this package.

Every change goes through the few primitives of a `FileSystem`, each of them one operation of the disk, so that a test
can put one in its place that fails, stops or loses power at a chosen operation (research: failures.md 5.1, the idea of
SQLite's VFS). What is made of several operations is written here, in terms of them.
"""

import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

_CHUNK = 1 << 20

NOT_GIVEN_BACK = "the disk does not give back what was written to it"
"""What is said of a file or folder that does not read back as it was written."""

Pieces = Sequence[bytes | memoryview]
"""What a file is to hold, one after another; they are never joined in memory."""

Content = bytes | Pieces


def pieces_of(content: Content) -> list[memoryview]:
    """Return the pieces of a content that are not empty, as flat bytes.

    Example:
        >>> [bytes(piece) for piece in pieces_of([b"a", b"", b"bc"])]
        [b'a', b'bc']
    """
    pieces = [content] if isinstance(content, bytes) else content
    return [memoryview(piece).cast("B") for piece in pieces if len(piece)]


class FileSystem:
    """The file operations that artefacts need; it holds no state.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     REAL.write_bytes(Path(folder) / "a.bin", b"abc")
        ...     REAL.read_bytes(Path(folder) / "a.bin"), REAL.list_files(Path(folder))
        (b'abc', ['a.bin'])
    """

    # What is there.

    def exists(self, path: Path) -> bool:
        """Tell whether anything stands at a path, a dangling link included."""
        return os.path.lexists(path)

    def is_folder(self, path: Path) -> bool:
        """Tell whether a path is a folder, or a link to one."""
        return path.is_dir()

    def identity(self, path: Path) -> tuple[int, int, int] | None:
        """Return what stays the same for as long as a path is the same file or folder; None where nothing is there."""
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def list_folder(self, folder: Path) -> list[str]:
        """Return the sorted names in a folder."""
        return sorted(path.name for path in folder.iterdir())

    def list_files(self, folder: Path) -> list[str]:
        """Return the sorted names of all files below a folder, relative to it, with forward slashes."""
        found = []
        for parent, folders, files in os.walk(folder):
            # A link to a folder is not walked into, so it counts as a file.
            links = [name for name in folders if (Path(parent) / name).is_symlink()]
            found += [(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *links]]
        return sorted(found)

    def list_folders(self, folder: Path) -> list[Path]:
        """Return the folder and all folders below it, the deepest first."""
        return [Path(parent) for parent, _, _ in os.walk(folder, topdown=False)]

    def is_plain_file(self, path: Path) -> bool:
        """Tell whether a path is a regular file itself, not a link, a pipe or a device."""
        return stat.S_ISREG(path.lstat().st_mode)

    def size_of(self, path: Path) -> int:
        """Return how many bytes a file holds."""
        return path.stat().st_size

    def free_bytes(self, folder: Path) -> int:
        """Return how much may still be written to the volume that a folder lies on."""
        return shutil.disk_usage(folder).free

    def read_bytes(self, path: Path, max_bytes: int | None = None) -> bytes:
        """Return a regular file's content in memory of our own: never a map of the file.

        Raises:
            OSError: If it cannot be read, is not a regular file, or is longer than `max_bytes`.
        """
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path}: not a regular file")
        too_long = OSError(f"{path}: longer than the limit of {max_bytes} bytes")
        if max_bytes is not None and status.st_size > max_bytes:
            raise too_long
        with path.open("rb") as file:
            # One byte more than there should be shows a file that grew after it was measured.
            data = file.read() if max_bytes is None else file.read(status.st_size + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise too_long
        return data

    def read_range(self, path: Path, start: int, length: int) -> bytearray:
        """Return a part of a regular file, in memory of our own that may be written to.

        Raises:
            OSError: If it cannot be read, is not a regular file, or ends before.
        """
        data = bytearray(length)
        with self.reading(path) as read:
            read(start, memoryview(data))
        return data

    @contextmanager
    def reading(self, path: Path) -> Iterator[Callable[[int, memoryview], None]]:
        """Open a regular file; yield what fills memory with its bytes from a place on, and raises where it ends before.

        Raises:
            OSError: If it cannot be read, is not a regular file, or ends before.
        """
        _require_regular(path)
        with path.open("rb", buffering=0) as file:

            def read(start: int, into: memoryview) -> None:
                end = start + len(into)
                file.seek(start)
                while into:
                    taken = file.readinto(into)
                    if not taken:
                        raise OSError(f"{path}: ends at byte {end - len(into)}, before byte {end}")
                    into = into[taken:]

            yield read

    def measure(self, path: Path) -> tuple[int, str]:
        """Return the size and the SHA-256 of a regular file, read in pieces.

        Raises:
            OSError: If it cannot be read, or is a pipe or a device, which would be waited for.
        """
        _require_regular(path)
        sha, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                sha.update(piece)
                size += len(piece)
        return size, sha.hexdigest()

    def holds(self, path: Path, content: Content) -> bool:
        """Tell whether a file reads back as a content, every byte and none more."""
        buffer = np.empty(_CHUNK, np.uint8)
        with path.open("rb") as file:
            for piece in pieces_of(content):
                expected = np.frombuffer(piece, np.uint8)
                for start in range(0, len(expected), _CHUNK):
                    part = expected[start : start + _CHUNK]
                    got = buffer[: len(part)]
                    if file.readinto(got.data) != len(part) or not np.array_equal(got, part):
                        return False
            return not file.read(1)

    @contextmanager
    def locked(self, path: Path, *, wait: bool = True, create: bool = False) -> Iterator[bool | None]:
        """Hold a folder or file within the block against everybody else who asks; a lock goes with its process.

        Args:
            path: What to hold.
            wait: Until it is free; else the block is told at once that it is not.
            create: Make an empty file there first, where there is nothing.

        Yields:
            Whether it is held; None where the file system knows no locks.
        """
        handle = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held: bool | None = True
            except BlockingIOError:
                held = False
            except OSError:
                held = None
            yield held
        finally:
            os.close(handle)

    def scratch(self, folder: Path, size: int) -> mmap.mmap:
        """Return the bytes of a new file that has no name and is gone with the process; writes cannot meet a full disk.

        Raises:
            OSError: If there is no room for it.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)

    def read_at(self, handle: int, start: int, into: memoryview) -> int:
        """Fill memory with an open file's bytes from a place on, perhaps not all of it; return how many."""
        return os.preadv(handle, [into], start)

    # Changes: each is one operation of the disk.

    def open_new(self, path: Path) -> int:
        """Make an empty file that must not exist, and open it for writing and reading."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def open_again(self, path: Path) -> int:
        """Open a file that exists for writing, its content kept."""
        return os.open(path, os.O_RDWR)

    def truncate(self, handle: int, size: int) -> None:
        """Cut an open file to a size, and go on writing at its end."""
        os.ftruncate(handle, size)
        os.lseek(handle, size, os.SEEK_SET)

    def write(self, handle: int, data: memoryview) -> int:
        """Write bytes, perhaps not all of them; return how many."""
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        """Wait until an open file's content, or an open folder's names, are on the disk."""
        if sys.platform == "darwin":
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # fsync there ends in the disk's own memory
        else:
            os.fsync(handle)

    def past_cache(self, handle: int, on: bool) -> bool:
        """Let an open file's bytes go between memory and disk without the system's cache, or through it again.

        Returns:
            Whether they now go past it; then places, lengths and addresses are multiples of the disk's blocks.
        """
        if sys.platform != "linux":
            return False
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:  # a file system that has no other way than its cache
            return False
        return on

    def close(self, handle: int) -> None:
        """Close what was opened."""
        os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Make a folder; it must not exist."""
        path.mkdir()

    def fsync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            self.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name in one step."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    # Made of them.

    def make_parents(self, path: Path) -> None:
        """Make a folder with its parents where they do not exist, and wait until their names are on the disk."""
        if self.is_folder(path):
            return
        self.make_parents(path.parent)
        with suppress(FileExistsError):  # another process may make it at this moment
            self.make_folder(path)
        self.fsync_folder(path.parent)

    def write_bytes(self, path: Path, content: Content) -> None:
        """Write a new file and wait until it is on the disk."""
        handle = self.open_new(path)
        try:
            self._write_all(handle, content)
            self.fsync(handle)
        finally:
            self.close(handle)

    def append_bytes(self, path: Path, content: Content, size: int) -> None:
        """Write behind the first `size` bytes of a file, without waiting for the disk; what stood there goes."""
        handle = self.open_again(path) if self.exists(path) else self.open_new(path)
        try:
            self.truncate(handle, size)
            self._write_all(handle, content)
        finally:
            self.close(handle)

    def fsync_file(self, path: Path) -> None:
        """Wait until the content of a file is on the disk."""
        handle = self.open_again(path)
        try:
            self.fsync(handle)
        finally:
            self.close(handle)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it, or a link or file; what others remove meanwhile is no error."""
        with suppress(FileNotFoundError):
            if not self.is_folder(path) or path.is_symlink():
                self.unlink(path)
                return
            for name in self.list_folder(path):
                self.remove_tree(path / name)
            self.remove_folder(path)

    def _write_all(self, handle: int, content: Content) -> None:
        for piece in pieces_of(content):
            while piece:
                piece = piece[self.write(handle, piece) :]


def _require_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path}: not a regular file")


REAL = FileSystem()
"""The disk itself: the default of every function that takes a `FileSystem`."""
