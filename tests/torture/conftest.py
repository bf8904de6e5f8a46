"""The nursery, the runs that are tortured, and what a run left."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMES = ("tokens_per_second", "peak_rss_bytes")

TOP = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}

RUNS = {
    "lora, dropout, accumulation": {"adapter": {"dropout": 0.1}},
    "dora, cosine, patience": {
        "adapter": {"use_dora": True, "dropout": 0.1},
        "train": {"schedule": "cosine", "patience": 9, "eval_every": 3},
    },
    "nf4, rslora, lora+": {"storage": "nf4", "adapter": {"use_rslora": True}, "train": {"lora_plus_ratio": 4.0}},
    "prefix on disk, freeze_A": {
        "adapter": {**TOP, "freeze_A": True, "dropout": 0.1},
        "train": {"cache_prefix": "disk", "schedule": "constant"},
    },
    "int8, layers computed again": {"storage": "int8", "train": {"checkpoint_activations": True, "weight_decay": 0.1}},
    "plain reference, eva": {"adapter": {"init": "eva", "init_options": {"batches": 2}}, "train": {"fast": False}},
    "prefix in memory, dora": {"adapter": {**TOP, "use_dora": True}, "train": {"cache_prefix": "memory"}},
    "pissa, checkpoint at every step": {"adapter": {"init": "pissa"}, "train": {"checkpoint_every": 1}},
    "whole modules and rows": {"adapter": {"modules_to_save": ["norm"], "token_rows": {"embed_tokens": [20, 30]}}},
    "one micro-batch, nothing drawn": {"train": {"tokens_per_micro_batch": 1000}},
}
"""Combinations of variant, storage, initialisation, accumulation, schedule, cache and evaluation."""

ROWS, EPOCHS = 40, 3


@dataclass
class Ended:
    """How a run ended.

    Args:
        code: Exit code, or minus the signal.
        seconds: What it took.
        end: When, by the monotonic clock of all processes.
    """

    code: int
    seconds: float
    end: float


class Nursery:
    """Starts runs, see `nursery.py`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("nursery.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, **order: object) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Chain:
    """One run folder, and the processes that came and went in it.

    Args:
        nursery: Starts them.
        run_file: What is run.
        folder: Of the chain: the run folder, the rows of each step, what was printed.
    """

    def __init__(self, nursery: Nursery, run_file: Path, folder: Path) -> None:
        self.nursery, self.run_file, self.out = nursery, run_file, folder / "run"
        self.trace, self.log = folder / "rows.jsonl", folder / "log.txt"
        folder.mkdir()

    def go(self, *more: str, **order: object) -> Ended:
        """Begin the run, or go on with it where there is one."""
        resume = ["--resume"] if (self.out / "plan.json").exists() else []
        arguments = ["train", str(self.run_file), "--out", str(self.out), *resume, *more]
        return self.nursery.run(arguments=arguments, log=str(self.log), trace=str(self.trace), **order)

    def finish(self) -> Ended:
        """Go on undisturbed to the end."""
        ended = self.go()
        assert ended.code == 0, self.log.read_text()[-3000:]
        return ended

    def metrics(self) -> list[dict]:
        """The lines of the metrics, but for times."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

    def adapter(self) -> dict[str, bytes]:
        """Every byte of the adapter's folder."""
        return {path.name: path.read_bytes() for path in (self.out / "adapter").iterdir()}

    def check_rows(self) -> None:
        """Each row was trained on exactly once an epoch: none is missing, none came twice."""
        rows: dict[int, list[int]] = {}
        for line in self.trace.read_text().splitlines():
            number, of_step = json.loads(line)
            assert rows.setdefault(number, of_step) == of_step, f"step {number} trained on other rows when done again"
        steps = [line for line in self.metrics() if "loss" in line]
        assert sorted(rows) == [line["step"] for line in steps] == list(range(1, len(steps) + 1))
        for epoch in range(EPOCHS):
            seen = [row for line in steps if epoch < line["epoch"] <= epoch + 1 for row in rows[line["step"]]]
            assert sorted(seen) == list(range(ROWS)), f"epoch {epoch}"


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def settings_of(tiny_base: Path, tmp_path: Path) -> Callable[..., dict]:
    """Gives the settings of a named run of `RUNS`, over 40 rows, with some of `train` changed."""

    def give(run: str, **changes: object) -> dict:
        files = {}
        for role, start, count in (("train", 0, ROWS), ("eval", 60, 6)):
            rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(start, start + count)]
            files[role] = tmp_path / f"{role}.jsonl"
            files[role].write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = {
            "epochs": EPOCHS,
            "learning_rate": 1e-2,
            "tokens_per_step": 64,
            "tokens_per_micro_batch": 32,
            "checkpoint_every": 4,
        }
        return {
            "base": str(tiny_base),
            "storage": RUNS[run].get("storage", "plain"),
            "adapter": {"rank": 4, **RUNS[run].get("adapter", {})},
            "data": {role: str(path) for role, path in files.items()},
            "train": {**train, **RUNS[run].get("train", {}), **changes},
            "out": str(tmp_path / "run"),
        }

    return give


@pytest.fixture
def make_chain(nursery: Nursery, settings_of: Callable[..., dict], tmp_path: Path) -> Callable[..., Chain]:
    """Makes a chain of a named run of `RUNS`."""

    def make(run: str, name: str, **changes: object) -> Chain:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(settings_of(run, **changes)))  # JSON is YAML
        return Chain(nursery, path, tmp_path / name)

    return make
