"""`veneer check`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import veneer
from veneer.cli.bases import checkpoint_of
from veneer.cli.output import Json, Storage, log_to_stderr, print_facts, print_result, print_table
from veneer.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from veneer.files.doctor_codes import Finding
    from veneer.files.shards import Checkpoint
    from veneer.tools.check import Report
    from veneer.tools.check_effect import Effect
    from veneer.tools.merge_probe import Probe

EXAMPLE = """Example: veneer check runs/tickets/adapter --base smollm2

Example: veneer check downloads/lora.safetensors"""
PROMPT = "Adapters change what a model says. The capital of France is Paris, and 2 + 2 = 4."
"""What a base with a tokenizer is asked, with the adapter and without."""


def check(
    adapter: Annotated[
        str | None,
        typer.Argument(metavar="ADAPTER", help="Adapter folder, or any file that may be one.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Compare with this base and ask it: hub id, directory, .gguf or smollm2."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Load the base and ask it; without, only headers are compared.")
    ] = True,
    storage: Storage = None,
    codes: Annotated[
        bool, typer.Option("--codes", help="List everything that can be found, and what it means.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is wrong or suspicious about an adapter, what it means, and which command mends it.

    Files are not trusted: nothing in them is run, pickles are not opened. Exit code 0 without errors, 1 where errors
    were found, 2 where the command itself was wrong. What each code means: docs/findings.md.
    """
    if codes:
        _print_codes(as_json)
        return
    if adapter is None:
        raise ConfigError("check: expected an adapter's folder; `veneer check --help` shows how")
    log_to_stderr()
    model: nn.Module | Checkpoint | None = None
    ask = None
    if base is not None:
        model, ask = _load(base, storage) if probe else (checkpoint_of(base), None)
    report = veneer.check(adapter, base=model, probe=ask)
    if as_json:
        print_result("check", {"adapter": adapter, "base": base}, report.to_json())
    else:
        _print(adapter, report)
    if report.errors:
        raise typer.Exit(1)


def _load(base: str, storage: str | None) -> "tuple[nn.Module, Probe | None]":
    """Return a base and what to ask it: a fixed sentence, where it has a tokenizer and a head."""
    veneer.check_storage(storage)
    source = veneer.find_source(base)
    model = veneer.load_model(source, storage=storage)
    try:
        ids = veneer.load_tokenizer(source)(PROMPT, return_tensors="pt")["input_ids"]
    except BaseModelError:
        return model, None

    def ask(one: "nn.Module") -> "Tensor":
        found: Tensor = one(input_ids=ids).logits
        return found

    return model, ask


def _print(adapter: str, report: "Report") -> None:
    counts = {
        name: sum(one.count for one in report.findings if one.severity == name) for name in ("error", "warning", "note")
    }
    said = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)
    print_facts({"adapter": adapter, "found": said or "nothing", **_effect(report.effect)})
    if not report.findings:
        return
    rows = [
        {"code": one.code, "severity": one.severity, "where": one.where, "what": one.what} for one in report.findings
    ]
    print_table("", rows, fold=("where", "what"))
    _print_meanings(report.findings)


def _print_meanings(findings: "tuple[Finding, ...]") -> None:
    """Say once for each code what it means, and the command that mends it."""
    first = {one.code: one for one in reversed(findings)}
    facts: dict[str, str] = {}
    for code in dict.fromkeys(one.code for one in findings):
        one, row = first[code], veneer.CODES[code]
        facts[code] = f"{row.title}: {row.meaning}" + (f"\n$ {one.command}" if one.command else "")
    print_facts(facts)


def _effect(effect: "Effect | None") -> dict[str, str]:
    if effect is None:
        return {}
    return {
        "largest change of a logit": f"{effect.largest:.4g}, {effect.relative:.2%} of the largest",
        "divergence": f"{effect.divergence:.4g} nats a token",
        "another likeliest token": f"at {effect.top_changed} of {effect.positions} positions",
    }


def _print_codes(as_json: bool) -> None:
    rows = [
        {"code": row.code, "severity": row.severity, "what is found": row.title, "what it means": row.meaning}
        for row in veneer.CODES.values()
    ]
    if as_json:
        told = [asdict(row) for row in veneer.CODES.values()]
        print_result("check", {}, {"codes": told})
    else:
        print_table("", rows, fold=("what it means",))
