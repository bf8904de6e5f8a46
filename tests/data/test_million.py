"""A million rows: checked quickly, encoded into a store, with the memory of a thousand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from tests.conftest import tiny_tokenizer
from veneer.data.batches import epoch_steps
from veneer.data.store import Settings, encode_checked, recall_or_check

def held():
    lines = open("/proc/self/status").readlines()
    return {l.split(":")[0]: int(l.split()[1]) * 1024 for l in lines if l.startswith(("VmHWM", "RssAnon"))}

def go_on(share):
    anonymous.append(held()["RssAnon"])

anonymous, before = [], held()
start = time.process_time()
checked = recall_or_check(sys.argv[1], skip_bad_rows=False, tick=go_on)
seconds = time.process_time() - start
checking = max(anonymous) - before["RssAnon"]
rows = encode_checked(checked, Settings(tiny_tokenizer(), 1024), go_on)
encoding = max(anonymous) - before["RssAnon"]
start = time.process_time()
steps = epoch_steps(rows.lengths, seed=0, epoch=0, tokens_per_step=8192, tokens_per_micro_batch=4096)
planning = time.process_time() - start
print(len(rows), checked.num_rows / seconds, checking, encoding, held()["VmHWM"], rows.num_tokens, planning)
"""


def write(path: Path, count: int) -> None:
    with path.open("w") as file:
        for n in range(count):
            question = f"What is {n} + {n % 977}, and what is the next number after it? Say no more than that."
            row = {"prompt": question, "completion": f" {n + n % 977}, and then {n + n % 977 + 1}."}
            file.write(json.dumps(row) + "\n")


def prepare(path: Path, cache: Path) -> list[float]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "VENEER_CACHE": str(cache), "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.torture
def test_a_million_rows_take_the_memory_of_a_few(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, 1_000_000)
    rows, per_second, checking, encoding, peak, tokens, planning = prepare(path, tmp_path / "cache")
    print(f"\n{rows:,.0f} rows, {path.stat().st_size / 1e6:,.0f} MB: {per_second:,.0f} checked a second of one core")
    print(f"memory of our own: {checking / 1e6:+,.0f} MB while checking, {encoding / 1e6:+,.0f} MB while encoding")
    print(f"{tokens:,.0f} tokens; peak with all that is mapped {peak / 1e6:,.0f} MB; plan of an epoch {planning:.1f} s")
    assert rows == 1_000_000
    assert per_second >= 50_000
    assert checking < 20e6
    assert encoding < 200e6  # a batch, and the threads of the tokenizer: the same for a quarter of the rows
    assert planning < 10
