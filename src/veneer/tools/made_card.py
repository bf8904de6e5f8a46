"""The README of an adapter that was made of others: of what, how, how near."""

import json
from collections.abc import Mapping, Sequence

from veneer.adapter import Adapter
from veneer.tools.stacks import Closeness


def made_card(
    adapter: Adapter,
    title: str,
    sources: Sequence[Mapping[str, object]],
    settings: Mapping[str, object],
    total: Closeness,
) -> str:
    """Return the README of an adapter.

    Args:
        adapter: What was made.
        title: How, in a sentence.
        sources: A row for each adapter that it was made of; all have the same columns.
        settings: What was asked for; what is None is left out.
        total: How near it is to what was meant.

    Example:
        >>> import torch
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> adapter = Adapter({"q": LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)}, LoRAConfig(rank=1))
        >>> card = made_card(adapter, "Halved.", [{"adapter": "a"}], {"rank": 1}, Closeness(2, 1, 2.0, 1.0))
        >>> "relative error 0.5 " in card, "| a |" in card, "    rank: 1" in card
        (True, True, True)
    """
    names = list(sources[0])
    rows = ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in sources]
    table = "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *rows])
    told = "\n".join(f"    {name}: {json.dumps(value)}" for name, value in settings.items() if value is not None)
    ranks = sorted({pair.rank for pair in adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    return f"""---
base_model: {json.dumps(adapter.metadata.base)}
library_name: peft
tags: [lora, veneer]
---

# LoRA adapter for {adapter.metadata.base}

{title} {adapter.num_parameters:,} parameters, {adapter.num_bytes:,} bytes, {rank}. Digest `{adapter.digest}`.

## Made of

{table}

{told}

## How near

Against the update that these settings mean: relative error {total.error:.3g} in the Frobenius norm, {total.kept:.4%} of
the squared norm kept. Nothing was trained or evaluated: measure it on your task.

## Use

    from peft import PeftModel                      # the files are PEFT's
    model = PeftModel.from_pretrained(base, FOLDER)
"""
