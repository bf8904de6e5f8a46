"""`veneer show`."""

from typing import Annotated

import typer

import veneer
from veneer.cli.output import Json, print_facts, print_json, print_table, size

EXAMPLE = "Example: veneer show runs/tickets/adapter"


def show(
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="Adapter folder, ours or PEFT's.")],
    as_json: Json = False,
) -> None:
    """Say what an adapter is: base, ranks, targets, parameters, bytes, norms, digest."""
    summary = veneer.summarize(veneer.load_adapter(adapter))
    if as_json:
        print_json(summary.to_json())
        return
    print_facts(
        {
            "digest": summary.digest,
            "base": summary.base or "not said",
            "base fingerprint": summary.base_fingerprint or "not said",
            "trained on": f"{summary.row_format} rows" if summary.row_format else "not said",
            "rank": ", ".join(str(rank) for rank in summary.ranks),
            "dtype": ", ".join(summary.dtypes),
            "modules": summary.num_modules,
            "parameters": f"{summary.num_parameters:,}",
            "size": size(summary.num_bytes),
            "norm of the update": f"{summary.norm:.4g}",
        }
    )
    untrained = any(target.untrained for target in summary.targets)
    rows = [
        {
            "target": target.name,
            "form": target.form + (" dora" if target.has_magnitude else ""),
            "layers": target.count,
            "out × in": f"{target.shape[0]} × {target.shape[1]}",
            "rank": target.rank,
            "scaling": f"{target.scaling:g}",
            "parameters": f"{target.num_parameters:,}",
            "norm": f"{target.norm:.4g}",
            **({"lora_B zero": target.untrained} if untrained else {}),
        }
        for target in summary.targets
    ]
    if rows:
        print_table("", rows, right=[name for name in rows[0] if name not in ("target", "form")])
    whole = [{"trained whole": path, "shape": " × ".join(map(str, shape))} for path, shape in summary.trained]
    if whole:
        print_table("", whole)
