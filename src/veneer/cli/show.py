"""`veneer show`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

import veneer
from veneer.cli.bases import BASE, checkpoint_of
from veneer.cli.output import Json, Modules, grouped, print_facts, print_result, print_table, size
from veneer.cli.writing import check_place
from veneer.errors import AdapterError, ConfigError, several, shortened
from veneer.names import by_number, did_you_mean, last_name

if TYPE_CHECKING:
    from veneer.tools.relate import ModuleRelation, Relation
    from veneer.tools.summarize import ModuleSummary, Summary, TargetSummary

EXAMPLE = """Example: veneer show runs/tickets/adapter --plot tickets.png

Example: veneer show runs/tickets/adapter runs/tone/adapter"""

_SHOWN = 3
_WORDS = ("target", "form", "module")


def show(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, ours or PEFT's.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="A second adapter: say how the two relate.", show_default=False),
    ] = None,
    modules: Modules = False,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help=f"Give norms relative to this base's weights as well: {BASE}.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw norms, ranks and spectra by layer and target.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is: base, ranks, targets, parameters, bytes, norms, spectra; or how two adapters relate.

    Ranks beside the nominal one: "effective" is exp of the entropy of the squared singular values, "stable" the squared
    norm over the largest squared singular value; both from 1 to the rank, means over the modules of a target.
    """
    if other is not None:
        if base is not None or plot is not None:
            raise ConfigError("--base and --plot are for one adapter; with two, `show` compares them with each other")
        relation = veneer.relate(veneer.load_adapter(adapter), veneer.load_adapter(other))
        _require_common(relation, adapter, other)
        if as_json:
            print_result("show", {"adapter": adapter, "other": other}, relation.to_json())
        else:
            _print_relation(relation, modules)
        return
    if plot is not None:
        check_place(plot)
    value = veneer.load_adapter(adapter)
    norms = None if base is None else veneer.weight_norms(checkpoint_of(base), value)
    summary = veneer.summarize(value, norms)
    if plot is not None:
        veneer.draw_summary(summary, plot)
    if as_json:
        print_result("show", {"adapter": adapter, "base": base}, summary.to_json(), out=plot)
        return
    _print_summary(summary, modules)


def _require_common(found: "Relation", first: str, second: str) -> None:
    """Raise where two adapters have nothing that could be compared: figures of nothing would read as no relation.

    Raises:
        AdapterError: With what each has, and what may be the same under another name.
    """
    if found.modules or found.trained:
        return
    if found.unlike:
        lines = [f"{path}: {why}" for path, why in found.unlike]
        raise AdapterError(f"{first} and {second}: no module can be compared", shortened(lines, _SHOWN))
    held = {first: found.only_first, second: found.only_second}
    lines = [f"{name} has {several(paths, _SHOWN) or 'none'}" for name, paths in held.items()]
    near = next((near for path in found.only_first[:_SHOWN] if (near := did_you_mean(path, found.only_second))), "")
    raise AdapterError(f"{first} and {second} have no module in common, so nothing can be compared{near}", lines)


def _print_summary(summary: "Summary", every_module: bool) -> None:
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
            **_most(summary),
        }
    )
    modules = sorted(summary.modules, key=lambda one: by_number(one.path))
    rows = [_module_row(one) for one in modules] if every_module else _target_rows(summary)
    if rows:
        print_table("", rows, right=[name for name in rows[0] if name not in _WORDS])
    whole = [{"trained whole": path, "shape": " × ".join(map(str, shape))} for path, shape in summary.trained]
    if whole:
        print_table("", whole)


def _most(summary: "Summary") -> dict[str, str]:
    """Return the line that names the modules that change most."""
    if not summary.norm:
        return {}
    most = summary.changed_most(3)
    said = ", ".join(
        f"{one.path} ({one.norm:.3g}" + (f", {one.relative:.2%} of its weight)" if one.relative is not None else ")")
        for one in most
    )
    return {"changes most": said}


def _target_rows(summary: "Summary") -> list[dict[str, Any]]:
    """Return a row for each group of modules alike; columns that say nothing are left out."""
    untrained = any(target.untrained for target in summary.targets)
    relative = any(target.relative is not None for target in summary.targets)
    return [
        {
            "target": target.name,
            "form": _form(target),
            "layers": target.count,
            "out × in": f"{target.shape[0]} × {target.shape[1]}",
            "rank": target.rank,
            "effective": f"{target.effective_rank:.1f}",
            "stable": f"{target.stable_rank:.1f}",
            "scaling": f"{target.scaling:g}",
            "parameters": f"{target.num_parameters:,}",
            "norm": f"{target.norm:.4g}",
            "share": f"{target.share:.1%}",
            **({"of weight": _percent(target.relative)} if relative else {}),
            **({"lora_B zero": target.untrained} if untrained else {}),
        }
        for target in summary.targets
    ]


