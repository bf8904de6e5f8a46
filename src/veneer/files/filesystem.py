"""The one door to the disk of this package.

Every read and every change goes through a `FileSystem`, so that a test can put one in its place that
fails at a chosen operation (research: failures.md 5.1, the idea of SQLite's VFS).
"""

import hashlib
import os
import shutil
import stat
from pathlib import Path

_CHUNK = 1 << 20


class FileSystem:
    """The file operations that artefacts need; it holds no state.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     REAL.write_bytes(Path(folder) / "a.bin", b"abc")
        ...     REAL.read_bytes(Path(folder) / "a.bin"), REAL.list_files(Path(folder))
        (b'abc', ['a.bin'])
    """

    def exists(self, path: Path) -> bool:
        """Tell whether anything stands at a path, a dangling link included."""
        return os.path.lexists(path)

    def is_folder(self, path: Path) -> bool:
        """Tell whether a path is a folder, or a link to one."""
        return path.is_dir()

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

    def measure(self, path: Path) -> tuple[int, str]:
        """Return the size and the SHA-256 of a file, read in pieces."""
        sha, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                sha.update(piece)
                size += len(piece)
        return size, sha.hexdigest()

    def make_folder(self, path: Path) -> None:
        """Make a folder; it must not exist."""
        path.mkdir()

    def make_parents(self, path: Path) -> None:
        """Make a folder with its parents where they do not exist."""
        path.mkdir(parents=True, exist_ok=True)

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a new file and wait until it is on the disk."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def fsync_file(self, path: Path) -> None:
        """Wait until a file that somebody else wrote is on the disk."""
        with path.open("rb+") as file:
            os.fsync(file.fileno())

    def fsync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name in one step."""
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it, or a link or file."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


REAL = FileSystem()
"""The disk itself: the default of every function that takes a `FileSystem`."""
