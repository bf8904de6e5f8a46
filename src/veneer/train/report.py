"""What a run leaves for people: a picture of its losses, and a model card."""

import json
import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from veneer.adapter import Adapter, LowRank
from veneer.config import RunConfig
from veneer.errors import OutputError
from veneer.factors import cut_ranks
from veneer.files.commit import commit_file
from veneer.train.folder import PICTURE
from veneer.train.prepare import PreparedData

log = logging.getLogger("veneer")


def draw_losses(lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw `loss.png` from the lines of `metrics.jsonl`; nothing where there is no step yet.

    A disk that refuses is reported and no more: a picture is no reason to lose a run.
    """
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not steps:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*steps, strict=True), color="#9db4c8", linewidth=1, label="training, each step")
    if len(steps) >= 20:
        axes.plot(*zip(*_smooth(steps), strict=True), color="#1f4e79", linewidth=2, label="training, running mean")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="#c8553d", markersize=4, label="evaluation")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    try:
        commit_file(folder / PICTURE, picture.getvalue())
    except OutputError as error:
        log.warning("%s", error)


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the running mean over a tenth of the steps."""
    width = max(2, len(points) // 10)
    losses = [loss for _, loss in points]
    return [(points[end - 1][0], sum(losses[end - width : end]) / width) for end in range(width, len(points) + 1)]


def untrained(adapter: Adapter) -> tuple[str, ...]:
    """Return the paths of the modules whose update is still zero, as it began: they never got a gradient.

    Of initialisations whose update does not begin at zero (loftq, orthogonal up to rounding), nothing can be told.

    Example:
        >>> import torch
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 2), torch.zeros(3, 1), 1.0)
        >>> untrained(Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=1)))
        ('layers.0.q_proj',)
    """
    return tuple(path for path, pair in adapter.modules.items() if _is_zero(pair))


def _is_zero(pair: LowRank) -> bool:
    if not pair.frozen_rank:
        return not bool(pair.lora_B.any())
    (A, B), (A0, B0) = cut_ranks(pair.form, pair.lora_A, pair.lora_B, pair.frozen_rank)
    return A.equal(A0) and B.equal(-B0)


def model_card(
    adapter: Adapter,
    run: RunConfig,
    data: PreparedData,
    eval_loss_before: float | None,
    eval_loss: float | None,
    inexact: Sequence[str] = (),
) -> str:
    """Return the README of an adapter: what it is, what it was made of, how well it does, how to use it."""
    share = f"{adapter.num_parameters:,} parameters, {adapter.num_bytes:,} bytes, rank {adapter.config.rank}"
    if eval_loss is None or eval_loss_before is None:
        result = "No evaluation rows were given."
    else:
        result = (
            f"Loss on the {len(data.eval.rows) if data.eval else 0:,} evaluation rows: "
            f"{eval_loss_before:.4f} before, {eval_loss:.4f} after (nats per supervised token)."
        )
    exact = "".join(f"- {line}\n" for line in inexact)
    if exact:
        exact = f"\nexact: false. The run was gone on with under other conditions than it began with:\n\n{exact}"
    facts = "".join(f"\n- {line}" for line in data.facts.lines)
    settings = "\n".join(f"    {key}: {json.dumps(value)}" for key, value in run.train.model_dump(mode="json").items())
    return f"""---
base_model: {json.dumps(adapter.metadata.base)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, veneer]
---

# LoRA adapter for {adapter.metadata.base}

{share}. Digest `{adapter.digest}`.

## Result

{result}

## Made of

{len(data.train.rows):,} {data.row_format} rows, {data.train.num_tokens:,} tokens an epoch, of them
{data.train.num_supervised:,} supervised; {len(data.bad):,} rows left out. SHA-256 of the training file:
`{data.digests["train"]}`. Base fingerprint: `{adapter.metadata.base_fingerprint}`; its linear layers were stored
{run.storage}, and it was computed in {run.dtype}. Seed {run.seed}.
{facts}
{exact}
{settings}

## Use

{_use(run)}

    from peft import PeftModel                      # the files are PEFT's
    model = PeftModel.from_pretrained(base, FOLDER)
"""


def _use(run: RunConfig) -> str:
    """Return how to try the adapter, on the base as it was trained on."""
    return f'    veneer generate {run.base} --adapter FOLDER{run.base_options} --prompt "..."'
