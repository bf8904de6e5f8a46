"""`veneer merge`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import veneer
from veneer.cli.gguf import GgufFile, GgufLike, gguf_facts, like_of, write_gguf
from veneer.cli.output import AnyBase, Json, log_to_stderr, print_facts, print_json, print_table, size
from veneer.errors import ConfigError

EXAMPLE = "Example: veneer merge models/llama runs/tickets/adapter models/llama-tickets --also runs/tone/adapter=0.5"


def merge(
    base: Annotated[str, typer.Argument(help="Folder with safetensors files, hub id in the cache, .gguf or smollm2.")],
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
    as_json: Json = False,
) -> None:
    """Merge adapters into a base model's files, shard by shard, and prove the result.

    All other files are copied; veneer_merge.json in OUT says what was done.
    """
    log_to_stderr()
    folder = folder_of(base)
    like = like_of(base, folder, out, gguf, gguf_like)
    parts = [(adapter, weight), *(_weighted(one) for one in also or ())]
    with bytes_bar("merging", weight_bytes(folder)) as on_bytes:
        if probe:
            record = veneer.merge_checkpoint(folder, parts, out, dtype=dtype, any_base=any_base, on_bytes=on_bytes)
        else:  # without transformers
            values = [(veneer.load_adapter(one), each) for one, each in parts]
            record = veneer.merge_files(folder, values, out, dtype=dtype, any_base=any_base, on_bytes=on_bytes)
    made = None if gguf is None else write_gguf(out, like, gguf, probe=probe)
    if as_json:
        print_json(record.to_json() | ({} if made is None else {"gguf": made.to_json()}))
        return
    found = record.probe
    print_facts(
        {
            "merged into": out,
            "weights": ", ".join(f"{name} {size(one.bytes)}" for name, one in record.outputs.items()),
            "changed": f"{len(record.modules) + len(record.trained)} tensors, {record.untouched} copied bit for bit",
            **({"untied": ", ".join(record.untied)} if record.untied else {}),
            **({"left out": ", ".join(record.left_out)} if record.left_out else {}),
            "proof": f"logits differ by {found.difference:.3g}; the adapter changes them by {found.effect:.3g}"
            if found.probed
            else f"none: {found.reason}",
            **gguf_facts(made),
        }
    )
    rows = [
        {
            "module": one.path,
            "form": one.kind,
            "stored": one.became if one.stored == one.became else f"{one.stored} → {one.became}",
            "update / weight": "–" if one.relative_change is None else f"{one.relative_change:.3g}",
            "lost to rounding": f"{one.rounding_loss:.2%}",
            "unchanged": f"{one.unchanged:.1%}",
        }
        for one in record.modules
    ]
    if rows:
        print_table("", rows, right=("update / weight", "lost to rounding", "unchanged"))


def _weighted(text: str) -> tuple[str, float]:
    """Return folder and weight of `DIR=WEIGHT`; without a weight it is 1."""
    folder, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        raise ConfigError(f"--also {text!r}: {number!r} is not a number; expected DIR=WEIGHT") from None


def folder_of(base: str) -> str:
    """Return the folder of a base, see `veneer.base_folder`; nothing is imported for one that is a folder."""
    return base if Path(base).is_dir() else veneer.base_folder(base)


def weight_bytes(folder: str) -> int:
    """Return the bytes of the safetensors files in a folder: what a bar shows as all of it."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done, on standard error where that is a terminal."""
    columns: Sequence[TextColumn | BarColumn | DownloadColumn | TransferSpeedColumn | TimeRemainingColumn] = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
