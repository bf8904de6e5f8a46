"""The door to the disk: what is compared, held and removed there."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.files.filesystem import REAL, FileSystem, pieces_of


@given(st.lists(st.binary(max_size=5)))
def test_pieces_are_the_bytes_in_their_order(pieces):
    assert b"".join(pieces_of(pieces)) == b"".join(pieces)
    assert b"".join(pieces_of(b"".join(pieces))) == b"".join(pieces)


def test_pieces_of_any_memory_are_its_bytes():
    numbers = np.arange(3, dtype=np.float32)
    assert b"".join(pieces_of([numbers.data, b"", memoryview(b"x")])) == numbers.tobytes() + b"x"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 19) + 3])
def test_holds_tells_every_byte_and_none_more(tmp_path, size):
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    REAL.write_bytes(tmp_path / "a", data)
    assert REAL.holds(tmp_path / "a", data)
    assert REAL.holds(tmp_path / "a", [data[: size // 3], data[size // 3 :]])
    assert not REAL.holds(tmp_path / "a", data + b"x")
    for place in {0, size // 2, size - 1} if size else ():
        other = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert not REAL.holds(tmp_path / "a", other)
    if size:
        assert not REAL.holds(tmp_path / "a", data[:-1])


def test_a_write_that_takes_a_byte_at_a_time_is_whole(tmp_path):
    class Slow(FileSystem):
        def write(self, handle, data):
            return super().write(handle, data[:1])

    Slow().write_bytes(tmp_path / "a", [b"abc", b"de"])
    assert (tmp_path / "a").read_bytes() == b"abcde"


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    REAL.write_bytes(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        REAL.write_bytes(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_appending_begins_where_it_is_told(tmp_path):
    REAL.append_bytes(tmp_path / "a", b"abc", 0)
    REAL.append_bytes(tmp_path / "a", b"d", 3)
    REAL.append_bytes(tmp_path / "a", b"X", 1)
    assert (tmp_path / "a").read_bytes() == b"aX"


def test_a_lock_keeps_others_out_and_goes_with_its_process(tmp_path):
    with REAL.locked(tmp_path) as mine:
        assert mine
        with REAL.locked(tmp_path, wait=False) as second:
            assert not second
    code = (
        "import sys; from pathlib import Path; from veneer.files.filesystem import REAL\n"
        "with REAL.locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with REAL.locked(tmp_path, wait=False) as mine:
            assert not mine
        other.kill()
        other.wait()
        with REAL.locked(tmp_path, wait=False) as mine:
            assert mine


def test_a_lock_is_waited_for(tmp_path):
    order = []

    def second():
        with REAL.locked(tmp_path / "lock", create=True):
            order.append("second")

    with REAL.locked(tmp_path / "lock", create=True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_tree_is_removed_and_what_its_links_point_to_is_not(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("x")
    (tmp_path / "x" / "deep").mkdir(parents=True)
    (tmp_path / "x" / "deep" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "x" / "dangling").symlink_to(tmp_path / "nowhere")
    REAL.remove_tree(tmp_path / "x")
    REAL.remove_tree(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "precious" / "a").read_text() == "x"


def test_scratch_has_no_name_and_takes_its_room_at_once(tmp_path):
    room = REAL.scratch(tmp_path, 1 << 16)
    room[:3] = b"abc"
    assert (room[:3], len(room), list(tmp_path.iterdir())) == (b"abc", 1 << 16, [])
    with pytest.raises(OSError, match=r"."):
        REAL.scratch(tmp_path, 1 << 55)


def test_parents_are_made_with_their_names_on_the_disk(tmp_path):
    class Noting(FileSystem):
        synced = ()

        def fsync_folder(self, path):
            self.synced = (*self.synced, path)

    disk = Noting()
    disk.make_parents(tmp_path / "a" / "b")
    disk.make_parents(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert disk.synced == (tmp_path, tmp_path / "a")


def test_identity_tells_a_folder_from_its_successor(tmp_path):
    (tmp_path / "a").mkdir()
    before = REAL.identity(tmp_path / "a")
    assert REAL.identity(tmp_path / "a") == before
    os.rename(tmp_path / "a", tmp_path / "b")  # noqa: PTH104
    assert REAL.identity(tmp_path / "a") is None
    (tmp_path / "a").mkdir()
    assert REAL.identity(tmp_path / "a") not in (None, before)
