"""Does it pay to compute a prompt once that all rows of a micro-batch begin with? And from which length on?

A training step of Veneer (forward, backward, update) on SmolLM2, LoRA on all linear layers: rows that begin with the
same tokens, then about so many of their own, of which the last half is supervised. Each case with sharing and without
in turn, the best of `--rounds`. The rule that decides in a run (`data.sharing.GROUP_COST`) is switched off; what it
would have said is a column.

    python benchmarks/shared_prompt.py
    python benchmarks/shared_prompt.py --cases 16x200+60 --rounds 9
"""

import argparse
import os
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import save, table

import veneer
from veneer.config import TrainConfig
from veneer.data import sharing
from veneer.data.encode import EncodedRow
from veneer.train.optimizer import FlatAdamW
from veneer.train.step import step_gradient
from veneer.train.ways import computing

CASES = ("16x200+60", "8x20+60", "8x4+60", "8x2+60", "2x8+60", "2x32+60", "2x64+60", "4x256+60")
RULE = sharing.GROUP_COST


def rows_of(count: int, prompt: int, own: int) -> list[EncodedRow]:
    """Rows of random tokens; the lengths of their own parts differ a little, as those of real ones do."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(3, 1000, (prompt,), generator=generator)
    found = []
    for number in range(count):
        size = own - own // 6 + number % (own // 3)
        ids = torch.cat([begin, torch.randint(3, 1000, (size,), generator=generator)])
        ids[prompt] = 1000 + number  # the rows differ from here on
        found.append(EncodedRow(f"row {number}", ids.int(), torch.arange(len(ids)) >= prompt + size // 2))
    return found


def measure(case: str, rounds: int, model: Any, way: Any, optimizer: FlatAdamW) -> dict[str, Any]:
    count, prompt, own = (int(part) for part in case.replace("x", "+").split("+"))
    rows = rows_of(count, prompt, own)
    sharing.GROUP_COST = RULE
    pays = bool(sharing.shared_groups(rows))
    sharing.GROUP_COST = 0
    tokens = sum(len(row.token_ids) for row in rows)
    ways = {"alone": replace(way, alone="to compare with"), "shared": way}
    best, losses = dict.fromkeys(ways, float("inf")), {}
    for place in range(rounds + 1):
        for name, one in ways.items():
            start = time.perf_counter()
            loss = step_gradient(model, rows, [list(range(count))], lambda _: None, way=one).loss
            optimizer.step(0.0)  # the weights stay, so that every round has the same loss
            seconds = time.perf_counter() - start
            if place:
                best[name] = min(best[name], seconds)
            losses[name] = loss
    return {
        "case": case,
        "tokens": tokens,
        "computed": len(sharing.make_shared_batch(rows).token_ids),
        "alone, s": round(best["alone"], 3),
        "shared, s": round(best["shared"], 3),
        "times as fast": round(best["alone"] / best["shared"], 2),
        "in a run": "shared" if pays else "alone",
        "losses differ by": f"{abs(losses['shared'] / losses['alone'] - 1):.0e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="ROWSxPROMPT+OWN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--name", default="shared_prompt", help="of the file in results/")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, _ = veneer.load_base(arguments.base, dtype=vars(torch)[arguments.dtype])
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=arguments.rank))
    model.train()
    optimizer = FlatAdamW(attachment.parameters(), weight_decay=0.0, max_grad_norm=1.0)
    with computing(model, TrainConfig()) as way:
        found = []
        for case in arguments.cases:
            found.append(measure(case, arguments.rounds, model, way, optimizer))
            print(found[-1], flush=True)
    print(table(found))
    options = {name: value for name, value in vars(arguments).items() if name not in ("cases", "name")}
    print(save(arguments.name, {"question": __doc__, **options, "group_cost": RULE, "results": found}))


if __name__ == "__main__":
    main()
