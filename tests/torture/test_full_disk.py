"""A disk that is full at any byte of a run: a clear error, the last checkpoint stands, with room the run goes on."""

import random
import shutil
import subprocess

import pytest

from tests.torture.conftest import RUNS
from tests.torture.test_kill import same_as


def refused(chain, ended) -> None:
    """It ended with one message that says what is needed, and not with a traceback."""
    said = chain.log.read_text()
    assert ended.code == 2, said[-3000:]
    assert "make room" in said or "are needed for" in said, said[-3000:]
    assert "Traceback" not in said, said[-3000:]


@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.torture)])
def test_a_run_over_a_full_disk_ends_with_the_same_bytes_once_there_is_room(make_chain, count):
    draw, names = random.Random(count), list(RUNS)[: 3 if count == 12 else None]
    wholes = {name: make_chain(name, f"whole-{place}") for place, name in enumerate(names)}
    written = {}
    for name, whole in wholes.items():
        whole.finish()
        written[name] = sum(path.stat().st_size for path in whole.out.rglob("*") if path.is_file())
    hits = 0
    for number in range(count):
        name = names[number % len(names)]
        chain = make_chain(name, f"chain-{number}")
        for _ in range(2):
            ended = chain.go(room=draw.randrange(2 * written[name]))
            if ended.code == 0:
                break
            refused(chain, ended)
            hits += 1
        else:
            chain.finish()
        same_as(chain, wholes[name])
    print(f"{count} chains, full {hits} times")
    assert hits >= count // 2


@pytest.mark.torture
def test_a_volume_that_is_really_full(make_chain, tmp_path):
    """Ten sizes of a file system of its own, from one that holds no checkpoint to one that holds the run."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    name, volume = "lora, dropout, accumulation", tmp_path / "volume"
    whole = make_chain(name, "whole")
    whole.finish()
    volume.mkdir()
    codes = []
    for kilobytes in range(40, 440, 40):
        chain = make_chain(name, f"chain-{kilobytes}")
        chain.out = volume / "run"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", volume], check=False)
        if mounted.returncode:
            pytest.skip("a file system cannot be mounted here")
        try:
            ended = chain.go()
            codes.append(ended.code)
            if ended.code:
                refused(chain, ended)
                subprocess.run(["mount", "-o", "remount,size=64m", volume], check=True)
                chain.finish()
            same_as(chain, whole)
        finally:
            subprocess.run(["umount", volume], check=True)
    print(f"{codes.count(2)} of {len(codes)} volumes were full")
    assert codes.count(2) >= 3
