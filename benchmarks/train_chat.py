"""How long does a training step on real chats take, and in how much memory? Veneer, TRL, mlx-lm, unsloth.

SmolLM2-135M-Instruct, real chat rows at their real lengths (../shared/data/rows/instruct), 8 rows a step, the answers
supervised; LoRA of rank 16 on all linear layers, AdamW, the same learning rate, the same ids and marks for everyone.
Each contender lives in a process and a Python environment of its own (`chat_peers.py` says which and how they are made;
one that is missing is a row that says so). Veneer, over a base in float32 and over one in bfloat16, and a peer take
turns, one step each, peer after peer (all at once do not fit into memory); the same steps come round several times and
of each step the best time counts. Useful tokens are those that are no padding.

    python benchmarks/train_chat.py                        # everyone
    python benchmarks/train_chat.py --only veneer TRL      # those whose name begins so
    python benchmarks/train_chat.py --search trl           # find TRL's best CPU setting, which later runs use
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from chat_peers import SEARCHED, contenders, mlx_contender, trl_contender, unsloth_contender
from chat_rows import ROWS, make_model, make_task
from chat_search import DIMENSIONS, Make, Search, figures, pack_tokens
from common import save, table
from turns import Contender, Running, take_turns

ROWS_PER_STEP = 8
OURS = ("veneer", "Veneer over a bfloat16 base")
ASKED = {"TRL, best": 1.8, "TRL, same loss": 1.8, "TRL, defaults": 3.0, "mlx-lm": 2.0, "unsloth": 1.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="different steps, each of 8 rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often they come round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name begins so")
    parser.add_argument("--search", choices=list(DIMENSIONS), help="try a peer's options instead")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "train_chat")
    parser.add_argument("--name", default="train_chat", help="of the file in results/")
    arguments = parser.parse_args()
    if not ROWS.exists():
        raise SystemExit(f"{ROWS} is not there: the rows are laid beside this repository only where it is developed")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    steps, rounds = arguments.steps, arguments.rounds
    task, facts = make_task(folder, folder / "model", steps=steps, rows_per_step=ROWS_PER_STEP, rounds=rounds)
    print(
        f"{facts['drawn']}, padding {facts['padding_in_order']:.0%}, sorted {facts['padding_sorted']:.0%}", flush=True
    )
    if arguments.search:
        search(arguments.search, task, facts)
        return
    everyone = contenders(folder, pack_tokens(facts)).values()
    chosen = [one for one in everyone if not arguments.only or one.name.startswith(tuple(arguments.only))]
    ours = [one for one in chosen if one.name in OURS]
    peers = [one for one in chosen if one.name not in OURS]
    pairs = [run([*ours, one], task, folder) for one in peers] if peers else [run(ours, task, folder)]
    report(arguments.name, pairs, facts)


def run(group: list[Contender], task: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Let contenders take turns; return what each told."""
    running: dict[str, Running] = {}
    try:
        for one in group:
            running[one.name] = Running(one, task, folder / f"{one.name.replace('/', ' ')}.log")
        take_turns(running, tell=lambda line: print(line, flush=True))
    finally:
        for started in running.values():
            started.end()
    return {name: one.record for name, one in running.items()}


def search(peer: str, task: Path, facts: Mapping[str, Any]) -> None:
    """Try a peer's settings and write what was found."""
    makers: dict[str, Make] = {
        "trl": trl_contender,
        "unsloth": unsloth_contender,
        "mlx": partial(mlx_contender, folder=task.parent),
    }
    trials = Search(peer, makers[peer], task, facts, tell=lambda line: print(line, flush=True))
    found = {"best": trials.best(), "best_same_loss": trials.best(same_loss=True)}
    path = save(SEARCHED[peer].stem, {"peer": peer, "task": facts, **found, "trials": trials.trials})
    for kind, best in found.items():
        print(f"{kind} of {len(trials.trials)} settings: {best['chosen']}")
    print(path)


def report(name: str, pairs: Sequence[Mapping[str, dict[str, Any]]], facts: Mapping[str, Any]) -> None:
    """Write the results and print them: each peer beside what Veneer did in turns with it."""
    results: list[dict[str, Any]] = []
    rows, lines = [], []
    for pair in pairs:
        found = {one: figures(record, facts) for one, record in pair.items()}
        results.append({one: {**pair[one], **found[one]} for one in pair})
        rows += [row(one, figure) for one, figure in found.items()]
        for mine, one in product(found, found):
            if mine in OURS and one not in OURS and not any("error" in found[name] for name in (mine, one)):
                ratio = compared(found[mine], found[one])
                results[-1][mine].setdefault("ratios", {})[one] = ratio
                lines.append(sentence(mine, one, ratio))
    path = save(name, {"task": facts, "pairs": results})
    print("\n".join([table(rows), "", *lines, str(path)]))


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Return Veneer's figures over a peer's, and how far the mean losses of a round lie apart."""
    losses = zip(ours["loss_of_rounds"], theirs["loss_of_rounds"], strict=True)
    return {
        "speed": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "peak_memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "peak_memory_above_loaded": ours["peak_above_loaded_bytes"] / theirs["peak_above_loaded_bytes"],
        "loss_difference": max(abs(mine - other) for mine, other in losses),
    }


def sentence(mine: str, name: str, ratio: Mapping[str, float]) -> str:
    """Say how one of ours does against a peer."""
    asked = next((asked for start, asked in ASKED.items() if name.startswith(start)), None)
    return (
        f"{mine} runs at {ratio['speed']:.2f} × the speed of {name} (asked: {asked}), with {ratio['peak_memory']:.2f} "
        f"of its peak memory ({ratio['peak_memory_above_loaded']:.2f} above the loaded model); mean losses of a round "
        f"differ by {ratio['loss_difference']:.3f} at most."
    )


def row(name: str, figure: Mapping[str, Any]) -> dict[str, str]:
    """Return a contender's line of the table."""
    if "error" in figure:
        return dict.fromkeys(("contender", *_HEAD), "–") | {"contender": name, _HEAD[0]: figure["error"]}
    values = (
        f"{figure['seconds_per_step']:.2f} s",
        f"{figure['tokens_per_second']:.0f}",
        f"{figure['supervised_per_second']:.0f}",
        f"{figure['peak_bytes'] / 1e6:,.0f} MB",
        f"{figure['peak_above_loaded_bytes'] / 1e6:,.0f} MB",
        " ".join(f"{loss:.3f}" for loss in figure["loss_of_rounds"]),
    )
    return {"contender": name, **dict(zip(_HEAD, values, strict=True))}


_HEAD = ("a step", "useful tokens/s", "supervised/s", "peak memory", "above the loaded model", "loss of each round")


if __name__ == "__main__":
    main()
