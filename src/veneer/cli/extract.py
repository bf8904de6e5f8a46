"""`veneer extract`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import veneer
from veneer.cli.bases import BASE, bytes_bar, folder_of, weight_bytes
from veneer.cli.closeness import require_one, share
from veneer.cli.output import (
    Json,
    Modules,
    Overwrite,
    grouped,
    log_to_stderr,
    print_facts,
    print_result,
    print_table,
    ratio,
    size,
    span,
)
from veneer.cli.writing import check_folder
from veneer.names import by_number, last_name

if TYPE_CHECKING:
    from veneer.tools.extract import ExtractedModule, LeftOut

EXAMPLE = "Example: veneer extract models/llama models/llama-tuned --out adapters/tuned --rank 16"


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help=f"Base model: {BASE}.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same model, fine-tuned: alike.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Adapter folder to make.")],
    rank: Annotated[int | None, typer.Option(help="Rank of each module's factors.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the smallest rank that holds this share of each difference.")
    ] = None,
    others: Annotated[
        Literal["list", "keep", "refuse"], typer.Option(help="What becomes of norms and biases that differ.")
    ] = "list",
    modules: Modules = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take a LoRA out of a fine-tuned model: the nearest to what it has more than its base."""
    log_to_stderr()
    check_folder(out, overwrite=overwrite)
    require_one(rank=rank, energy=energy)
    first, second = folder_of(base), folder_of(tuned)
    called = base if first == base else veneer.find_source(base).name
    with bytes_bar("extracting", weight_bytes(first)) as on_bytes:
        found = veneer.extract(
            first, second, rank=rank, energy=energy, others=others, base_name=called, on_bytes=on_bytes
        )
    veneer.save_adapter(found.adapter, out, card=found.card(base, tuned), replace=overwrite)
    if as_json:
        print_result("extract", {"base": base, "tuned": tuned}, found.to_json(), out=out)
        return
    print_facts(
        {
            "adapter": out,
            "digest": found.adapter.digest,
            "modules": len(found.modules),
            "size": size(found.adapter.num_bytes),
            "error of the difference": f"{found.error:.3g}",
            "tensors the same": found.unchanged,
            **({"kept whole": len(found.adapter.trained)} if found.adapter.trained else {}),
        }
    )
    rows = _module_rows(found.modules) if modules else _target_rows(found.modules)
    print_table("", rows, right=[name for name in rows[0] if name not in ("target", "module", "form")])
    if found.left_out:
        print_table("", _left_rows(found.left_out, modules), right=["tensors"])


def _left_rows(left_out: "Sequence[LeftOut]", every_one: bool) -> list[dict[str, Any]]:
    """Return a row for each tensor that was left out, or for each group of those alike."""

    def key(one: "LeftOut") -> tuple[str, tuple[int, ...], str]:
        path, _, leaf = one.name.rpartition(".")
        return one.name if every_one else f"{last_name(path)}.{leaf}", one.shape, one.reason

    return [
        {"left out": name, "tensors": len(alike), "shape": " × ".join(map(str, shape)), "why": reason}
        for (name, shape, reason), alike in grouped(left_out, key).items()
    ]


def _module_rows(modules: "Sequence[ExtractedModule]") -> list[dict[str, Any]]:
    return [
        {
            "module": one.path,
            "form": one.form,
            "out × in": f"{one.shape[0]} × {one.shape[1]}",
            "rank": one.rank,
            "change / weight": f"{one.change:.3g}",
            "energy kept": share(one.energy),
            "error": ratio(one.error),
        }
        for one in sorted(modules, key=lambda one: by_number(one.path))
    ]


def _target_rows(modules: "Sequence[ExtractedModule]") -> list[dict[str, Any]]:
    """Return a row for each group of modules alike, with the least and the most of each figure."""
    groups = grouped(modules, lambda one: (last_name(one.path), one.form, one.shape))
    return [
        {
            "target": name,
            "form": form,
            "layers": len(alike),
            "out × in": f"{shape[0]} × {shape[1]}",
            "rank": span([one.rank for one in alike]),
            "change / weight": span([one.change for one in alike], ".3g"),
            "least energy kept": share(min(one.energy for one in alike)),
            "worst error": ratio(max(one.error for one in alike)),
        }
        for (name, form, shape), alike in groups.items()
    ]
