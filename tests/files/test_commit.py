"""A committed folder is there whole or not at all, and its manifest vouches for every byte."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files.faulty import Faulty, KilledError

from veneer.errors import DamagedArtefactError, OutputError
from veneer.files import commit
from veneer.files.commit import (
    commit_file,
    commit_folder,
    discard,
    read_manifest,
    read_steadily,
    readable_folder,
    sweep,
    verify_folder,
)
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import MANIFEST, FileRecord, dump_manifest, parse_manifest, read_verified, record_content

OLD = {"a.txt": b"old", "deep/b.bin": b"\0\1"}
NEW = {"a.txt": b"new", "c.txt": b""}


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_commit_is_whole_and_verifies(tmp_path):
    manifest = commit_folder(tmp_path / "deep" / "x", OLD, kind="adapter", notes={"digest": "abc", "n": [1]})
    assert content(tmp_path / "deep" / "x") == OLD
    assert verify_folder(tmp_path / "deep" / "x") == manifest == read_manifest(tmp_path / "deep" / "x")
    assert (manifest.kind, manifest.notes, sorted(manifest.files)) == ("adapter", {"digest": "abc", "n": [1]}, [*OLD])
    assert names_in(tmp_path / "deep") == ["x"]


def test_a_function_may_write_the_files(tmp_path):
    def write(folder):
        (folder / "deep").mkdir()
        for name, data in OLD.items():
            (folder / name).write_bytes(data)

    commit_folder(tmp_path / "by_function", write, kind="x")
    commit_folder(tmp_path / "by_mapping", OLD, kind="x")
    first, second = ((tmp_path / name / MANIFEST).read_bytes() for name in ("by_function", "by_mapping"))
    assert first == second


def test_a_target_that_exists_is_left_alone_unless_it_is_to_be_replaced(tmp_path):
    target = tmp_path / "x"
    commit_folder(target, OLD, kind="x")
    with pytest.raises(OutputError, match=r"exists already"):
        commit_folder(target, NEW, kind="x")
    assert content(target) == OLD
    commit_folder(target, NEW, kind="x", replace=True)
    assert content(target) == NEW
    assert names_in(tmp_path) == ["x"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"a file is there"):
        commit_folder(tmp_path / "file", NEW, kind="x", replace=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    commit_folder(tmp_path / "real", OLD, kind="x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    commit_folder(tmp_path / "link", NEW, kind="x", replace=True)
    assert (content(tmp_path / "real"), content(tmp_path / "link")) == (OLD, NEW)
    assert names_in(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../../x", ".", "", "a\\b", "c:x", "a\0", MANIFEST])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(OutputError, match=r"cannot be committed under these names"):
        commit_folder(tmp_path / "in" / "x", {name: b"1"}, kind="x")
    assert content(tmp_path) == {}
    assert names_in(tmp_path / "in") == []


def test_a_link_among_the_files_is_refused(tmp_path):
    (tmp_path / "secret").write_text("s")
    with pytest.raises(OutputError, match=r"only regular files"):
        commit_folder(tmp_path / "x", lambda folder: (folder / "l").symlink_to(tmp_path / "secret"), kind="x")
    assert names_in(tmp_path) == ["secret"]


def make_debris(home):
    """What dead writers of `x` may leave: kills, a full disk, a power loss."""
    commit_folder(home / ".x.tmp-0000000000000001", NEW, kind="x")  # whole, but for its name
    (home / ".x.tmp-0000000000000002" / "deep").mkdir(parents=True)
    (home / ".x.tmp-0000000000000002" / "deep" / "b.bin").write_bytes(b"")  # begun
    (home / ".x.tmp-0000000000000003").write_bytes(b"half")  # a single file
    commit_folder(home / ".x.old-0000000000000004", NEW, kind="x")  # put aside, its successor in place
    commit_folder(home / ".x.old-0000000000000005", OLD, kind="x")
    (home / ".x.old-0000000000000005" / "a.txt").unlink()  # put aside and damaged
    (home / ".x.tmp-0000000000000006").symlink_to(home / "nowhere")


@pytest.mark.parametrize("replace", [False, True])
def test_debris_of_every_kind_hinders_nobody_and_is_swept(tmp_path, replace):
    target = tmp_path / "x"
    if replace:
        commit_folder(target, OLD, kind="x")
    else:
        (tmp_path / "x-mine").mkdir()
    (tmp_path / ".xy.tmp-0000000000000001").mkdir()  # of another artefact
    make_debris(tmp_path)
    if not replace:  # there is no target: what was put aside whole is the last state, and comes back
        with pytest.raises(OutputError, match=r"exists already"):
            commit_folder(target, OLD, kind="x")
        assert content(target) == NEW
        with pytest.raises(OutputError, match=r"exists already"):
            commit_folder(target, OLD, kind="x")  # now that it stands, the rest is swept
        shutil.rmtree(target)
    commit_folder(target, NEW, kind="x", replace=replace)
    assert content(target) == NEW
    assert names_in(tmp_path) == sorted([".xy.tmp-0000000000000001", "x", *([] if replace else ["x-mine"])])


def test_debris_of_a_single_file_is_swept(tmp_path):
    (tmp_path / ".a.json.tmp-0000000000000001").write_bytes(b"{")
    (tmp_path / ".b.json.tmp-0000000000000001").write_bytes(b"{")
    commit_file(tmp_path / "a.json", b"{}")
    assert names_in(tmp_path) == [".b.json.tmp-0000000000000001", "a.json"]


def test_what_a_living_writer_holds_is_left_alone_until_it_is_dead(tmp_path):
    """A process number would not do: another process may have it by now, or the writer lives in another container."""
    code = (
        "import sys; from pathlib import Path; from veneer.files.commit import commit_folder\n"
        "def write(folder):\n    (folder / 'a').write_bytes(b'1'); print('writing', flush=True); sys.stdin.read()\n"
        "commit_folder(Path(sys.argv[1]), write, kind='x', replace=True)"
    )
    target = tmp_path / "x"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(target)], **pipes) as writer:
        assert writer.stdout.readline() == b"writing\n"
        commit_folder(target, OLD, kind="x", replace=True)
        held = [name for name in names_in(tmp_path) if name.startswith(".x.tmp-")]
        assert len(held) == 1
        writer.kill()
    commit_folder(target, NEW, kind="x", replace=True)
    assert names_in(tmp_path) == ["x"]
    assert content(target) == NEW


def test_a_target_that_is_damaged_gives_way_to_what_was_put_aside_whole(tmp_path):
    target = tmp_path / "x"
    commit_folder(target, NEW, kind="x")
    commit_folder(tmp_path / ".x.old-0000000000000001", OLD, kind="x")
    (target / "a.txt").write_bytes(b"rot")
    sweep(tmp_path)
    assert content(target) == OLD
    assert names_in(tmp_path) == ["x"]


def test_what_is_half_removed_is_never_taken_for_what_was_put_aside(tmp_path):
    for at in range(40):
        root = tmp_path / f"{at}"
        commit_folder(root / "x", OLD, kind="x")
        with suppress(KilledError):
            commit_folder(root / "x", NEW, kind="x", replace=True, fs=Faulty(root, at))
        shutil.rmtree(root / "x", ignore_errors=True)  # its owner removes it before anything is swept
        found = readable_folder(root / "x")
        assert not found.exists() or (verify_folder(found) is not None and content(found) == OLD), at


def test_where_nothing_can_be_locked_nothing_is_swept(tmp_path):
    class NoLocks(FileSystem):
        @contextmanager
        def locked(self, path, *, wait=True, create=False):
            yield False

    commit_folder(tmp_path / "x", OLD, kind="x")
    make_debris(tmp_path)
    before = names_in(tmp_path)
    commit_folder(tmp_path / "x", NEW, kind="x", replace=True, fs=NoLocks())
    commit_file(tmp_path / "a", b"1", fs=NoLocks())
    assert names_in(tmp_path) == sorted([*before, "a"])
    assert content(tmp_path / "x") == NEW


class QuickDisk(FileSystem):
    """The disk without waiting for it."""

    def fsync(self, handle):
        pass


def test_readers_of_a_folder_that_is_replaced_all_the_time_see_whole_states_only(tmp_path):
    states = [{"a": bytes([n]) * 2000, "b": bytes([n]) * 3000} for n in range(2)]
    commit_folder(tmp_path / "x", states[0], kind="x")
    stop, written = threading.Event(), []

    def replace():
        while not stop.is_set():
            state = states[len(written) % 2]
            written.append(commit_folder(tmp_path / "x", state, kind="x", replace=True, fs=QuickDisk()))

    def read(folder):
        return read_verified(folder, ["a", "b"])[0]

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        while len(written) < 200 and writer.is_alive():
            assert read_steadily(tmp_path / "x", read) in states
    finally:
        stop.set()
        writer.join()
    assert len(written) >= 200


def test_a_reader_is_told_of_damage_in_a_folder_that_stays(tmp_path):
    commit_folder(tmp_path / "x", OLD, kind="x")
    (tmp_path / "x" / "a.txt").write_bytes(b"rot")
    with pytest.raises(DamagedArtefactError, match=r"a\.txt"):
        read_steadily(tmp_path / "x", lambda folder: read_verified(folder, ["a.txt"]))


def test_many_writers_of_one_folder_leave_one_whole_state(tmp_path):
    states = [{"a": bytes([n]) * 500, f"b{n}": b""} for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(commit_folder, tmp_path / "x", one, kind="x", replace=True) for one in states]
    assert [one.exception() for one in done] == [None] * 8
    assert verify_folder(tmp_path / "x") is not None
    assert content(tmp_path / "x") in states
    assert names_in(tmp_path) == ["x"]


def test_a_full_disk_is_told_with_what_is_needed(tmp_path):
    with pytest.raises(OutputError, match=r"No space left .*it takes 0.0 MB, .* MB are free there; make room"):
        commit_folder(tmp_path / "x", NEW, kind="x", fs=Full())
    with pytest.raises(OutputError, match=r"make room"):
        commit_file(tmp_path / "x", b"1", fs=Full())
    assert names_in(tmp_path) == []


class Full(FileSystem):
    """A disk without room."""

    def write(self, handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_is_discarded_in_one_step_and_twice_is_no_error(tmp_path):
    commit_folder(tmp_path / "x", OLD, kind="x")
    discard(tmp_path / "x")
    discard(tmp_path / "x")
    assert names_in(tmp_path) == []


def test_a_file_is_committed_in_the_place_of_another_and_errors_leave_it(tmp_path):
    commit_file(tmp_path / "a", b"old")
    commit_file(tmp_path / "a", [b"n", memoryview(b"ew")])
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(OutputError, match=r"could not be written"):
        commit_file(tmp_path / "no folder" / "a", b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"could not be written"):
        commit_file(tmp_path / "folder", b"1")
    assert names_in(tmp_path) == ["a", "folder"]


def test_what_the_disk_changes_is_seen_and_the_old_folder_comes_back(tmp_path):
    class Lying(FileSystem):
        def rename(self, source, target):
            super().rename(source, target)
            if (target / "c.txt").exists():
                (target / "c.txt").write_bytes(b"rot")

    commit_folder(tmp_path / "x", OLD, kind="x")
    with pytest.raises(DamagedArtefactError, match=r"c\.txt"):
        commit_folder(tmp_path / "x", NEW, kind="x", replace=True, fs=Lying())
    assert content(tmp_path / "x") == OLD
    assert names_in(tmp_path) == ["x"]


@settings(max_examples=25)
@given(st.data())
def test_every_changed_byte_is_found(tmp_path_factory, data):
    target = tmp_path_factory.mktemp("flip") / "x"
    files = data.draw(st.dictionaries(st.sampled_from(["a", "b/c", "d.txt"]), st.binary(max_size=20), min_size=1))
    commit_folder(target, files, kind="x")
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name] or b"\0")
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (target / name).write_bytes(raw)
    with pytest.raises(DamagedArtefactError) as caught:
        verify_folder(target)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [name]


def test_all_damage_is_listed_at_once(tmp_path):
    target = tmp_path / "x"
    commit_folder(target, {"a": b"1", "b": b"22", "c": b"3", "d": b"4"}, kind="x")
    (target / "a").unlink()
    (target / "b").write_bytes(b"2")
    (target / "c").write_bytes(b"4")
    (target / "e").write_bytes(b"")
    with pytest.raises(DamagedArtefactError) as caught:
        verify_folder(target)
    assert [problem[:1] for problem in caught.value.problems] == list("abce")
    assert verify_folder(target, only=["d"]) is not None
    with pytest.raises(DamagedArtefactError, match=r"e: the manifest does not know it"):
        verify_folder(target, only=["d", "e"])
    with pytest.raises(DamagedArtefactError, match=r"b: expected 2 bytes, got 1"):
        read_verified(target, ["b"])
    assert read_verified(target, ["d"])[0] == {"d": b"4"}


def test_a_folder_without_a_manifest_has_nobody_to_vouch_for_it(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert verify_folder(tmp_path) is None
    assert read_verified(tmp_path, ["a"]) == ({"a": b"1"}, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "expected manifest version 1, got 2"),
        ({"version": True}, "expected manifest version 1"),
        ({"more": 1}, "expected an object of version"),
        ({"kind": 1}, "expected kind to be a string"),
        ({"notes": []}, "notes and files to be objects"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "not a name of a file"),
        ({"files": {"x": {"bytes": -1, "sha256": "0" * 64}}}, "must be a size"),
        ({"files": {"x": {"bytes": True, "sha256": "0" * 64}}}, "must be a size"),
        ({"files": {"x": {"bytes": 1, "sha256": "0" * 63}}}, "64 lower-case"),
        ({"files": {"x": 1}}, "expected an object of bytes"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path, change, said):
    raw = {"version": 1, "kind": "x", "notes": {}, "files": {}, **change}
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(DamagedArtefactError) as caught:
        read_manifest(tmp_path)
    assert said in str(caught.value)


def test_a_manifest_is_written_the_same_every_time(tmp_path):
    first = commit_folder(tmp_path / "x", dict(reversed(OLD.items())), kind="x", notes={"b": 1, "a": 2})
    second = commit_folder(tmp_path / "y", OLD, kind="x", notes={"a": 2, "b": 1})
    assert dump_manifest(first) == dump_manifest(second) == (Path(tmp_path) / "x" / MANIFEST).read_bytes()
    assert parse_manifest(dump_manifest(first), "x") == first


def test_a_writer_may_tell_what_it_hashed_and_is_found_out_where_that_is_wrong(tmp_path):
    def write(folder: Path, said: bytes) -> dict[str, FileRecord]:
        REAL.write_bytes(folder / "a", b"hello")
        REAL.write_bytes(folder / "b", b"not told")
        return {"a": record_content(said)}

    manifest = commit_folder(tmp_path / "right", lambda folder: write(folder, b"hello"), kind="x")
    assert verify_folder(tmp_path / "right") == manifest
    with pytest.raises(DamagedArtefactError, match="a: expected SHA-256"):
        commit_folder(tmp_path / "wrong", lambda folder: write(folder, b"hallo"), kind="x")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_what_a_trusted_writer_tells_is_not_read_again_but_all_else_is(tmp_path):
    class Counting(FileSystem):
        def measure(self, path):
            measured.append(path.name)
            return super().measure(path)

    def write(folder: Path) -> dict[str, FileRecord]:
        REAL.write_bytes(folder / "a", b"hello")
        REAL.write_bytes(folder / "b", b"not told")
        return {"a": record_content(b"hello")}

    measured: list[str] = []
    manifest = commit_folder(tmp_path / "x", write, kind="x", trusted=True, fs=Counting())
    assert verify_folder(tmp_path / "x") == manifest
    assert measured == ["b", "b"]  # hashed, and read back


@pytest.mark.parametrize("what", ["longer", "other", "more", "manifest"])
def test_of_files_that_are_not_read_again_all_but_the_content_is_looked_at(tmp_path, what):
    class Meddling(FileSystem):
        def rename(self, source, target):
            super().rename(source, target)
            if target.name == "x":
                name, content = {
                    "longer": ("a", b"hello!"), "other": ("b", b"not tols"), "more": ("c", b""),
                    "manifest": (MANIFEST, (target / MANIFEST).read_bytes().replace(b"hi", b"ho")),
                }[what]  # fmt: skip
                (target / name).write_bytes(content)

    def write(folder: Path) -> dict[str, FileRecord]:
        REAL.write_bytes(folder / "a", b"hello")
        REAL.write_bytes(folder / "b", b"not told")
        return {"a": record_content(b"hello")}

    with pytest.raises(DamagedArtefactError):
        commit_folder(tmp_path / "x", write, kind="x", notes={"said": "hi"}, trusted=True, fs=Meddling())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", [MemoryError(), ValueError("no reason supplied")])
def test_a_folder_is_committed_where_threads_find_no_memory(tmp_path, monkeypatch, said):
    def hashed(content):
        if threading.current_thread() is not threading.main_thread():
            raise said
        return original(content)

    original = commit.record_content
    expected = commit_folder(tmp_path / "one", {"a.bin": b"a", "b.bin": b"b"}, kind="example")
    monkeypatch.setattr(commit, "record_content", hashed)
    assert commit_folder(tmp_path / "other", {"a.bin": b"a", "b.bin": b"b"}, kind="example") == expected


@pytest.mark.parametrize("started", [0, 1])
def test_a_folder_is_committed_where_no_thread_can_be_started(tmp_path, monkeypatch, started):
    """Memory may be too short for the stack of one; what a run saves then is what it goes on from."""
    left, start = [started], threading.Thread.start

    def refuse(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    contents = {f"{n}.bin": bytes([n]) * 1000 for n in range(4)}
    expected = commit_folder(tmp_path / "one", contents, kind="example")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert commit_folder(tmp_path / "other", contents, kind="example") == expected
    assert verify_folder(tmp_path / "other") == expected


def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    commit_folder(tmp_path / "one", {"a.bin": b"a", "b.bin": b"b"}, kind="example")
    (tmp_path / "one" / "a.bin").unlink()
    os.mkfifo(tmp_path / "one" / "a.bin")
    with pytest.raises(DamagedArtefactError, match=r"a\.bin: .*not a regular file"):
        verify_folder(tmp_path / "one")
