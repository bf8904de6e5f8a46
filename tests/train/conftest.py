"""Small runs on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.config import RunConfig


def write_rows(path: Path, count: int, start: int = 0) -> str:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def make_run(tiny_base: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes a run over 24 rows: 4 steps an epoch, 2 epochs, evaluation."""

    def make(out: str = "run", adapter: dict | None = None, data: dict | None = None, **train: object) -> RunConfig:
        rows = {
            "train": write_rows(tmp_path / "train.jsonl", 24),
            "eval": write_rows(tmp_path / "eval.jsonl", 6, start=50),
        }
        settings = {
            "epochs": 2,
            "learning_rate": 1e-2,
            "tokens_per_step": 60,
            "tokens_per_micro_batch": 30,
            "checkpoint_every": 3,
        }
        return RunConfig(
            base=str(tiny_base),
            adapter={"rank": 4, **(adapter or {})},
            data={**rows, **(data or {})},
            train={**settings, **train},
            out=str(tmp_path / out),
        )

    return make
