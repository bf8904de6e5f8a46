"""A file system that fails, stops or loses power at a chosen operation.

It works on a real folder and keeps beside it what a disk would still hold after a power loss. The rules:

- The content of a file is on the disk after `fsync` of the file; before that any part of it may be.
- The names in a folder are on the disk after `fsync` of the folder; before that the changes since the last one may be
  there up to any of them, in their order, and a rename as a whole or not at all. Folders do not wait for each other.
- What was not written through this object (by somebody else's code) counts as not on the disk.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from veneer.files.filesystem import FileSystem

MODES = ("kill", "kill in a write", "EIO", "EIO for ever", "done, then EIO", "ENOSPC", "short write", "power loss")
DATA = ("dropped", "zeros", "torn", "kept")
_BLOCK = 16
_RANDOM = re.compile(r"(?<=-)[0-9a-f]{16}")


class KilledError(BaseException):
    """Stands for the end of the process: nothing may handle it, and nothing works after it."""


@dataclass(eq=False)
class File:
    now: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class Folder:
    now: dict = field(default_factory=dict)
    durable: dict = field(default_factory=dict)
    journal: list = field(default_factory=list)

    def change(self, *changes: tuple) -> None:
        """Note changes that come as one: (name, object or None)."""
        for name, one in changes:
            self.now.pop(name, None) if one is None else self.now.update({name: one})
        self.journal.append(changes)

    def after(self, count: int) -> dict:
        """The names after the first changes since they were last on the disk."""
        names = dict(self.durable)
        for name, one in (change for changes in self.journal[:count] for change in changes):
            names.pop(name, None) if one is None else names.update({name: one})
        return names


class Faulty(FileSystem):
    """Does what a mode says at operation number `at`, counted from 0; before that it works."""

    def __init__(self, root: Path, at: int = -1, mode: str = "kill") -> None:
        self.root, self.at, self.mode = root, at, mode
        self.count, self.dead, self.hit, self.log = 0, False, False, []
        self._open: dict[int, File] = {}
        self._tree = self._look(root, known=True)

    # The operations. Reads fail too.

    def read_bytes(self, path, max_bytes=None):
        return self._do("read", path, lambda: FileSystem.read_bytes(self, path, max_bytes))

    def measure(self, path):
        return self._do("read", path, lambda: FileSystem.measure(self, path))

    def holds(self, path, content):
        return self._do("read", path, lambda: FileSystem.holds(self, path, content))

    def list_folder(self, folder):
        return self._do("list", folder, lambda: FileSystem.list_folder(self, folder))

    def list_files(self, folder):
        return self._do("list", folder, lambda: FileSystem.list_files(self, folder))

    def exists(self, path):
        self._alive()
        return super().exists(path)

    def open_new(self, path):
        def do():
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._open[handle] = File()
            self._folder(path.parent).change((path.name, self._open[handle]))
            return handle

        return self._do("open", path, do, grows=True)

    def open_again(self, path):
        def do():
            handle = FileSystem.open_again(self, path)
            self._open[handle] = self._find(path)
            return handle

        return self._do("open", path, do)

    def truncate(self, handle, size):
        def do():
            FileSystem.truncate(self, handle, size)
            self._open[handle].now = self._open[handle].now[:size]

        self._do("truncate", handle, do)

    def write(self, handle, data):
        def do(part=data):
            FileSystem.write(self, handle, part)
            self._open[handle].now += bytes(part)
            return len(part)

        half = data[: len(data) // 2]
        return self._do("write", handle, do, grows=True, half=lambda: do(half) if half else 0)

    def fsync(self, handle):
        def do():
            self._open[handle].durable = self._open[handle].now

        self._do("fsync", handle, do)

    def close(self, handle):
        self._open.pop(handle, None)
        super().close(handle)  # also in death, as the system would

    def make_folder(self, path):
        def do():
            FileSystem.make_folder(self, path)
            self._folder(path.parent).change((path.name, Folder()))

        self._do("mkdir", path, do, grows=True)

    def fsync_folder(self, path):
        def do():
            folder = self._folder(path)
            folder.durable, folder.journal = dict(folder.now), []

        self._do("fsync", path, do)

    def rename(self, source, target):
        def do():
            assert source.parent == target.parent, "a rename between folders is two changes on many disks"
            FileSystem.rename(self, source, target)
            folder = self._folder(source.parent)
            folder.change((source.name, None), (target.name, folder.now[source.name]))

        self._do("rename", source, do)

    def unlink(self, path):
        def do():
            FileSystem.unlink(self, path)
            self._folder(path.parent).change((path.name, None))

        self._do("unlink", path, do)

    def remove_folder(self, path):
        def do():
            FileSystem.remove_folder(self, path)
            self._folder(path.parent).change((path.name, None))

        self._do("rmdir", path, do)

    # The faults.

    def _alive(self):
        if self.dead:
            raise KilledError

    def _do(self, name, what, do: Callable, *, grows: bool = False, half: Callable | None = None):
        self._alive()
        number, self.count = self.count, self.count + 1
        self.log.append(f"{name} {what.name if isinstance(what, Path) else ''}")
        if isinstance(what, Path) and name != "list" and what.is_relative_to(self.root):
            self._adopt(what)
        changes = name not in ("read", "list")
        now = number == self.at
        later = self.at <= number and self.at >= 0
        if self.mode in ("kill", "power loss") and now:
            self.hit = self.dead = True
            raise KilledError
        if self.mode == "kill in a write" and now and half:
            self.hit = self.dead = True
            half()
            raise KilledError
        if self.mode == "short write" and now and half:
            self.hit = True
            return half()
        if (self.mode == "EIO" and now) or (self.mode == "EIO for ever" and later and changes):
            self.hit = True
            raise OSError(errno.EIO, "injected: input/output error")
        if self.mode == "done, then EIO" and now and changes:
            self.hit = True
            handle = do()
            if name == "open":
                self.close(handle)
            raise OSError(errno.EIO, "injected: input/output error")
        if self.mode == "ENOSPC" and later and grows:
            if half and now:
                self.hit = True
                return half()
            self.hit = True
            raise OSError(errno.ENOSPC, "injected: no space left on device")
        return do()

    # What the disk would still hold.

    def after_power_loss(self, to: Path, seen: set[str]) -> Iterator[str]:
        """Make in a folder, one after another, what may be found after the power went now; yield what it is.

        What was seen before, but for the random parts of temporary names, is left out.
        """
        folders = [one for one in self._folders(self._tree) if one.journal]
        parent = max(folders, key=lambda one: len(one.durable), default=self._tree)
        for count, others, data in product(range(len(parent.journal) + 1), (False, True), DATA):
            chosen = {id(one): len(one.journal) if others else 0 for one in folders} | {id(parent): count}
            found = _picture(self._tree, chosen, data)
            sign = _RANDOM.sub("", repr(found))
            if sign not in seen:
                seen.add(sign)
                if to.exists():
                    shutil.rmtree(to)
                _lay_out(found, to)
                yield f"{count} of {len(parent.journal)} changes of names, others {others}, data {data}"

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        yield folder
        for one in {id(one): one for one in [*folder.now.values(), *folder.durable.values()]}.values():
            if isinstance(one, Folder):
                yield from self._folders(one)

    def _look(self, path: Path, known: bool) -> File | Folder:
        if not path.is_dir() or path.is_symlink():
            content = b"" if path.is_symlink() else path.read_bytes()
            return File(content, content if known else b"")
        names = {one.name: self._look(one, known) for one in path.iterdir()}
        return (
            Folder(names, dict(names)) if known else Folder(names, {}, [((name, one),) for name, one in names.items()])
        )

    def _adopt(self, path: Path) -> None:
        """Take up what somebody else wrote since."""
        here, folder = self.root, self._tree
        for part in path.relative_to(self.root).parts:
            here = here / part
            if not os.path.lexists(here):
                return
            if part not in folder.now:
                folder.change((part, self._look(here, known=False)))
            if isinstance(folder.now[part], File):
                return
            folder = folder.now[part]

    def _find(self, path: Path) -> File | Folder:
        one = self._tree
        for part in path.relative_to(self.root).parts:
            one = one.now[part]
        return one

    def _folder(self, path: Path) -> Folder:
        return self._find(path) if path.is_relative_to(self.root) else Folder()


def _picture(folder: Folder, chosen: dict, data: str) -> dict:
    return {
        name: _picture(one, chosen, data) if isinstance(one, Folder) else _remains(one, data)
        for name, one in sorted(folder.after(chosen.get(id(folder), 0)).items())
    }


def _lay_out(found: dict, to: Path) -> None:
    to.mkdir()
    for name, one in found.items():
        _lay_out(one, to / name) if isinstance(one, dict) else (to / name).write_bytes(one)


def _remains(file: File, data: str) -> bytes:
    """What is left of a file whose last writes may not have reached the disk."""
    if file.now == file.durable or data == "kept":
        return file.now
    if data == "dropped":
        return file.durable
    pairs = enumerate(zip(file.now, file.durable, strict=False))
    length = next((place for place, (one, other) in pairs if one != other), min(len(file.now), len(file.durable)))
    rest = file.now[length:]
    if data == "zeros":
        return file.now[:length] + bytes(len(rest))
    cut = max(0, len(rest) - _BLOCK)
    return file.now[:length] + rest[:cut] + bytes(value ^ 0xA5 for value in rest[cut:])
