"""Rows in a store: the same rows, found again, never half of them, never with a byte changed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_tokenizer

from veneer.data.encode import encode_rows
from veneer.data.rows import check_rows, read_rows
from veneer.data.store import Settings, encode_checked, recall_or_check, tokenizer_digest
from veneer.errors import DataError


def go_on(share):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, count: int = 300, bad: tuple[int, ...] = ()) -> str:
    lines = []
    for n in range(count):
        turns = [("user", f"{n} + 1?"), ("assistant", f"{n + 1}" * (n % 7 + 1))]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        lines.append("{" if n in bad else json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def encode(path: str, tokenizer=None, max_length: int = 200, skip: bool = False, tick=go_on):
    checked = recall_or_check(path, skip_bad_rows=skip, tick=go_on, small=0)
    return encode_checked(checked, Settings(tokenizer or tiny_tokenizer(), max_length, skip), tick, small=0)


def stores(cache: Path) -> list[Path]:
    return sorted(cache.glob("rows/*/*")) if cache.exists() else []


def same(one, other) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True)]
    ids = all(torch.equal(a.token_ids, b.token_ids) and torch.equal(a.supervised, b.supervised) for a, b in pairs)
    return (
        ids and all(a.source == b.source for a, b in pairs) and (one.bad, one.findings) == (other.bad, other.findings)
    )


@pytest.mark.parametrize("skip", [False, True])
def test_a_store_holds_the_rows_that_memory_would(tmp_path, cache, skip):
    path = write(tmp_path / "a.jsonl", bad=(3, 40) if skip else ())
    tokenizer = tiny_tokenizer()
    plain = encode_rows(read_rows(path, skip_bad_rows=skip).rows, tokenizer, max_length=80, skip_bad_rows=True)
    checked = check_rows(path, skip_bad_rows=skip)
    if plain.bad and not skip:
        with pytest.raises(DataError, match="rows cannot be trained on"):
            encode_checked(checked, Settings(tokenizer, 80), go_on, small=0)
        assert stores(cache) == []
        return
    memory = encode_checked(checked, Settings(tokenizer, 80, skip), go_on)
    assert stores(cache) == []
    stored = encode_checked(checked, Settings(tokenizer, 80, skip), go_on, small=0)
    assert len(stores(cache)) == 1
    assert same(memory, stored)
    assert [row.source for row in stored] == [row.source for row in plain]
    assert (stored.num_tokens, stored.num_supervised) == (plain.num_tokens, plain.num_supervised)
    assert stored.lengths.tolist() == [len(row.token_ids) for row in plain]
    assert stored[-1].token_ids.tolist() == stored[len(stored) - 1].token_ids.tolist()
    assert [row.source for row in stored[2:5]] == [row.source for row in [*stored][2:5]]
    with pytest.raises(IndexError):
        stored[len(stored)]


def test_a_second_run_reads_nothing_again(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", bad=(5,))
    first = encode(path, skip=True)
    moved = tmp_path / "moved.jsonl"
    Path(path).rename(moved)
    monkeypatch.setattr("veneer.data.store.check_rows", lambda *_, **__: pytest.fail("rows were checked again"))
    monkeypatch.setattr("veneer.data.store.encode_stream", lambda *_, **__: pytest.fail("rows were encoded again"))
    again = encode(str(moved), skip=True)
    assert len(again) == len(first) == 299
    assert torch.equal(again.token_ids_T, first.token_ids_T)
    assert again[7].source == f"{moved}:9"  # the file is named as it is now
    assert recall_or_check(str(moved), skip_bad_rows=True, tick=go_on, small=0).bad_lines[0].startswith(f"{moved}:6: ")


def test_each_input_has_a_store_of_its_own(tmp_path, cache):
    path = write(tmp_path / "a.jsonl")
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|start|>", "<|pad|>")
    words = tiny_tokenizer()
    words.add_tokens(["hello"])
    encode(path)
    for count, change in enumerate(
        [
            {"max_length": 201},
            {"skip": True},
            {"tokenizer": other},
            {"tokenizer": words},
            {"path": write(tmp_path / "b.jsonl", 301)},
        ],
        start=2,
    ):
        encode(**{"path": path, **change})
        assert len(stores(cache)) == count
    encode(path)
    assert len(stores(cache)) == 6
    assert len({tokenizer_digest(one) for one in (tiny_tokenizer(), tiny_tokenizer(), other, words)}) == 3


def test_a_store_with_any_byte_changed_is_made_again(tmp_path, cache, caplog):
    path = write(tmp_path / "a.jsonl", 40)
    whole = encode(path)
    expected = [row.token_ids.tolist() for row in whole]
    del whole
    (store,) = stores(cache)
    for name in sorted(one.name for one in store.iterdir()):
        size = (store / name).stat().st_size
        for damage in ("first", "last", "middle", "short", "zero", "gone", "long"):
            data = bytearray((store / name).read_bytes())
            place = {"first": 0, "last": size - 1, "middle": size // 2}.get(damage)
            if place is not None:
                data[place] ^= 1
            whole = {"short": data[:-1], "zero": data[: size // 2] + bytes(size - size // 2), "long": data + b"\0"}
            (store / name).unlink()
            if damage != "gone":
                (store / name).write_bytes(whole.get(damage, data))
            caplog.clear()
            assert [row.token_ids.tolist() for row in encode(path)] == expected, (name, damage)
            harmless = name == "MANIFEST.json" and damage == "short"  # its last line end
            assert ("damaged and are made again" in caplog.text) != harmless, (name, damage)


def test_what_ends_the_work_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", 3000)
    seen = []

    def stop(share):
        seen.append(share)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(path, tick=stop)
    assert len(seen) == 3
    assert [one for one in cache.rglob("*") if one.is_file()] == []
    assert len(encode(path)) == 3000


SCRIPT = """
import sys
from tests.conftest import tiny_tokenizer
from veneer.data.store import Settings, encode_checked, recall_or_check
tick = lambda share: print(share, flush=True)
checked = recall_or_check(sys.argv[1], skip_bad_rows=False, tick=tick, small=0)
print("encoding", flush=True)
encode_checked(checked, Settings(tiny_tokenizer(), 200), tick, small=0)
"""


def test_a_killed_preparation_leaves_nothing_that_is_read_later(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", 20_000)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "VENEER_CACHE": str(cache), "PYTHONPATH": f"{root / 'src'}:{root}"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, text=True, env=environment)
    while "encoding" not in process.stdout.readline():
        pass
    for _ in range(12):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert [store for store in stores(cache) if not store.name.startswith(".")] == []
    start = time.perf_counter()
    assert len(encode(path)) == 20_000
    assert time.perf_counter() - start < 120
    assert len([one for one in cache.glob("rows/*/*") if (one / "MANIFEST.json").is_file()]) == 1
    assert len(stores(cache)) == 1  # what the killed process left was removed


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, cache):
    path = write(tmp_path / "a.jsonl")
    checked = check_rows(path)
    write(tmp_path / "a.jsonl", 299)
    with pytest.raises(DataError, match="was changed while it was read"):
        encode_checked(checked, Settings(tiny_tokenizer(), 200), go_on)
    with pytest.raises(DataError, match="was changed while it was read"):
        encode_checked(checked, Settings(tiny_tokenizer(), 200), go_on, small=0)
    assert stores(cache) == []


def test_duplicates_and_overlap_are_counted(tmp_path):
    rows = [{"prompt": f"{n % 4}?", "completion": f" {n % 4}"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": f" {n}"}) + "\n" for n in (3, 4, 3))
    )
    one, other = encode(str(tmp_path / "a.jsonl")), encode(str(tmp_path / "b.jsonl"))
    assert (one.num_duplicates, other.num_duplicates) == (6, 1)
    assert (other.num_in(one), one.num_in(other)) == (2, 2)
    # the same tokens with other supervision are another row
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "3", "completion": "? 3"}) + "\n")
    assert encode(str(tmp_path / "c.jsonl")).num_in(one) == 0
