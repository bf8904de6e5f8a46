"""Pieces of a large file: hashed, written past the cache where that can be, read back."""

import errno
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import DamagedArtefactError
from veneer.files import pieces as module
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import FileRecord
from veneer.files.pieces import ALIGNED, write_pieces


@pytest.fixture(autouse=True)
def small_rooms(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 2 * ALIGNED)
    monkeypatch.setattr(module, "BLOCK", 1000)


def content(length):
    return memoryview(os.urandom(length))


@pytest.mark.parametrize("lanes", [False, True])
@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.sampled_from((0, 1, 999, 1000, 4095, 4096, 8191, 8192, 8193, 30000)), max_size=6))
def test_what_is_written_is_there_and_hashed(tmp_path_factory, lanes, lengths):
    path, parts = tmp_path_factory.mktemp("x") / "a", [content(length) for length in lengths]
    told = []
    record = write_pieces(path, parts, lanes=lanes, on_bytes=told.append)
    assert path.read_bytes() == b"".join(parts)
    assert record == FileRecord(*REAL.measure(path))
    assert told == lengths


class Watched(FileSystem):
    """Notes how each write went, and can refuse to go past the cache, at once or when it comes to it."""

    def __init__(self, refuses=None):
        self.refuses, self.past, self.writes = refuses, False, []

    def past_cache(self, handle, on):
        self.past = on and self.refuses != "at once"
        return self.past

    def write(self, handle, data):
        if self.past and self.refuses == "a write":
            raise OSError(errno.EINVAL, "not here")
        self.writes.append((self.past, len(data)))
        return super().write(handle, data)

    def read_at(self, handle, start, into):
        if self.past and self.refuses == "a read":
            raise OSError(errno.EINVAL, "not here")
        return super().read_at(handle, start, into)


def test_large_files_go_past_the_cache_but_for_their_end(tmp_path):
    fs = Watched()
    write_pieces(tmp_path / "a", [content(5 * ALIGNED + 7)], fs=fs)
    assert fs.writes == [(True, 2 * ALIGNED), (True, 2 * ALIGNED), (True, ALIGNED), (False, 7)]
    small = Watched()
    write_pieces(tmp_path / "b", [content(ALIGNED)], fs=small)
    assert small.writes == [(False, ALIGNED)]


@pytest.mark.parametrize("refuses", ["at once", "a write", "a read"])
def test_a_file_system_with_no_way_past_its_cache_goes_through_it(tmp_path, refuses):
    parts = [content(3 * ALIGNED), content(3 * ALIGNED + 5)]
    record = write_pieces(tmp_path / "a", parts, fs=Watched(refuses))
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    assert record == FileRecord(*REAL.measure(tmp_path / "a"))


def test_the_real_disk_goes_past_its_cache_or_says_that_it_cannot(tmp_path):
    handle = REAL.open_new(tmp_path / "a")
    try:
        assert REAL.past_cache(handle, True) in (True, False)
        assert REAL.past_cache(handle, False) is False
    finally:
        REAL.close(handle)


class Forgetful(FileSystem):
    """Says that it wrote what it did not, or something else."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def past_cache(self, handle, on):
        return False

    def write(self, handle, data):
        self.calls += 1
        if self.calls != 3:
            return super().write(handle, data)
        if self.what == "nothing":
            os.lseek(handle, len(data), os.SEEK_CUR)
        elif self.what == "short":
            super().write(handle, data[:-1])
        elif self.what == "twice":
            super().write(handle, data)
            super().write(handle, data)
        elif self.what == "elsewhere":
            os.lseek(handle, 0, os.SEEK_SET)
            super().write(handle, data)
        elif self.what == "two words changed places":
            super().write(handle, memoryview(bytes(data[8:16]) + bytes(data[:8]) + bytes(data[16:])))
        else:
            super().write(handle, memoryview(bytes([data[0] ^ 16]) + bytes(data[1:])))
        return len(data)


WRONG = ["nothing", "short", "twice", "elsewhere", "two words changed places", "one bit"]


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("rooms", [3, 2.5, 5])
def test_what_the_disk_did_not_take_is_found_when_it_is_read_back(tmp_path, what, rooms):
    parts = [content(int(rooms * 2 * ALIGNED))]
    assert write_pieces(tmp_path / "right", parts).bytes == len(parts[0])
    with pytest.raises(DamagedArtefactError, match="does not give back what was written"):
        write_pieces(tmp_path / "wrong", parts, fs=Forgetful(what))


def test_without_reading_back_the_size_alone_is_looked_at(tmp_path):
    parts = [content(6 * ALIGNED)]
    write_pieces(tmp_path / "same size", parts, read_back=False, fs=Forgetful("one bit"))
    assert (tmp_path / "same size").read_bytes() != bytes(parts[0])
    with pytest.raises(DamagedArtefactError, match="does not give back what was written"):
        write_pieces(tmp_path / "short", parts, read_back=False, fs=Forgetful("short"))


def test_what_is_hashed_is_what_is_written_whatever_becomes_of_a_piece(tmp_path):
    data = bytearray(3 * ALIGNED)

    class Late(FileSystem):
        def write(self, handle, piece):
            data[50] += 1  # as who made the piece may, once the next is asked for
            return super().write(handle, piece)

    record = write_pieces(tmp_path / "x", [memoryview(data)] * 2, fs=Late())
    assert record == FileRecord(*REAL.measure(tmp_path / "x"))


@pytest.mark.parametrize("lanes", [False, True])
def test_a_disk_that_fails_ends_the_writing_early(tmp_path, lanes):
    class Failing(FileSystem):
        calls = 0

        def write(self, handle, data):
            self.calls += 1
            if self.calls == 2:
                raise OSError(errno.EIO, "injected")
            return super().write(handle, data)

    fs, before, made = Failing(), threading.active_count(), []

    def pieces():
        for _ in range(2000):
            made.append(1)
            yield memoryview(bytes(ALIGNED))

    with pytest.raises(OSError, match="injected"):
        write_pieces(tmp_path / "x", pieces(), lanes=lanes, fs=fs)
    assert fs.calls == 2
    assert len(made) < 20
    assert threading.active_count() == before


def test_writes_that_take_a_part_are_gone_on_with(tmp_path):
    class Slow(FileSystem):
        def write(self, handle, data):
            return super().write(handle, data[: max(1, len(data) // 3)])

    part = content(5 * ALIGNED + 3)
    assert write_pieces(tmp_path / "x", [part], fs=Slow()).bytes == len(part)
    assert (tmp_path / "x").read_bytes() == bytes(part)
