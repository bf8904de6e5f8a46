"""`veneer convert`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import veneer
from veneer.cli.bases import BASE, checkpoint_of
from veneer.cli.output import Json, Overwrite, grouped, print_facts, print_result, print_table, ratio
from veneer.cli.writing import check_folder, check_place
from veneer.errors import ConfigError
from veneer.names import last_name

EXAMPLE = """Example: veneer convert lora.safetensors --to peft --out mine

Example: veneer convert runs/tickets/adapter --to gguf --base smollm2 --out tickets.gguf

Example: veneer convert pytorch_lora_weights.safetensors --to kohya --style flux --out flux.safetensors"""


def convert(
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="Adapter's file or folder, of any format.")] = None,
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help="Format to write, or lora.")] = None,
    out: Annotated[str | None, typer.Option(metavar="PATH", help="File or folder to write.")] = None,
    source: Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="Format to read; else seen.")] = None,
    base: Annotated[str | None, typer.Option(metavar="BASE", help=f"For names and shapes: {BASE}.")] = None,
    alpha: Annotated[float | None, typer.Option(help="For formats that do not store it.")] = None,
    component: Annotated[str | None, typer.Option(metavar="NAME", help="Part of a pipeline, such as unet.")] = None,
    fused: Annotated[str | None, typer.Option(metavar="part|whole", help="What a packed layer's alpha is of.")] = None,
    style: Annotated[
        str | None, typer.Option(metavar="NAME", help="Names of diffusers: new, old, oldest; of kohya: flux, sd3.")
    ] = None,
    enabled: Annotated[
        str | None, typer.Option(metavar="yes,no,...", help="loralib's enable_lora of layers with several parts.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="With --to lora: the highest rank of a module.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Open pickles, in a process apart.")] = False,
    overwrite: Overwrite = False,
    show_formats: Annotated[bool, typer.Option("--list", help="Show the formats and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, and prove that it does the same: deltas compared module by module."""
    if show_formats:
        _list(as_json)
        return
    if missing := [name for name, value in (("PATH", path), ("--to", to), ("--out", out)) if value is None]:
        raise ConfigError(f"convert needs {', '.join(missing)}; `veneer convert --list` shows the formats")
    if Path(str(out)).is_dir():
        check_folder(str(out), overwrite=overwrite)
    check_place(str(out))
    hints = veneer.Hints(
        base=checkpoint_of(base) if base is not None else None,
        alpha=alpha,
        component=component,
        fused=fused,
        style=style,
        enabled=None if enabled is None else _switches(enabled),
    )
    done = veneer.convert(
        Path(str(path)), str(to), Path(str(out)), source=source, hints=hints, rank=rank, allow_pickle=allow_pickle,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_result("convert", {"path": path, "base": base}, _plain(done), out=done.out)
        return
    print_facts(
        {
            "from": f"{done.source}, {path}",
            "to": f"{done.target}, {done.out}",
            "modules": len(done.adapter.modules),
            "largest error": f"{ratio(done.proof.worst)} of a delta's norm, read back",
            **({"error of making LoRA": f"{ratio(max(done.made.values()))} at worst"} if done.made else {}),
            **{f"note {number}": note for number, note in enumerate(done.notes, 1)},
        }
    )
    rows = _rows(done)
    if rows:
        print_table("", rows, right=[name for name in rows[0] if name not in ("target", "form")])


def _switches(text: str) -> tuple[bool, ...]:
    """Return what is switched on in a list with commas.

    Raises:
        ConfigError: If a word is neither yes nor no.

    Example:
        >>> _switches("yes,no,True")
        (True, False, True)
    """
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    told = [one.strip().lower() for one in text.split(",")]
    if not set(told) <= set(words):
        raise ConfigError(f"--enabled: expected yes or no for each part, with commas, such as yes,no,yes; got {text!r}")
    return tuple(words[one] for one in told)


def _list(as_json: bool) -> None:
    rows = [
        {
            "name": one.name,
            "written": ("a file" if one.file else "a folder") if one.write else "no, read only",
            "needs": " ".join(one.needs),
            "what": one.title,
        }
        for one in veneer.list_formats()
    ]
    if as_json:
        told = [
            {"name": one.name, "writes": one.write is not None, "needs": list(one.needs), "title": one.title}
            for one in veneer.list_formats()
        ]
        print_result("convert", {}, {"formats": told})
    else:
        print_table("", rows)


def _rows(done: "veneer.Converted") -> list[dict[str, Any]]:
    """Return modules alike together, with their largest errors."""
    modules = done.adapter.modules

    def key(path: str) -> tuple[str, str, tuple[int, int], int, str]:
        pair = modules[path]
        form = pair.form + (" dora" if pair.magnitude is not None else "")
        return last_name(path), form, pair.sizes, pair.rank, f"{pair.scaling:g}"

    rows = [
        {
            "target": name,
            "form": form,
            "layers": len(paths),
            "out × in": f"{sizes[0]} × {sizes[1]}",
            "rank": rank,
            "scaling": scaling,
            "error": ratio(_largest(done.proof.errors, paths)),
            **({"error of making": ratio(_largest(done.made, paths))} if done.made else {}),
        }
        for (name, form, sizes, rank, scaling), paths in grouped(modules, key).items()
    ]
    whole = [path for path in done.proof.errors if path not in modules]
    columns = list(rows[0]) if rows else ["target", "form", "error"]
    for path in whole:
        told = {"target": path, "form": "trained whole", "error": ratio(done.proof.errors[path])}
        rows.append({name: told.get(name, "") for name in columns})
    return rows


def _largest(errors: Mapping[str, float], paths: list[str]) -> float:
    return max((errors.get(path, 0.0) for path in paths), default=0.0)


def _plain(done: "veneer.Converted") -> dict[str, Any]:
    return {
        "from": done.source,
        "to": done.target,
        "digest": done.adapter.digest,
        "num_bytes": done.adapter.num_bytes,
        "worst_error": done.proof.worst,
        "modules": [
            {
                "path": path,
                "relative_error": error,
                **({"error_of_making": done.made[path]} if path in done.made else {}),
            }
            for path, error in done.proof.errors.items()
        ],
        "notes": list(done.notes),
    }