def _module_row(one: "ModuleSummary") -> dict[str, Any]:
    values = [f"{value:.3g}" for value in one.singular_values]
    return {
        "module": one.path,
        "out × in": f"{one.shape[0]} × {one.shape[1]}",
        "rank": one.rank,
        "effective": f"{one.effective_rank:.1f}",
        "stable": f"{one.stable_rank:.1f}",
        "scaling": f"{one.scaling:g}",
        "bytes": f"{one.num_bytes:,}",
        "norm": f"{one.norm:.4g}",
        **({} if one.relative is None else {"of weight": _percent(one.relative)}),
        "singular values": " ".join(values if len(values) <= 4 else [*values[:3], "…", values[-1]]),
    }


def _form(target: "TargetSummary") -> str:
    return target.form + (" dora" if target.has_magnitude else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _print_relation(found: "Relation", every_module: bool) -> None:
    columns, rows = ([one for part in found.modules if (one := getattr(part, side))] for side in ("columns", "rows"))
    print_facts(
        {
            "same adapter": "yes, every value" if found.equal else "no",
            "norms of the updates": " and ".join(f"{norm:.4g}" for norm in found.norms),
            "cosine of the updates": f"{_cosine(found.cosine)}   (two of no relation: 0 ± {found.chance:.1g})",
            "modules in both": len(found.modules),
            **{
                f"shared {what}": (
                    f"{_mean([one.overlap for one in spaces]):.3f} of the smaller span   "
                    f"(at random {_mean([one.chance for one in spaces]):.3f})"
                )
                for what, spaces in (("outputs", columns), ("inputs", rows))
                if spaces
            },
            **_only("only in the first", found.only_first),
            **_only("only in the second", found.only_second),
            **_only("not comparable", [f"{path}: {why}" for path, why in found.unlike]),
        }
    )
    modules = sorted(found.modules, key=lambda one: by_number(one.path))
    table = [_relation_row(one) for one in modules] if every_module else _relation_groups(found)
    if table:
        print_table("", table, right=[name for name in table[0] if name not in _WORDS])
    if found.trained:
        print_table("", [{"trained whole in both": path, "distance": f"{far:.3g}"} for path, far in found.trained])


def _relation_groups(found: "Relation") -> list[dict[str, Any]]:
    """Return a row for each name of a module, with means over the layers."""
    rows = []
    for name, alike in grouped(found.modules, lambda one: last_name(one.path)).items():
        cosines = [one.cosine for one in alike if one.cosine is not None]
        columns = [one.columns for one in alike if one.columns]
        inputs = [one.rows for one in alike if one.rows]
        rows.append(
            {
                "target": name,
                "layers": len(alike),
                "ranks": " and ".join(sorted({f"{one.ranks[0]}, {one.ranks[1]}" for one in alike})),
                "cosine": f"{_mean(cosines):+.3f}",
                "at random": f"0 ± {_mean([one.chance for one in alike]):.1g}",
                "outputs": f"{_mean([one.overlap for one in columns]):.3f}",
                "at random ": f"{_mean([one.chance for one in columns]):.3f}",
                "inputs": f"{_mean([one.overlap for one in inputs]):.3f}",
                "at random  ": f"{_mean([one.chance for one in inputs]):.3f}",
            }
        )
    return rows


def _relation_row(one: "ModuleRelation") -> dict[str, Any]:
    return {
        "module": one.path,
        "ranks": f"{one.ranks[0]}, {one.ranks[1]}",
        "norms": f"{one.norms[0]:.3g}, {one.norms[1]:.3g}",
        "cosine": _cosine(one.cosine),
        "at random": f"0 ± {one.chance:.1g}",
        **{
            f"{what}, largest cosine (at random)": f"{spaces.overlap:.3f}, {max(spaces.cosines, default=0.0):.3f} "
            f"({spaces.chance:.3f}, {spaces.chance_largest:.3f})"
            if spaces
            else "zero"
            for what, spaces in (("outputs", one.columns), ("inputs", one.rows))
        },
    }


def _cosine(value: float | None) -> str:
    return "one is zero" if value is None else f"{value:+.3f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _only(title: str, names: "tuple[str, ...] | list[str]") -> dict[str, str]:
    if not names:
        return {}
    return {title: f"{len(names)}: {several(names, _SHOWN)}"}
