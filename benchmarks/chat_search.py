"""Which setting of a peer is its fastest on a CPU? Its options one by one, then in combination.

First each value of each dimension alone, over a setting that is known by hand to be quick (the peer's defaults with no
checkpointing and nothing to pad). Then the dimensions in the order of what they gained
alone: every value is tried over the best so far, and the fastest stays. A setting that fails is a line with its error.
All that twice: for the fastest, and for the fastest whose loss falls as float32's does. In bf16 the first updates of an
adapter are lost in the rounding of what they are added to.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from turns import Contender, Running, take_turns

Options = dict[str, Any]
TOLERANCE = 0.01
"""How far above float32's the last loss of a setting may lie that counts as learning the same."""


def _arguments(**values: Any) -> Options:
    return {"arguments": values}


def _batches(rows: int) -> Options:
    return _arguments(per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows)


PADDED: Options = _arguments(packing=False, padding_free=False, train_sampling_strategy="sequential", max_length=1024)
LAYOUTS: dict[str, Options] = {
    "padded, in order": PADDED,
    "grouped by length": {"arguments": {**PADDED["arguments"], "train_sampling_strategy": "group_by_length"}},
    "padding-free": {"arguments": {**PADDED["arguments"], "padding_free": True, "max_length": None}},
    "packed": {
        "arguments": {**PADDED["arguments"], "packing": True}
        | _batches(1)["arguments"]
        | {"gradient_accumulation_steps": 1}
    },
}
TRL: dict[str, dict[str, Options]] = {
    "precision": {
        "float32, bf16 autocast": {"model": {"dtype": "float32"}, **_arguments(bf16=True)},
        "float32": {"model": {"dtype": "float32"}, **_arguments(bf16=False)},
        "bf16 weights": {"model": {"dtype": "bfloat16"}, **_arguments(bf16=False)},
        "bf16 weights, bf16 autocast": {"model": {"dtype": "bfloat16"}, **_arguments(bf16=True)},
    },
    "checkpointing": {
        "on": _arguments(gradient_checkpointing=True),
        "off": _arguments(gradient_checkpointing=False),
    },
    "batch": {f"{rows} x {8 // rows}": _batches(rows) for rows in (8, 4, 2, 1)},
    "layout": LAYOUTS,
    "attention": {name: {"model": {"attn_implementation": name}} for name in ("sdpa", "eager", "flex_attention")},
    "compile": {"no": _arguments(torch_compile=False), "yes": _arguments(torch_compile=True)},
    "kernels": {
        "none": {},
        "liger": _arguments(use_liger_kernel=True),
        "hub": {"model": {"use_kernels": True}},
    },
}
"""No loss among them: `nll` is computed in chunks already, `chunked_nll` is its old name."""
UNSLOTH: dict[str, dict[str, Options]] = {
    "precision": {
        "its own choice": {"model": {"dtype": None}},
        "float32": {"model": {"dtype": "float32"}, **_arguments(bf16=False)},
        "float32, bf16 autocast": {"model": {"dtype": "float32"}, **_arguments(bf16=True)},
    },
    "checkpointing": {
        "unsloth": {"checkpointing": "unsloth", **_arguments(gradient_checkpointing=True)},
        "off": {"checkpointing": False, **_arguments(gradient_checkpointing=False)},
    },
    "batch": {f"{rows} x {8 // rows}": _batches(rows) for rows in (8, 4, 2, 1)},
    "layout": {name: LAYOUTS[name] for name in ("padded, in order", "grouped by length")},
    "compile": {"no": {"environment": {}}, "yes": {"environment": {"UNSLOTH_CPU_COMPILE": "1"}}},
}
MLX: dict[str, dict[str, Options]] = {
    "batch": {f"{rows} x {8 // rows}": {"rows": rows} for rows in (8, 4, 2, 1)},
    "checkpointing": {"off": {"grad_checkpoint": False}, "on": {"grad_checkpoint": True}},
    "precision": {"float32": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}},
}
START: dict[str, Options] = {"trl": {}, "unsloth": {"unsloth": True}, "mlx": {}}
NEAR: dict[str, dict[str, str]] = {
    "trl": {"precision": "bf16 weights", "checkpointing": "off", "batch": "1 x 8", "compile": "yes"},
    "unsloth": {"checkpointing": "off", "batch": "1 x 8", "compile": "yes"},
    "mlx": {"batch": "2 x 4"},
}
"""Where a search begins, beside the first value of each other dimension."""
DIMENSIONS = {"trl": TRL, "unsloth": UNSLOTH, "mlx": MLX}

