"""How long does a dense training step take, and how much memory? Veneer against PEFT + transformers.

SmolLM2-135M, float32, LoRA on all linear layers, 4 sequences of 512 tokens, every token supervised; forward, backward,
clipping, AdamW. Each contender lives in a process of its own; they take turns, one step each, so that both meet the
same noise; the best of N steps counts. PEFT runs at its strongest on a CPU: sdpa attention, no padding, no mask, one
fused AdamW; eager and under torch.compile. Beside them the limit: the kernels of our step timed alone.

    python benchmarks/train_step.py --rank 8 --steps 8
    python benchmarks/train_step.py --dropout 0.05 --only veneer peft "peft, torch.compile"
    python benchmarks/train_step.py --dora --only veneer peft "peft, torch.compile"
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import veneer

sys.path.insert(0, str(Path(__file__).parent))
from common import memory, save, table

SEQUENCES, LENGTH = 4, 512
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4


class Settings(NamedTuple):
    """What the adapters of all contenders have in common."""

    rank: int
    dropout: float = 0.0
    dora: bool = False

    @property
    def ours(self) -> dict[str, Any]:
        """Veneer's names for them."""
        return {"rank": self.rank, "alpha": 2 * self.rank, "dropout": self.dropout, "use_dora": self.dora}

    @property
    def theirs(self) -> dict[str, Any]:
        """PEFT's."""
        return {"r": self.rank, "lora_alpha": 2 * self.rank, "lora_dropout": self.dropout, "use_dora": self.dora}

    @property
    def name(self) -> str:
        """What results are called."""
        return f"r{self.rank}{'_dora' if self.dora else ''}{'_dropout' if self.dropout else ''}"


StepFunction = Callable[[], float]
Contender = tuple[StepFunction, Callable[[], None], Callable[[], dict[str, dict[str, float]]]]
"""A step, what comes before the first, and what is measured after the last."""


