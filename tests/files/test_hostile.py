"""Files that somebody made to break a reader: typed errors, no crash, no hang, nothing left behind, bounded memory.

They are read in a process of their own: a crash or a hang ends that one, and the test says at which file.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.files.hostile import good, write_variants

from veneer.files.formats import FORMATS

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""For all files of one process together, on a machine with other things to do; nothing is judged by it but a hang."""
MAX_RESIDENT = 1 << 30


def read_all(top: Path, seed: int, count: int) -> list[dict]:
    """Return what came of each file; fail with the name of the one that was the last."""
    command = [sys.executable, "-m", "tests.files.hostile", str(top), str(seed), str(count)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        lines, why = done.stdout.splitlines(), f"exit code {done.returncode}: {done.stderr[-2000:]}"
    except subprocess.TimeoutExpired as stopped:
        lines, why = (stopped.stdout or b"").decode().splitlines(), "it hung"
    told = [json.loads(line) for line in lines]
    found = [one for one in told if "found" in one]
    if len(found) != count:
        pytest.fail(f"{told[-1] if told else 'before the first file'}: {why}")
    return found


def test_five_hundred_malformed_files_of_all_formats_are_refused_with_typed_errors(tmp_path):
    found = read_all(tmp_path, seed=0, count=600)
    faults = [one for one in found if any("FAULT" in text or " " in text for text in one["found"].values())]
    assert faults == []
    # Some variants are sound by chance: a harmless setting, other finite values. All others are refused.
    refused = [one for one in found if one["found"][f"read {one['name'].split()[1]}"] != "ok"]
    assert len(refused) >= 500
    assert {one["name"].split()[1] for one in found} == set(good())
    assert max(one["peak"] for one in found) < MAX_RESIDENT
    assert not Path("/tmp/veneer-was-here").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_files(tmp_path):
    names = [[name for name, _, _ in write_variants(tmp_path / str(run), 7, 12)] for run in range(2)]
    assert names[0] == names[1]
    assert len(set(names[0])) == 12
    first, second = (
        {
            path.relative_to(top): path.read_bytes()
            for path in top.rglob("*")
            if path.is_file() and path.stat().st_size < 1e6
        }
        for top in (tmp_path / "0", tmp_path / "1")
    )
    assert first == second


def test_what_is_good_is_read(tmp_path):
    for kind, (files, hints) in good().items():
        row, here = FORMATS[kind], tmp_path / kind
        here.mkdir()
        for name, data in files.items():
            (here / name).write_bytes(data)
        assert row.read(here / row.file if row.file else here, hints).modules
