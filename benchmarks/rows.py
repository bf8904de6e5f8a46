"""How fast are rows checked and encoded? Veneer's streams, its plain reference, and `datasets` as a peer.

Real chats (../shared/data/rows/instruct) as JSON Lines, repeated, and short completions; the tokenizer of SmolLM2. Best
of `--rounds`, each contender in turn. `datasets` reads JSON into Arrow and checks no more than types; the ids of the
reference, a tokenizer call for each text, are those of the batches.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from chat_rows import chats
from common import save, table

from veneer.base.load import load_tokenizer
from veneer.base.source import find_source
from veneer.data.encode import EncodedRows, encode_rows
from veneer.data.rows import check_rows, read_rows


def make_files(folder: Path) -> dict[str, Path]:
    real = [json.dumps({"messages": one}) + "\n" for one in chats()]
    turns = [json.loads(line)["messages"] for line in real]
    pairs = [one for one in turns if len(one) == 2]
    long = [json.dumps({"messages": numbered(chain(*pairs[n : n + 4]), n)}) + "\n" for n in range(len(pairs) - 4)]
    short = [json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(100_000)]
    files = {"real chats": real * 10, "chats of four turns": long, "short completions": short}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in files}


def numbered(messages: Iterable[dict[str, str]], number: int) -> list[dict[str, str]]:
    """Messages that stand in no other row: what comes again in a batch is tokenised once."""
    return [{**one, "content": f"{one['content']} {number}"} for one in messages]


def best(rounds: int, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the best round of each, all in turn."""
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds = time.perf_counter() - start
            found[name] = min(found.get(name, seconds), seconds)
    return found


def same(one: EncodedRows, other: EncodedRows) -> bool:
    return torch.equal(one.token_ids_T, other.token_ids_T) and torch.equal(one.supervised_T, other.supervised_T)


def load_json(path: Path, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(cache / str(time.time_ns()))
    )


def measure(name: str, path: Path, tokenizer: Any, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    rows = read_rows(str(path)).rows
    ways: dict[str, Callable[[], object]] = {"check": lambda: check_rows(str(path))}
    if find_spec("datasets"):
        ways["datasets"] = lambda: load_json(path, cache)
    checking = best(arguments.rounds, ways)
    some: Sequence[Any] = rows[: arguments.rows]
    options = {"max_length": 1 << 20, "skip_bad_rows": True}
    few = some[:300]
    equal = same(encode_rows(few, tokenizer, **options), encode_rows(few, tokenizer, **options, one_by_one=True))
    encoding = best(arguments.rounds, {"together": lambda: encode_rows(some, tokenizer, **options)})
    plain = best(1, {"one by one": lambda: encode_rows(few, tokenizer, **options, one_by_one=True)})
    return {
        "rows": name,
        "bytes a row": round(path.stat().st_size / len(rows)),
        "checked rows/s": round(len(rows) / checking["check"]),
        "datasets, rows/s": round(len(rows) / checking["datasets"]) if "datasets" in checking else None,
        "encoded rows/s": round(len(some) / encoding["together"]),
        "one by one, rows/s": round(len(few) / plain["one by one"]),
        "same ids": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4000, help="rows to encode of each file")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(find_source(arguments.base))
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        found = [measure(name, path, tokenizer, arguments, Path(folder)) for name, path in files.items()]
    print(table(found))
    print(save("rows", {"question": __doc__, "rounds": arguments.rounds, "results": found}))


if __name__ == "__main__":
    main()
