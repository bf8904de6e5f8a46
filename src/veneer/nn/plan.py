"""What an adapter would change in a model, said before anything is touched."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from veneer.config import LoRAConfig
from veneer.names import layer_index
from veneer.nn.attach import attachment_of, require_bare
from veneer.nn.heads import output_heads
from veneer.nn.kinds import kind_of
from veneer.nn.targets import Target, find_targets
from veneer.nn.tokens import token_targets
from veneer.nn.trained import TrainedParameter, trained_parameters
from veneer.nn.unfit import ambiguous, oversized, uncalled, unsaved
from veneer.storage.registry import storage_of

FACTOR_BYTES = 4
"""Factors are trained in float32."""


@dataclass(frozen=True)
class PlannedModule:
    """A layer that would be adapted; `shape` is (out, in)."""

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter that would train whole."""

    path: str
    shape: tuple[int, ...]
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What would train. `print(plan)` shows a table with one line for layers alike.

    Args:
        modules: Layers that get low-rank factors.
        trained: Parameters that train whole beside them.
        base_parameters: Parameters of the base model, tied ones counted once.
        notes: What is allowed and probably not meant: ranks above a layer's own, layers that a probe never called.
    """

    modules: tuple[PlannedModule, ...]
    trained: tuple[PlannedParameter, ...]
    base_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """How many numbers would train."""
        return sum(one.num_parameters for one in self.modules) + sum(one.num_parameters for one in self.trained)

    @property
    def num_bytes(self) -> int:
        """How many bytes they take."""
        return sum(one.num_bytes for one in self.modules) + sum(one.num_bytes for one in self.trained)

    @property
    def trainable_share(self) -> float:
        """What would train, as a share of the base model's parameters."""
        return self.num_parameters / self.base_parameters

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, as `plan.json` holds it."""
        return {
            **asdict(self),
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            "trainable_share": self.trainable_share,
        }

    def table(self) -> list[dict[str, str]]:
        """Return a line for each group of layers alike, and for each group of parameters that train whole."""
        groups: dict[tuple[Any, ...], list[PlannedModule]] = {}
        for one in self.modules:
            name = one.path.rpartition(".")[2]
            groups.setdefault((name, one.kind, one.shape, one.rank, one.scaling), []).append(one)
        lines = [_line(key, alike) for key, alike in groups.items()]
        for whole in self.trained:
            shape = " × ".join(str(size) for size in whole.shape)
            lines.append(_cells(whole.path, "whole", shape, "", "", "1", "", whole.num_parameters, whole.num_bytes))
        return lines

    def __str__(self) -> str:
        return _aligned(self.table()) + (
            f"\n{self.num_parameters:,} of {self.base_parameters:,} parameters"
            f" ({self.trainable_share:.2%}), {self.num_bytes:,} bytes"
            + "".join(f"\nnote: {note}" for note in self.notes)
        )


def plan(model: nn.Module, config: LoRAConfig, *, probe: Callable[[], object] | None = None) -> Plan:
    """Say which layers a configuration adapts in a model, with shapes, parameters and bytes; nothing is touched.

    Args:
        model: Any module.
        config: Which layers, and how.
        probe: Runs the model once; layers that it never calls are noted, for an adapter would have no effect there.

    Raises:
        AttachError: If an adapter is attached; `plan_of` says what it came from.
        TargetError: If a pattern matches nothing or a layer cannot be adapted, as `attach` would.

    Example:
        >>> print(plan(nn.Sequential(nn.Linear(3, 4)), LoRAConfig(rank=2)))
        target  kind    out × in  rank  scaling  layers  indices  parameters  bytes
        0       linear     4 × 3     2        8       1                   14     56
        14 of 16 parameters (87.50%), 56 bytes
    """
    require_bare(model)
    targets = find_targets(model, config, skip=output_heads(model))
    owners = [target.owner for target in targets]
    trained = trained_parameters(model, owners, config, None)
    tokens = token_targets(model, config.token_rows, set(owners), None, whole=trained)
    rows = {one.path: one.value.rows for one in tokens}
    notes = [note for target in targets for note in oversized(model.get_submodule(target.owner), target)]
    notes += [*ambiguous(targets, config), *unsaved(targets, config)]
    if probe is not None:
        notes += uncalled(model, targets, probe)
    return _plan(targets, {**_whole(trained), **rows}, base_parameters(model), config, notes)


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that the attached adapter came from.

    Raises:
        AttachError: If no adapter is attached.
    """
    attachment = attachment_of(model)
    own = {id(one) for layer in attachment.layers.values() for one in layer.slots.parameters()}
    notes = [note for one in attachment.targets for note in oversized(attachment.layers[one.owner].base, one)]
    notes += [*ambiguous(attachment.targets, attachment.config), *unsaved(attachment.targets, attachment.config)]
    rows = {path: attachment.token_slot(path).rows for path in attachment.tokens}
    trained = {**_whole(attachment.trained), **rows}
    return _plan(attachment.targets, trained, base_parameters(model, without=own), attachment.config, notes)


