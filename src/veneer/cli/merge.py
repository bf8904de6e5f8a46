"""`veneer merge`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import veneer
from veneer.cli.bases import BASE, bytes_bar, folder_of, weight_bytes
from veneer.cli.gguf import GgufFile, GgufLike, gguf_facts, like_of, write_gguf
from veneer.cli.output import (
    AnyBase,
    Json,
    Modules,
    Overwrite,
    grouped,
    log_to_stderr,
    print_facts,
    print_result,
    print_table,
    size,
    span,
)
from veneer.cli.writing import check_folder
from veneer.errors import ConfigError
from veneer.names import by_number, last_name

if TYPE_CHECKING:
    from veneer.tools.merge_record import MergedModule

EXAMPLE = """Example: veneer merge models/llama runs/tickets/adapter models/llama-tickets --also runs/tone/adapter=0.5

Example: veneer merge smollm2 runs/tickets/adapter models/tickets --dtype bfloat16 --gguf models/tickets.gguf"""


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=f"Base model: {BASE}.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, ours or PEFT's.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="DIR=WEIGHT", help="Another adapter, added exactly; may be repeated."),
    ] = None,
    weight: Annotated[float, typer.Option(help="Weight of ADAPTER.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="Store the weights in float32, bfloat16 or float16.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Load what was written, and compare.")] = True,
    gguf: GgufFile = None,
    gguf_like: GgufLike = None,
    any_base: AnyBase = False,
    modules: Modules = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a base model's files, shard by shard, and prove the result.

    All other files are copied; veneer_merge.json in OUT says what was done.
    """
    log_to_stderr()
    check_folder(out, overwrite=overwrite)
    parts = [(adapter, weight), *(_weighted(one) for one in also or ())]
    if bad := [f"{one}: {number}" for one, number in parts if not math.isfinite(number)]:
        raise ConfigError("a weight must be a finite number", bad)
    folder = folder_of(base)
    like = like_of(base, folder, out, gguf, gguf_like, overwrite=overwrite)
    how: dict[str, Any] = {"dtype": dtype, "any_base": any_base, "replace": overwrite}
    with bytes_bar("merging", weight_bytes(folder)) as on_bytes:
        if probe:
            record = veneer.merge_checkpoint(folder, parts, out, on_bytes=on_bytes, **how)
        else:  # without transformers
            values = [(veneer.load_adapter(one), each) for one, each in parts]
            record = veneer.merge_files(folder, values, out, on_bytes=on_bytes, **how)
    made = None if gguf is None else write_gguf(out, like, gguf, probe=probe, overwrite=overwrite)
    if as_json:
        inputs = {"base": base, "adapters": [one for one, _ in parts]}
        told = {"record": record.to_json(), "gguf": None if made is None else made.to_json()}
        print_result("merge", inputs, told, out=out)
        return
    found = record.probe
    print_facts(
        {
            "merged into": out,
            "weights": ", ".join(f"{name} {size(one.bytes)}" for name, one in record.outputs.items()),
            "changed": f"{len(record.modules) + len(record.trained)} tensors, {record.untouched} {_rest(record.dtype)}",
            **({"untied": ", ".join(record.untied)} if record.untied else {}),
            **({"left out": ", ".join(record.left_out)} if record.left_out else {}),
            "proof": f"logits differ by {found.difference:.3g}; the adapter changes them by {found.effect:.3g}"
            if found.probed
            else f"none: {found.reason}",
            **gguf_facts(made),
        }
    )
    if record.modules:
        rows = _module_rows(record.modules) if modules else _target_rows(record.modules)
        print_table("", rows, right=("layers", "update / weight", "lost to rounding", "unchanged"))


def _module_rows(modules: "Sequence[MergedModule]") -> list[dict[str, Any]]:
    return [
        {
            "module": one.path,
            "form": one.kind,
            "stored": _stored(one),
            "update / weight": "–" if one.relative_change is None else f"{one.relative_change:.3g}",
            "lost to rounding": f"{one.rounding_loss:.2%}",
            "unchanged": f"{one.unchanged:.1%}",
        }
        for one in sorted(modules, key=lambda one: by_number(one.path))
    ]


def _target_rows(modules: "Sequence[MergedModule]") -> list[dict[str, Any]]:
    """Return a row for each group of modules alike, with the least and the most of each figure."""
    groups = grouped(modules, lambda one: (last_name(one.path), one.kind, _stored(one)))
    return [
        {
            "target": name,
            "layers": len(alike),
            "form": form,
            "stored": stored,
            "update / weight": span([one.relative_change for one in alike if one.relative_change is not None], ".3g"),
            "lost to rounding": span([one.rounding_loss for one in alike], ".2%"),
            "unchanged": span([one.unchanged for one in alike], ".1%"),
        }
        for (name, form, stored), alike in groups.items()
    ]


def _stored(one: "MergedModule") -> str:
    return one.became if one.stored == one.became else f"{one.stored} → {one.became}"


def _rest(dtype: str | None) -> str:
    """Return what became of the tensors that no adapter changed."""
    return "copied bit for bit" if dtype is None else f"others stored in {dtype}"


def _weighted(text: str) -> tuple[str, float]:
    """Return folder and weight of `DIR=WEIGHT`; without a weight it is 1."""
    folder, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        raise ConfigError(f"--also {text!r}: {number!r} is not a number; expected DIR=WEIGHT") from None
