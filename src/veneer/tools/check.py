"""The doctor: what is wrong or suspicious about an adapter, in its files, in its values, and on a base."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapter import Adapter
from veneer.errors import AdapterError, several
from veneer.files.doctor import examine
from veneer.files.doctor_codes import ERROR, Finding, in_order, limited
from veneer.files.shards import Checkpoint
from veneer.tools.check_base import checkpoint_findings, model_findings
from veneer.tools.check_effect import Effect, measure_effect
from veneer.tools.merge_probe import Probe
from veneer.tools.spectrum import spectrum

_ENERGY = 1 - 1e-6


@dataclass(frozen=True)
class Report:
    """What a check found.

    Args:
        findings: Everything, errors first.
        effect: What the adapter does to the outputs of a base, where one was asked.

    Example:
        >>> Report((Finding("V401", "a", "every lora_B is zero"),)).errors
        ()
    """

    findings: tuple[Finding, ...]
    effect: Effect | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings for which the adapter cannot be used as it is."""
        return tuple(one for one in self.findings if one.severity == ERROR)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "findings": [one.to_json() for one in self.findings],
            "num_errors": sum(one.count for one in self.errors),
            "effect": None if self.effect is None else asdict(self.effect),
        }


def check(path: str | Path, *, base: Checkpoint | nn.Module | None = None, probe: Probe | None = None) -> Report:
    """Say everything that is wrong or suspicious about an adapter's files; nothing in them is run.

    Args:
        path: The folder; or a file, of which is said what it is.
        base: The base to compare it with: a model, which is also asked; or a checkpoint, by its headers alone.
        probe: What to ask of a model, see `check_adapter`.

    Cost:
        Reading the files, and of the order of rank² · (in + out) for each module.

    Example:
        >>> [one.code for one in check("no/such/folder").errors]
        ['V101']
    """
    examined = examine(path)
    if examined.adapter is None:
        return Report(examined.findings)
    found = check_adapter(examined.adapter, base, probe=probe, name=str(path))
    return Report(in_order([*examined.findings, *found.findings]), found.effect)


def check_adapter(
    adapter: Adapter, model: Checkpoint | nn.Module | None = None, *, probe: Probe | None = None, name: str = "DIR"
) -> Report:
    """Say everything that is wrong or suspicious about an adapter as a value, and on a model.

    Args:
        adapter: The adapter.
        model: The base: a bare model, which is as it was afterwards; or a checkpoint, by its headers alone.
        probe: A function from the model to its logits; without one, language models are asked about fixed tokens.
        name: What commands call the adapter.

    Raises:
        AttachError: If the model has an adapter attached.

    Example:
        >>> import torch
        >>> from veneer.adapter import LowRank
        >>> from veneer.config import LoRAConfig
        >>> adapter = Adapter({"0": LowRank(torch.ones(1, 3), torch.zeros(4, 1), 1.0)}, LoRAConfig(rank=1))
        >>> [one.code for one in check_adapter(adapter, nn.Sequential(nn.Linear(2, 4))).findings]
        ['V502', 'V401']
    """
    findings = [finding for look in VALUE_CHECKS for finding in look(adapter, name)]
    if isinstance(model, Checkpoint):
        return Report(limited([*findings, *checkpoint_findings(adapter, model)]))
    if model is None:
        return Report(limited(findings))
    on_base = model_findings(adapter, model)
    effect = None
    if not any(one.severity == ERROR for one in on_base):
        effect, found = measure_effect(model, adapter, probe)
        on_base += found
    return Report(limited([*findings, *on_base]), effect)


def never_trained(adapter: Adapter, name: str) -> Iterator[Finding]:  # noqa: ARG001
    """Find modules whose update is zero."""
    zero_B = [path for path, pair in adapter.modules.items() if not bool(pair.lora_B.any())]
    zero_A = [path for path, pair in adapter.modules.items() if path not in zero_B and not bool(pair.lora_A.any())]
    pairs, count = adapter.modules.values(), len(adapter.modules)
    if zero_B and len(zero_B) == count:
        besides = bool(adapter.trained or adapter.tokens) or any(one.magnitude is not None for one in pairs)
        more = "; what trained besides (magnitudes, whole parameters, rows of tokens) may do something" * besides
        yield Finding("V401", several(zero_B), f"lora_B of all {count} modules is zero{more}")
    elif zero_B:
        yield Finding("V402", several(zero_B), f"lora_B of {len(zero_B)} of {count} modules is zero")
    if zero_A:
        yield Finding("V403", several(zero_A), f"lora_A of {len(zero_A)} of {count} modules is zero")


def rank_to_spare(adapter: Adapter, name: str) -> Iterator[Finding]:
    """Find that a lower rank would do, and products that leave the range of numbers."""
    needed: dict[str, int] = {}
    for path, pair in adapter.modules.items():
        try:
            needed[path] = spectrum(pair).rank_for(_ENERGY)
        except AdapterError as error:
            yield Finding("V405", path, error.message)
    most, rank = max(needed.values(), default=0), max((pair.rank for pair in adapter.modules.values()), default=0)
    plain = all(pair.form in ("linear", "transposed") for pair in adapter.modules.values())
    if plain and len(needed) == len(adapter.modules) and 0 < most < rank:
        quoted, out = shlex.quote(name), shlex.quote(f"{name.rstrip('/')}-r{most}")
        command = f"veneer resize {quoted} --out {out} --rank {most}"
        yield Finding("V404", name, f"rank {most} holds every module's update, of rank {rank}", command)


def magnitudes(adapter: Adapter, name: str) -> Iterator[Finding]:  # noqa: ARG001
    """Find magnitudes that are no lengths."""
    for path, pair in adapter.modules.items():
        if pair.magnitude is not None and (bad := int((pair.magnitude <= 0).sum())):
            yield Finding("V406", path, f"{bad} of {pair.magnitude.numel()} magnitudes are zero or below")


VALUE_CHECKS: tuple[Callable[[Adapter, str], Iterator[Finding]], ...] = (never_trained, rank_to_spare, magnitudes)
"""What is looked for in an adapter's values; a new one is a function and its name here."""