def token_ids() -> torch.Tensor:
    """The same random ids for both."""
    return torch.randint(3, 49_000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def loaded_model() -> torch.nn.Module:
    """SmolLM2 in float32, the same for both; every weight is looked at, so that it counts as loaded."""
    model, _ = veneer.load_base("smollm2")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model


def veneer_step(settings: Settings) -> Contender:
    from limit import limit_seconds

    from veneer.base.ragged import RaggedBatch
    from veneer.config import TrainConfig
    from veneer.scoring.loss import summed_loss
    from veneer.train.optimizer import FlatAdamW
    from veneer.train.ways import computing

    model = loaded_model()
    attachment = veneer.attach(model, veneer.LoRAConfig(**settings.ours))
    model.train()
    optimizer = FlatAdamW(attachment.parameters(), weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
    supervised = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    supervised[:, 0] = False
    batch = RaggedBatch(token_ids().reshape(-1), supervised.reshape(-1), (LENGTH,) * SEQUENCES)
    ways = ExitStack()  # as a run does: entered once, for all of its steps

    def step() -> float:
        loss = summed_loss(model, batch) / (SEQUENCES * (LENGTH - 1))
        loss.backward()
        optimizer.step(LEARNING_RATE)
        return loss.item()

    def start() -> None:
        ways.enter_context(computing(model, TrainConfig()))

    def finish() -> dict[str, dict[str, float]]:
        rows = batch.lengths, SEQUENCES * (LENGTH - 1)
        return {by: limit_seconds(model, *rows, ours=by == "ours") for by in ("torch", "ours")}

    return step, start, finish


def peft_step(settings: Settings, *, compiled: bool = False) -> Contender:
    import peft

    model = loaded_model()
    config = peft.LoraConfig(**settings.theirs, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = token_ids()
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, lambda: None, dict


CONTENDERS = {
    "veneer": veneer_step,
    "peft": peft_step,
    "peft, torch.compile": partial(peft_step, compiled=True),
    "peft, freed memory kept": peft_step,
}
"""The last one gets our allocator's policy by glibc's variables: how much of the difference is that alone."""

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


def serve(name: str, settings: Settings, pipe: Connection) -> None:
    """Make a contender's step, then do one each time the parent asks."""
    step, start_all, finish = CONTENDERS[name](settings)
    pipe.send(memory("VmRSS"))
    start_all()
    while pipe.recv():
        start = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - start, loss, memory("VmHWM")))
    pipe.send(finish())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each, after one to warm up")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="these contenders alone")
    arguments = parser.parse_args()
    settings = Settings(arguments.rank, arguments.dropout, arguments.dora)
    spawn = multiprocessing.get_context("spawn")
    pipes, results = {}, {}
    for name in arguments.only or CONTENDERS:
        pipes[name], theirs = spawn.Pipe()
        os.environ.update(KEPT if "kept" in name else {})
        spawn.Process(target=serve, args=(name, settings, theirs), daemon=True).start()
        theirs.close()  # so that a contender that dies ends the wait for it
        results[name] = {"loaded_bytes": pipes[name].recv(), "seconds": [], "losses": []}
        for variable in KEPT:
            os.environ.pop(variable, None)
    for number in range(arguments.steps + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, loss, peak = pipe.recv()
            results[name]["losses"].append(loss)
            results[name]["peak_bytes"] = peak
            if number:  # the first one warms up, and compiles
                results[name]["seconds"].append(seconds)
    for name, pipe in pipes.items():
        pipe.send(False)
        results[name]["limit"] = pipe.recv()
    report(settings, results)


def report(settings: Settings, results: dict) -> None:
    tokens = SEQUENCES * LENGTH
    for one in results.values():
        one["best_seconds"] = min(one["seconds"])
        one["tokens_per_second"] = tokens / one["best_seconds"]
    ours = results["veneer"]
    peers = {name: one for name, one in results.items() if name in ("peft", "peft, torch.compile")}
    best = min(peers.values(), key=lambda one: one["best_seconds"], default=ours)
    limits = {by: sum(parts.values()) for by, parts in ours["limit"].items()}
    ratios = {
        "speed": best["best_seconds"] / ours["best_seconds"],
        "share_of_limit": {by: limit / ours["best_seconds"] for by, limit in limits.items()},
        "peak_memory": ours["peak_bytes"] / best["peak_bytes"],
        "peak_memory_above_loaded": (ours["peak_bytes"] - ours["loaded_bytes"])
        / (best["peak_bytes"] - best["loaded_bytes"]),
        "first_loss_difference": abs(ours["losses"][0] - best["losses"][0]),
    }
    path = save(
        f"train_step_{settings.name}", {**settings._asdict(), "tokens": tokens, "results": results, "ratios": ratios}
    )
    rows = [
        {
            "contender": name,
            "best step": f"{one['best_seconds']:.2f} s",
            "tokens/s": f"{one['tokens_per_second']:.0f}",
            "peak memory": f"{one['peak_bytes'] / 1e6:,.0f} MB",
            "above the loaded model": f"{(one['peak_bytes'] - one['loaded_bytes']) / 1e6:,.0f} MB",
            "first loss": f"{one['losses'][0]:.5f}",
        }
        for name, one in results.items()
    ]
    print(table(rows))
    print(
        f"\n{settings.name}: Veneer runs at {ratios['speed']:.2f} x the faster of PEFT's, with "
        f"{ratios['peak_memory_above_loaded']:.2f} of its peak memory above the loaded model "
        f"({ratios['peak_memory']:.2f} of all)."
    )
    for by, parts in ours["limit"].items():
        each = ", ".join(f"{name} {one:.2f}" for name, one in parts.items())
        share, name = ratios["share_of_limit"][by], "torch's kernels" if by == "torch" else "the quickest kernels"
        print(f"{share:.2f} of the limit by {name}, which alone take {limits[by]:.2f} s ({each}).")
    print(path)


if __name__ == "__main__":
    main()
