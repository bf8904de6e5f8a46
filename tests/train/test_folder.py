"""The run folder's record: no line is lost that was promised, and no disk stops a run for it."""

import errno
import json
import logging
import subprocess
import sys

import pytest
from tests.files.faulty import Faulty, KilledError

from veneer.errors import OutputError
from veneer.files.filesystem import FileSystem
from veneer.train.folder import METRICS, Metrics, alone_in, check_run_folder
from veneer.train.report import draw_losses

LINES = [{"step": step, "loss": 1 / step} for step in range(1, 6)]


class Ill(FileSystem):
    """A disk that refuses to be written to while it is ill, after it took a half of what it was given."""

    ill = False

    def write(self, handle, data):
        if self.ill:
            super().write(handle, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(handle, data)


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path)
    for count, line in enumerate(LINES, start=1):
        metrics.write(line)
        assert (tmp_path / METRICS).read_text().splitlines() == [json.dumps(one) for one in LINES[:count]]
    assert metrics.read() == Metrics(tmp_path).read() == LINES


@pytest.mark.parametrize(
    "tail", [b'{"step": 6, "lo', b'{"step": 6}', b"\0\0\0\0", b"\xff\xfe\n", b"[1]\n", b'{"a": 1}\n', b"\n"]
)
def test_a_tail_that_is_no_whole_line_is_left_out_and_overwritten(tmp_path, tail):
    whole = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    (tmp_path / METRICS).write_bytes(whole + tail)
    metrics = Metrics(tmp_path)
    assert metrics.read() == LINES
    metrics.write({"step": 6})
    assert (tmp_path / METRICS).read_bytes() == whole + b'{"step": 6}\n'


def test_what_a_full_disk_refuses_is_written_later_in_its_place(tmp_path, caplog):
    disk = Ill()
    metrics = Metrics(tmp_path, fs=disk)
    metrics.write(LINES[0])
    disk.ill = True
    metrics.write(LINES[1])
    metrics.write(LINES[2])
    metrics.sync()
    assert metrics.read() == LINES[:3]
    assert len([one for one in caplog.records if "the run goes on" in one.message]) == 1
    disk.ill = False
    metrics.write(LINES[3])
    assert Metrics(tmp_path).read() == LINES[:4]
    assert (tmp_path / METRICS).read_text().count("\n") == 4


@pytest.mark.parametrize("lost", ["dropped", "zeros", "torn"])
def test_what_was_synced_before_a_checkpoint_outlives_a_power_loss(tmp_path, lost):
    root = tmp_path / "run"
    root.mkdir()
    disk = Faulty(root)
    metrics = Metrics(root, fs=disk)
    for line in LINES[:3]:
        metrics.write(line)
    metrics.sync()
    metrics.write(LINES[3])
    seen = [what for what in disk.after_power_loss(tmp_path / "lost", set()) if lost in what]
    for what in disk.after_power_loss(tmp_path / "lost", set()):
        assert Metrics(tmp_path / "lost").read() in (LINES[:3], LINES[:4]), what
    assert seen


@pytest.mark.parametrize("mode", ["EIO", "EIO for ever", "ENOSPC", "done, then EIO", "short write"])
def test_no_fault_of_the_disk_comes_out_of_writing(tmp_path, mode):
    for at in range(12):
        root = tmp_path / f"{at}"
        root.mkdir()
        metrics = Metrics(root, fs=Faulty(root, at, mode))
        for line in LINES:
            metrics.write(line)
            metrics.sync()
        held = Metrics(root).read()
        assert held == LINES[: len(held)], at
        assert held == LINES or mode in ("EIO for ever", "ENOSPC"), at


def test_killed_at_any_operation_the_lines_before_stand(tmp_path):
    for at in range(20):
        root = tmp_path / f"{at}"
        root.mkdir()
        metrics, done = Metrics(root, fs=Faulty(root, at, "kill in a write")), 0
        try:
            for line in LINES:
                metrics.write(line)
                done += 1
        except KilledError:
            pass
        assert Metrics(root).read() == LINES[:done], at


def test_forgetting_is_one_step(tmp_path):
    lines = [*LINES[:4], {"step": 4, "eval_loss": 1.0}]
    metrics = Metrics(tmp_path)
    for line in lines:
        metrics.write(line)
    metrics.forget_after(4, evaluated=3)
    assert metrics.read() == lines[:4]
    disk = Ill()
    disk.ill = True
    with pytest.raises(OutputError, match=r"make room"):
        Metrics(tmp_path, fs=disk).forget_after(1, evaluated=1)
    assert metrics.read() == lines[:4]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_a_picture_that_cannot_be_written_is_no_reason_to_lose_a_run(tmp_path, caplog):
    (tmp_path / "loss.png").mkdir()
    with caplog.at_level(logging.WARNING):
        draw_losses(LINES, tmp_path)
    assert "loss.png: could not be written" in caplog.text
    (tmp_path / "loss.png").rmdir()
    draw_losses(LINES, tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_second_run_is_refused_as_long_as_the_first_one_lives(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys, pathlib; from veneer.train.folder import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    for how in (subprocess.Popen.kill, lambda process: process.stdin.close()):
        first = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=r"another run is at work in .*run; wait for its end"):
            check_run_folder(str(folder), "overwrite")
        with pytest.raises(OutputError, match="another run is at work"), alone_in(folder):
            pass
        how(first)
        first.wait()
        first.stdout.close()
        assert check_run_folder(str(folder), "refuse") == folder  # a lock alone is nothing
        with alone_in(folder):
            pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(handle, what):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone_in(tmp_path / "run"), alone_in(tmp_path / "run"):
        pass
