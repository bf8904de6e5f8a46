"""`veneer combine`."""

from typing import TYPE_CHECKING, Annotated

import typer

import veneer
from veneer.cli.closeness import print_closeness, share
from veneer.cli.output import Json, Overwrite, print_facts, print_result, size
from veneer.cli.writing import check_folder
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.tools.combine import Combination

EXAMPLE = """Example: veneer combine runs/a/adapter runs/b/adapter --weights 0.7,0.3 --rank 16 --out runs/ab

Example: veneer combine runs/a/adapter runs/b/adapter --method ties --space core --density 0.5 --out runs/ab"""


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER ...", help="Adapter folders, ours or PEFT's.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the combination.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="A number for each adapter, negative too; else an average."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear (exact), ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "linear",
    rank: Annotated[
        int | None, typer.Option(help="Highest rank of a module; else the exact rank, or the sum of ranks.")
    ] = None,
    module_weights: Annotated[
        list[str] | None,
        typer.Option("--module-weights", metavar="PATTERN=W,W,...", help="Other weights for some modules; repeatable."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the entries that stays; not for linear.")] = None,
    space: Annotated[str | None, typer.Option(help="Where entries are looked at: full, core or knots.")] = None,
    trained: Annotated[
        str, typer.Option(help="What becomes of what trained whole: exact (or an error), first or drop.")
    ] = "exact",
    seed: Annotated[int, typer.Option(min=0, help="Fixes what dare draws.")] = 0,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine although they were made for different bases or tasks.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: the exact weighted sum of their updates, or another method.

    Any ranks, scalings and kinds of layers mix, and no full update is formed for linear. The table tells how near the
    result is to what the method means.
    """
    check_folder(out, overwrite=overwrite)
    given = {"density": density, "space": space}
    options: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    numbers = _numbers("--weights", weights) if weights is not None else None
    by_module = dict(_module_weights(one) for one in module_weights or ())
    made = veneer.combine(
        [veneer.load_adapter(folder) for folder in adapters],
        numbers,
        method=method,
        rank=rank,
        module_weights=by_module,
        seed=seed,
        any_base=any_base,
        names=adapters,
        trained=trained,
        **options,
    )
    veneer.save_adapter(made.adapter, out, card=made.card(adapters), replace=overwrite)
    if as_json:
        print_result("combine", {"adapters": adapters}, made.to_json(), out=out)
        return
    _print(out, made)


def _print(out: str, made: "Combination") -> None:
    told = {key: value for key, value in made.options.items() if value and (key, value) != ("trained", "exact")}
    print_facts(
        {
            "adapter": out,
            "digest": made.adapter.digest,
            "method": ", ".join([made.method, *(f"{key} {value}" for key, value in told.items())]),
            "weights": ", ".join(f"{weight:g}" for _, weight in made.sources),
            "size": size(made.adapter.num_bytes),
            "energy kept": share(made.total.kept),
            "relative error": f"{made.total.error:.3g}",
        }
    )
    print_closeness(made.adapter, made.modules)


def _numbers(name: str, text: str) -> list[float]:
    """Return the numbers of a list with commas.

    Raises:
        ConfigError: If one is none.
    """
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected numbers with commas between them, such as 0.7,0.3; got {text!r}") from None


def _module_weights(text: str) -> tuple[str, list[float]]:
    pattern, equals, numbers = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(f"--module-weights: expected PATTERN=W,W, such as q_proj=1,0; got {text!r}")
    return pattern, _numbers(f"--module-weights {pattern}", numbers)