Chosen = dict[str, str]
Make = Callable[[str, Mapping[str, Any]], Contender]


def options_of(peer: str, chosen: Chosen, more: Options) -> Options:
    """Put the options of the chosen values together."""
    options: Options = {**START[peer], **more}
    for dimension, value in chosen.items():
        for kind, values in DIMENSIONS[peer][dimension][value].items():
            options[kind] = {**options.get(kind, {}), **values} if isinstance(values, dict) else values
    if options.get("arguments", {}).get("packing"):  # a row is then as long as a step's tokens
        options["arguments"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    return options


class Search:
    """The trials of one peer; each setting is measured once."""

    def __init__(
        self, peer: str, make: Make, task: Path, facts: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        self.peer, self.make, self.task, self.facts, self.tell = peer, make, task, facts, tell
        self.more = {"pack_tokens": pack_tokens(facts)} if peer == "trl" else {}
        self.trials: list[dict[str, Any]] = []

    def trial(self, chosen: Chosen) -> dict[str, Any]:
        """Return what a setting comes to; it is run where it has not been."""
        options = options_of(self.peer, chosen, self.more)
        known = next((one for one in self.trials if one["options"] == options), None)
        if known is None:
            known = self._try(chosen, options)
            self.trials.append(known)
        return known

    def loss(self, chosen: Chosen) -> float:
        """Return the mean loss of a setting's last round; infinite where it fails."""
        losses = self.trial(chosen).get("loss_of_rounds")
        return losses[-1] if losses else math.inf

    def speed(self, chosen: Chosen, limit: float) -> float:
        """Return the useful tokens per second of a setting; 0 where it fails, or its last loss is above a limit."""
        found = self.trial(chosen)
        return found.get("tokens_per_second", 0.0) if self.loss(chosen) <= limit else 0.0

    def best(self, *, same_loss: bool = False) -> dict[str, Any]:
        """Run the trials and return the fastest; of those that learn as float32 does, if so asked."""
        dimensions = DIMENSIONS[self.peer]
        first = {name: next(iter(values)) for name, values in dimensions.items()} | NEAR[self.peer]
        if same_loss:
            first["precision"] = "float32"
        speed = partial(self.speed, limit=self.loss(first) + TOLERANCE if same_loss else math.inf)
        base = speed(first) or 1.0
        gains = {
            name: max(speed({**first, name: value}) for value in values) / base for name, values in dimensions.items()
        }
        chosen = first
        for name in sorted(gains, key=lambda name: -gains[name]):
            fastest = max(dimensions[name], key=lambda value: speed({**chosen, name: value}))
            chosen = {**chosen, name: fastest}
        return self.trial(chosen)

    def _try(self, chosen: Chosen, options: Options) -> dict[str, Any]:
        name = ", ".join(f"{dimension} {value}" for dimension, value in chosen.items())
        running = Running(self.make(name, options), self.task, self.task.parent / "search.log")
        try:
            take_turns({name: running}, tell=lambda _: None)
        finally:
            running.end()
        trial = {"chosen": chosen, "options": options, **figures(running.record, self.facts)}
        self.tell(json.dumps({**chosen, **{key: trial[key] for key in trial if key not in ("chosen", "options")}}))
        return trial


def figures(record: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a contender's steps come to: the best of its rounds, step by step, over a round."""
    if "error" in record:
        return {"error": record["error"]}
    per_round = record["steps"] // facts["rounds"]
    seconds, losses, counts = (
        [record[name][start : start + per_round] for start in range(0, record["steps"], per_round)]
        for name in ("seconds", "losses", "supervised")
    )
    best = sum(min(times) for times in zip(*seconds, strict=True))
    return {
        "seconds_per_step": best / facts["steps_per_round"],
        "tokens_per_second": facts["drawn"]["tokens"] / best,
        "supervised_per_second": facts["drawn"]["supervised"] / best,
        "seconds_of_rounds": [sum(times) for times in seconds],
        "loss_of_rounds": [
            sum(loss * count for loss, count in zip(some, many, strict=True)) / sum(many)
            for some, many in zip(losses, counts, strict=True)
        ],
        "supervised_of_round": sum(counts[0]),
        "peak_bytes": record["peak_bytes"],
        "peak_above_loaded_bytes": record["peak_bytes"] - record["loaded_bytes"],
    }


def pack_tokens(facts: Mapping[str, Any]) -> int:
    """Return the length of a packed row that holds about the tokens of a step, and the longest row in any case."""
    return max(facts["drawn"]["longest"], -(-facts["drawn"]["tokens"] // facts["steps_per_round"]))