def base_parameters(model: nn.Module, *, without: Collection[int] = ()) -> int:
    """Return how many numbers a base holds, tied ones once; of a quantised layer, as many as its weight stands for.

    Args:
        model: The model.
        without: Parameters that are an adapter's, by identity.

    Example:
        >>> base_parameters(nn.Linear(3, 4))
        16
    """
    plain = sum(one.numel() for one in model.parameters() if id(one) not in without)
    stored = 0
    for module in model.modules():
        storage, kind = storage_of(module), kind_of(module)
        if storage is not None and storage.name != "plain" and kind is not None:
            stored += math.prod(kind.sizes(module, ""))
    return plain + stored


def _whole(trained: Mapping[str, TrainedParameter]) -> dict[str, Tensor]:
    return {path: one.original for path, one in trained.items()}


def _plan(
    targets: Sequence[Target],
    trained: Mapping[str, Tensor],
    base_parameters: int,
    config: LoRAConfig,
    notes: Sequence[str],
) -> Plan:
    return Plan(
        modules=tuple(_module(target, config) for target in targets),
        trained=tuple(
            PlannedParameter(path, tuple(one.shape), one.numel(), one.numel() * one.element_size())
            for path, one in trained.items()
        ),
        base_parameters=base_parameters,
        notes=tuple(notes),
    )


def _module(target: Target, config: LoRAConfig) -> PlannedModule:
    count = target.num_trainable(config)
    return PlannedModule(
        path=target.path,
        kind=target.kind.name,
        shape=(target.out_features, target.in_features),
        rank=target.full_rank,
        scaling=target.scaling,
        num_parameters=count,
        num_bytes=count * FACTOR_BYTES,
    )


def _line(key: tuple[Any, ...], alike: Sequence[PlannedModule]) -> dict[str, str]:
    name, kind, (out_features, in_features), rank, scaling = key
    indices = _ranges(sorted({index for one in alike if (index := layer_index(one.path)) is not None}))
    parameters = sum(one.num_parameters for one in alike)
    shape = f"{out_features} × {in_features}"
    num_bytes = sum(one.num_bytes for one in alike)
    return _cells(name, kind, shape, str(rank), f"{scaling:g}", str(len(alike)), indices, parameters, num_bytes)


def _cells(*values: Any) -> dict[str, str]:
    names = ("target", "kind", "out × in", "rank", "scaling", "layers", "indices", "parameters", "bytes")
    return {name: f"{value:,}" if isinstance(value, int) else value for name, value in zip(names, values, strict=True)}


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers in short: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _aligned(lines: Iterable[dict[str, str]]) -> str:
    """Return a table in plain text: words to the left, numbers to the right."""
    rows = list(lines)
    if not rows:
        return ""
    head = {name: name for name in rows[0]}
    widths = {name: max(len(row[name]) for row in [head, *rows]) for name in head}
    left = {"target", "kind", "indices"}
    return "\n".join(
        "  ".join(row[n].ljust(widths[n]) if n in left else row[n].rjust(widths[n]) for n in head).rstrip()
        for row in [head, *rows]
    )
