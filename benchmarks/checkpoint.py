"""What a checkpoint costs of the time of a run: rank 16 on every linear layer of SmolLM2-135M.

    python benchmarks/checkpoint.py [BASE]

BASE is a folder, a hub id, or a GGUF file; the embedded `smollm2` otherwise. Timed is all that training waits for: the
copy of the adapter, writing, fsync, the digests, reading back, the removal of the oldest. Beside it, what the disk asks
for alone: the same bytes written and synced by a plain loop, and by safetensors without any promise.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, save, table
from safetensors.torch import save_file

from veneer.base.load import load_base
from veneer.config import LoRAConfig
from veneer.nn.attach import attach, attachment_of, current_adapter
from veneer.train.checkpoint import TrainState, save_checkpoint
from veneer.train.optimizer import FlatAdamW

REPEATS = 15
AIM_MS = 150.0


def times(work: Callable[[int], object]) -> dict[str, float]:
    """Milliseconds of a work that is given its number; the first two are not counted."""
    found = []
    for number in range(1, REPEATS + 3):
        start = time.perf_counter()
        work(number)
        found.append(1000 * (time.perf_counter() - start))
    found = sorted(found[2:])
    return {"median_ms": statistics.median(found), "least_ms": found[0], "most_ms": found[-1]}


def main() -> None:
    model, _ = load_base(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    attach(model, LoRAConfig(rank=16))
    parameters = attachment_of(model).parameters()
    optimizer = FlatAdamW(parameters, weight_decay=0.0, max_grad_norm=1.0)
    for parameter in parameters.values():
        parameter.grad.normal_()
    optimizer.step(1e-3)
    tensors = {name: one.detach() for name, one in parameters.items()} | optimizer.state()
    build = RESULTS.parent.parent / "build"  # on the disk that is asked about, and not under git
    build.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(dir=build))
    try:

        def checkpoint(number: int) -> None:
            save_checkpoint(home / "checkpoints", current_adapter(model), optimizer, TrainState(step=number), 2)

        def plain(_: int) -> None:
            with (home / "plain.bin").open("wb") as file:
                for tensor in tensors.values():
                    file.write(tensor.numpy().data)
                os.fsync(file.fileno())

        def unsafe(_: int) -> None:
            save_file({name: one.contiguous() for name, one in tensors.items()}, home / "unsafe.safetensors")

        results = {
            "checkpoint, committed and read back": times(checkpoint),
            "the same bytes, written and synced": times(plain),
            "safetensors.save_file, nothing synced": times(unsafe),
        }
        size = sum(one.stat().st_size for one in (home / "checkpoints").rglob("*") if one.is_file()) // 2
    finally:
        shutil.rmtree(home)
    path = save(
        "checkpoint",
        {
            "parameters": sum(one.numel() for one in parameters.values()),
            "bytes": size,
            "repeats": REPEATS,
            "aim_ms": AIM_MS,
            "results": results,
        },
    )
    rows = [{"what": name, **{key: f"{value:.0f}" for key, value in one.items()}} for name, one in results.items()]
    print(table(rows))
    print(f"\n{size / 1e6:.1f} MB a checkpoint, {torch.get_num_threads()} threads; {path}")


if __name__ == "__main__":
    main()
