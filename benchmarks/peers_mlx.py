"""mlx-lm's `lora` trainer on a CPU as a contender of `train_chat.py`; runs in the peer's own environment.

Its own trainer, layers and padding (to 1 + a multiple of 32). Its data set marks one answer a row, the last; so that it
learns what the others learn, the trainer is given, through its own parameters, batches that carry a mark for every
token and the loss that reads them. Rows are grouped by length over the whole round, as mlx-lm does. Options:
- `rows`: rows of a micro-batch; gradients are accumulated to a step.
- `grad_checkpoint`, `dtype`.

Arrays: B rows, S tokens.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns, work

PAD_TO = 32


def contend(turns: Turns, task: dict[str, Any], options: dict[str, Any]) -> None:
    """Train as `mlx_lm.lora` does, held at the border of every step until it is our turn."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(task["seed"])
    # transformers 5 writes the base of the rotary embedding where mlx-lm's llama does not look for it.
    config = json.loads((Path(task["model"]) / "config.json").read_text(encoding="utf-8"))
    model, _ = load(task["model"], model_config={"rope_theta": config["rope_parameters"]["rope_theta"]})
    model.set_dtype(getattr(mx, options["dtype"]))
    mx.eval(model.parameters())
    turns.loaded()
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": task["rank"], "scale": task["alpha"] / task["rank"], "dropout": 0.0})
    optimizer = optim.AdamW(learning_rate=task["learning_rate"], weight_decay=0.0, bias_correction=True)
    batches = make_batches(task, options["rows"])
    parts = task["rows_per_step"] // options["rows"]
    steps = len(batches) // parts * task["rounds"]
    turns.ready(steps=steps, packages=("mlx", "mlx-lm"), found={"threads": os.cpu_count()})
    count = 0

    def in_turns(**_: Any) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        nonlocal count
        while True:
            for start in range(0, len(batches), parts):
                turns.wait()
                count = int(sum(marks[:, 1:].sum() for _, marks in batches[start : start + parts]))
                for ids, marks in batches[start : start + parts]:
                    yield mx.array(ids), mx.array(marks), mx.array(count / parts)

    class Reports:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            turns.done(float(info["train_loss"]), count)

    arguments = TrainingArgs(
        batch_size=options["rows"],
        iters=steps * parts,
        steps_per_report=parts,
        steps_per_save=10**9,
        max_seq_length=task["longest"] + PAD_TO,
        adapter_file=f"{task['folder']}/mlx_adapters.safetensors",
        grad_checkpoint=options["grad_checkpoint"],
        grad_accumulation_steps=parts,
    )
    train(model, optimizer, [], args=arguments, loss=marked_loss, iterate_batches=in_turns, training_callback=Reports())


def make_batches(task: dict[str, Any], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut the rows, shortest first, into padded batches of ids and marks, each (B, S)."""
    rows = sorted(task["rows"], key=lambda row: len(row["ids"]))
    batches = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        longest = 1 + PAD_TO * -(-max(len(row["ids"]) for row in some) // PAD_TO)
        ids, marks = np.zeros((len(some), longest), np.int32), np.zeros((len(some), longest), np.float32)
        for place, row in enumerate(some):
            ids[place, : len(row["ids"])] = row["ids"]
            marks[place, : len(row["ids"])] = row["marks"]
        batches.append((ids, marks))
    return batches


def marked_loss(model: nn.Module, ids_BS: mx.array, marks_BS: mx.array, count: mx.array) -> tuple[mx.array, mx.array]:
    """The cross-entropy of marked tokens as mlx-lm's own loss is, over their number in an average micro-batch.

    So the mean over the micro-batches of a step is that over its tokens.
    """
    losses = nn.losses.cross_entropy(model(ids_BS[:, :-1]), ids_BS[:, 1:]) * marks_BS[:, 1:]
    return losses.astype(mx.float32).sum() / count, marks_BS.sum()


if __name__ == "__main__":
    work(contend)
