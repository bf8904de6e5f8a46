"""Veneer as a contender of `train_chat.py`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.config import TrainConfig
from veneer.data.batches import Step, pack
from veneer.data.encode import EncodedRow
from veneer.train.optimizer import FlatAdamW
from veneer.train.step import StepLoss, step_gradient
from veneer.train.ways import computing

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns, work

StepFunction = Callable[[Step], StepLoss]


@contextmanager
def stepping(
    task: dict[str, Any], rows: list[EncodedRow], settings: TrainConfig, dtype: str, turns: Turns
) -> Iterator[StepFunction]:
    """Give Veneer's training step as `veneer train` does it, within what a run enters once for all of its steps."""
    torch.manual_seed(task["seed"])
    model, _ = veneer.load_base(task["model"], dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    assert all(parameter.isfinite().all() for parameter in model.parameters())  # looked at, so it counts as loaded
    turns.loaded()
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=task["rank"], alpha=task["alpha"]))
    model.train()
    optimizer = FlatAdamW(attachment.parameters(), weight_decay=0.0, max_grad_norm=task["max_grad_norm"])
    with computing(model, settings) as way:

        def step(micro_batches: Step) -> StepLoss:
            found = step_gradient(model, rows, micro_batches, begin=lambda _: None, way=way)
            optimizer.step(task["learning_rate"])
            return found

        yield step


def contend(turns: Turns, task: dict[str, Any], options: dict[str, Any]) -> None:
    """Do the steps in their order, each packed into micro-batches as a run packs them.

    Options are the base's `dtype` and those of `TrainConfig`.
    """
    options = dict(options)
    dtype = options.pop("dtype", "float32")
    rows = [
        EncodedRow(str(number), torch.tensor(row["ids"], dtype=torch.int32), torch.tensor(row["marks"]))
        for number, row in enumerate(task["rows"])
    ]
    settings = TrainConfig(**options)
    size, lengths = task["rows_per_step"], [len(row.token_ids) for row in rows]
    numbers = [list(range(start, start + size)) for start in range(0, len(rows), size)]
    micro_batches = [pack(some, lengths, settings.tokens_per_micro_batch) for some in numbers]
    with stepping(task, rows, settings, dtype, turns) as step:
        turns.ready(steps=len(numbers) * task["rounds"], packages=("torch", "transformers"))
        for _ in range(task["rounds"]):
            for one in micro_batches:
                turns.wait()
                figures = step(one)
                turns.done(figures.loss, figures.supervised)


if __name__ == "__main__":
    work(contend)
