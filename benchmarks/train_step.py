"""How long does a dense training step take, and how much memory? Veneer against PEFT + transformers.

SmolLM2-135M, float32, LoRA on all linear layers, 4 sequences of 512 tokens, every token supervised; forward, backward,
clipping, AdamW. Each contender lives in a process of its own; they take turns, one step each, so that both meet the
same noise; the best of N steps counts. PEFT runs at its strongest on a CPU: sdpa attention, no padding, no mask, one
fused AdamW.

    python benchmarks/train_step.py --rank 8 --steps 8
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import veneer

sys.path.insert(0, str(Path(__file__).parent))
from common import memory, save, table

SEQUENCES, LENGTH = 4, 512
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4

StepFunction = Callable[[], float]


def token_ids() -> torch.Tensor:
    """The same random ids for both."""
    return torch.randint(3, 49_000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def loaded_model() -> torch.nn.Module:
    """SmolLM2 in float32, the same for both; every weight is looked at, so that it counts as loaded."""
    model, _ = veneer.load_base("smollm2")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model


def veneer_step(rank: int) -> StepFunction:
    from veneer.base.ragged import RaggedBatch, ragged_attention
    from veneer.scoring.loss import summed_loss
    from veneer.train.optimizer import FlatAdamW

    model = loaded_model()
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=rank, alpha=2 * rank))
    model.train()
    optimizer = FlatAdamW(attachment.parameters(), weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
    supervised = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    supervised[:, 0] = False
    batch = RaggedBatch(token_ids().reshape(-1), supervised.reshape(-1), (LENGTH,) * SEQUENCES)

    def step() -> float:
        with ragged_attention(model):
            loss = summed_loss(model, batch) / (SEQUENCES * (LENGTH - 1))
            loss.backward()
            optimizer.step(LEARNING_RATE)
        return loss.item()

    return step


def peft_step(rank: int) -> StepFunction:
    import peft

    model = loaded_model()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = token_ids()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


CONTENDERS = {"veneer": veneer_step, "peft": peft_step}


def serve(name: str, rank: int, pipe: Connection) -> None:
    """Make a contender's step, then do one each time the parent asks."""
    step = CONTENDERS[name](rank)
    loaded = memory("VmRSS")
    pipe.send(loaded)
    while pipe.recv():
        start = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - start, loss, memory("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each, after one to warm up")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes, results = {}, {}
    for name in CONTENDERS:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(name, arguments.rank, theirs), daemon=True).start()
        results[name] = {"loaded_bytes": pipes[name].recv(), "seconds": [], "losses": []}
    for number in range(arguments.steps + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, loss, peak = pipe.recv()
            results[name]["losses"].append(loss)
            results[name]["peak_bytes"] = peak
            if number:  # the first one warms up
                results[name]["seconds"].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    report(arguments.rank, results)


def report(rank: int, results: dict) -> None:
    tokens = SEQUENCES * LENGTH
    for one in results.values():
        one["best_seconds"] = min(one["seconds"])
        one["tokens_per_second"] = tokens / one["best_seconds"]
    ours, theirs = results["veneer"], results["peft"]
    ratios = {
        "speed": theirs["best_seconds"] / ours["best_seconds"],
        "peak_memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "peak_memory_above_loaded": (ours["peak_bytes"] - ours["loaded_bytes"])
        / (theirs["peak_bytes"] - theirs["loaded_bytes"]),
        "first_loss_difference": abs(ours["losses"][0] - theirs["losses"][0]),
    }
    path = save(f"train_step_r{rank}", {"rank": rank, "tokens": tokens, "results": results, "ratios": ratios})
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
        f"\nrank {rank}: Veneer runs at {ratios['speed']:.2f} × PEFT's speed, with {ratios['peak_memory']:.2f} of its "
        f"peak memory ({ratios['peak_memory_above_loaded']:.2f} above the loaded model). {path}"
    )


if __name__ == "__main__":
    main()
