"""The README of an adapter that was made of others: of what, how, how near."""

import json
from collections.abc import Mapping, Sequence

from veneer.adapter import Adapter


def made_card(
    adapter: Adapter,
    title: str,
    sources: Sequence[Mapping[str, object]],
    settings: Mapping[str, object],
    error: float,
) -> str:
    """Return the README of an adapter.

    Args:
        adapter: What was made.
        title: How, in a sentence.
        sources: A row for each adapter that it was made of; all have the same columns.
        settings: What was asked for; what is None is left out.
        error: How far it is from the update that was meant, relative to that: Frobenius norms.

    Example:
        >>> import torch
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> adapter = Adapter({"q": LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)}, LoRAConfig(rank=1))
        >>> card = made_card(adapter, "Halved.", [{"adapter": "a"}], {"rank": 1}, 0.5)
        >>> "relative error 0.5 " in card, "| a |" in card, "    rank: 1" in card
        (True, True, True)
    """
    names = list(sources[0])
    rows = ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in sources]
    table = "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *rows])
    told = "\n".join(f"    {name}: {json.dumps(value)}" for name, value in settings.items() if value is not None)
    told += "\n\n" * bool(told)
    ranks = sorted({pair.rank for pair in adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    return f"""---
base_model: {json.dumps(adapter.metadata.base)}
library_name: peft
tags: [lora, veneer]
---

# LoRA adapter for {adapter.metadata.base or "a base that is not named"}

{title} {adapter.num_parameters:,} parameters, {adapter.num_bytes:,} bytes, {rank}. Digest `{adapter.digest}`.

## Made of

{table}

{told}## How near

Against the update that is meant: relative error {error:.3g} in the Frobenius norm, {max(0.0, 1 - error**2):.4%} of the
squared norm kept. Nothing was trained or evaluated: measure it on your task.

## Use

    from peft import PeftModel                      # the files are PEFT's
    model = PeftModel.from_pretrained(base, FOLDER)
"""
