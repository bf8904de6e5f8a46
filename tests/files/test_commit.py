"""A committed folder is there whole or not at all, and its manifest vouches for every byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import DamagedArtefactError, OutputError
from veneer.files.commit import commit_folder, read_manifest, readable_folder, verify_folder
from veneer.files.filesystem import FileSystem
from veneer.files.manifest import MANIFEST, dump_manifest, parse_manifest, read_verified

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


class KilledError(Exception):
    """Stands for a process that stops; not an OSError, so nothing handles it."""


class Failing(FileSystem):
    """Fails at one change of the disk, counted from 0; when it is killed, at every change after it too."""

    def __init__(self, fail_at, error=OSError, dead_afterwards=False):
        self.count, self.fail_at, self.error, self.dead = 0, fail_at, error, dead_afterwards

    def _step(self):
        self.count += 1
        if self.count - 1 == self.fail_at or (self.dead and self.count > self.fail_at):
            raise self.error("injected")

    def make_folder(self, path):
        self._step()
        super().make_folder(path)

    def make_parents(self, path):
        self._step()
        super().make_parents(path)

    def write_bytes(self, path, data):
        try:
            self._step()
        except BaseException:
            path.write_bytes(data[: len(data) // 2])  # torn
            raise
        super().write_bytes(path, data)

    def fsync_folder(self, path):
        self._step()
        super().fsync_folder(path)

    def rename(self, source, target):
        self._step()
        super().rename(source, target)

    def remove_tree(self, path):
        self._step()
        super().remove_tree(path)


def steps_of(tmp_path, replace):
    counter = Failing(-1)
    commit_folder(tmp_path / "count", OLD, kind="x")
    commit_folder(tmp_path / "count" if replace else tmp_path / "count2", NEW, kind="x", replace=replace, fs=counter)
    return counter.count


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


@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_at_any_step_leaves_the_target_as_it_was_or_whole(tmp_path, replace):
    steps = steps_of(tmp_path, replace)
    assert steps >= 9
    messages = []
    for step in range(steps):
        home = tmp_path / f"step{step}"
        home.mkdir()
        target = home / "x"
        if replace:
            commit_folder(target, OLD, kind="x")
        try:
            commit_folder(target, NEW, kind="x", replace=replace, fs=Failing(step))
        except OutputError as error:
            messages.append(error.message)
            assert (content(target) if target.exists() else None) == (OLD if replace else None), step
            assert names_in(home) == (["x"] if replace else []), step
        else:  # only the removal of what was replaced may fail in silence
            assert content(target) == NEW, step
    assert len(messages) == (steps - 2 if replace else steps)
    assert all("injected" in message for message in messages)


@pytest.mark.parametrize("replace", [False, True])
def test_a_process_killed_at_any_step_loses_nothing(tmp_path, replace):
    for step in range(steps_of(tmp_path, replace)):
        home = tmp_path / f"step{step}"
        home.mkdir()
        target = home / "x"
        if replace:
            commit_folder(target, OLD, kind="x")
        with pytest.raises(KilledError):
            commit_folder(target, NEW, kind="x", replace=replace, fs=Failing(step, KilledError, dead_afterwards=True))
        found = readable_folder(target)
        state = content(found) if found.exists() else None
        assert state in ((OLD, NEW) if replace else (None, NEW)), step
        if state is not None:
            assert verify_folder(found) is not None


def test_what_a_dead_process_left_is_brought_back_and_swept(tmp_path):
    target = tmp_path / "x"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid = int(dead.stdout)
    commit_folder(target, OLD, kind="x")
    target.rename(tmp_path / f".x.old-{pid}-00")
    stale = tmp_path / f".x.tmp-{pid}-00"
    stale.mkdir()
    alive = tmp_path / f".x.tmp-{os.getpid()}-00"
    alive.mkdir()
    other = tmp_path / f".xy.tmp-{pid}-00"
    other.mkdir()
    assert content(readable_folder(target)) == OLD
    with pytest.raises(OutputError, match=r"exists already"):
        commit_folder(target, NEW, kind="x")
    assert content(target) == OLD
    assert names_in(tmp_path) == sorted([alive.name, other.name, "x"])


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
