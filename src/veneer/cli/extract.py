"""`veneer extract`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import veneer
from veneer.cli.merge import bytes_bar, folder_of, weight_bytes
from veneer.cli.output import Json, log_to_stderr, print_facts, print_json, print_table
from veneer.errors import ConfigError, OutputError

EXAMPLE = "Example: veneer extract models/llama models/llama-tuned --out adapters/tuned --rank 16"


def extract(
    base: Annotated[str, typer.Argument(help="Folder of a base model with safetensors files.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder of the same model, fine-tuned.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Adapter folder to make.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of each module's factors.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the smallest rank that holds this share of each difference.")
    ] = None,
    others: Annotated[
        Literal["list", "keep", "refuse"], typer.Option(help="What becomes of norms and biases that differ.")
    ] = "list",
    as_json: Json = False,
) -> None:
    """Take a LoRA out of a fine-tuned model: the nearest to what it has more than its base."""
    log_to_stderr()
    if (rank is None) == (energy is None):
        raise ConfigError("give --rank or --energy, one of them")
    if Path(out).exists():
        raise OutputError(f"{out}: exists already; choose another name")
    first, second = folder_of(base), folder_of(tuned)
    with bytes_bar("extracting", weight_bytes(first)) as on_bytes:
        found = veneer.extract(first, second, rank=rank, energy=energy, others=others, on_bytes=on_bytes)
    veneer.save_adapter(found.adapter, out)
    if as_json:
        print_json(found.to_json() | {"out": out})
        return
    print_facts(
        {
            "adapter": out,
            "digest": found.adapter.digest,
            "modules": len(found.modules),
            "error of the difference": f"{found.error:.3g}",
            "tensors the same": found.unchanged,
            **({"kept whole": len(found.adapter.trained)} if found.adapter.trained else {}),
        }
    )
    rows = [
        {
            "module": one.path,
            "form": one.form,
            "out × in": f"{one.shape[0]} × {one.shape[1]}",
            "rank": one.rank,
            "change / weight": f"{one.change:.3g}",
            "energy": f"{one.energy:.4%}",
            "error": f"{one.error:.3g}",
        }
        for one in found.modules
    ]
    print_table("", rows, right=("out × in", "rank", "change / weight", "energy", "error"))
    left = [
        {"left out": one.name, "shape": " × ".join(map(str, one.shape)), "why": one.reason} for one in found.left_out
    ]
    if left:
        print_table("", left)
