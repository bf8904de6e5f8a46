"""`veneer resize`."""

from typing import Annotated

import typer

import veneer
from veneer.cli.closeness import print_closeness, require_one, share
from veneer.cli.output import Json, Overwrite, print_facts, print_result, size
from veneer.cli.writing import check_folder

EXAMPLE = """Example: veneer resize runs/tickets/adapter --rank 8 --out runs/tickets-r8

Example: veneer resize runs/tickets/adapter --energy 0.99 --spread --out runs/tickets-small"""


def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, ours or PEFT's.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the resized adapter.")],
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update's squared norm to keep, such as 0.99.")
    ] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Give ranks to modules by need: --rank is their mean, --energy of all.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an adapter smaller: the best approximation of each update of a rank, or of the least rank that keeps enough.

    It works on the factors; the table tells what is lost.
    """
    check_folder(out, overwrite=overwrite)
    require_one(rank=rank, energy=energy)
    before = veneer.load_adapter(adapter)
    made = veneer.resize(before, rank=rank, energy=energy, spread=spread)
    veneer.save_adapter(made.adapter, out, card=made.card(adapter), replace=overwrite)
    same = before.digest == made.adapter.digest
    if as_json:
        sizes = {"num_bytes_before": before.num_bytes}
        print_result("resize", {"adapter": adapter}, made.to_json() | sizes, out=out)
        return
    print_facts(
        {
            "adapter": out,
            "digest": made.adapter.digest,
            "size before": size(before.num_bytes),
            "size": size(made.adapter.num_bytes),
            "energy kept": share(made.total.kept),
            "relative error": f"{made.total.error:.3g}",
            **({"note": "no module needed a lower rank: the same adapter"} if same else {}),
        }
    )
    print_closeness(made.adapter, made.modules)
