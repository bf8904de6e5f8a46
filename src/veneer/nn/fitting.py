"""Where an adapter's modules belong in a model, and whether they fit."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.factors import conv_groups
from veneer.names import did_you_mean
from veneer.nn.kinds import kind_of
from veneer.nn.slots import only_parts, spread_parts
from veneer.nn.targets import Target, locate
from veneer.nn.unfit import shared_layers, tied_tables, unfit_layers

# Factors that mean the same function, whatever way round the weight is stored or named.
_ALIKE = (
    {"linear", "transposed", "parameter"},
    {"attention_in", "parameter"},
    {"attention_out", "linear", "parameter"},
)
# Factors that a layer takes as they are, in a form of their own.
_TAKEN = {("conv", "conv_across")}


def targets_of(model: nn.Module, adapter: Adapter) -> list[Target]:
    """Return the layers that an adapter's modules name, in the model's order.

    Raises:
        AdapterError: For every module that the model lacks or that does not fit, all at once.
    """
    modules = dict(model.named_modules())
    places: dict[str, tuple[str, str]] = {}
    problems = []
    names = [*modules, *(name for name, _ in model.named_parameters())]
    for path in adapter.modules:
        try:
            places[path] = locate(modules, path)
        except KeyError:
            problems.append(f"{path}: the model has no such module{did_you_mean(path, names)}")
    problems += [*shared_layers(model, {owner for owner, _ in places.values()})]
    problems += unfit_layers(modules, list(places.values()))
    problems += tied_tables(modules, [owner for owner, _ in places.values()])
    targets = []
    if not problems:
        targets = [_target(modules, path, *places[path], adapter) for path in adapter.modules]
        problems = [line for one in targets for line in _misfits(one, adapter.modules[one.path], modules[one.owner])]
    if problems := problems or nonfinite(adapter):
        raise AdapterError("the adapter does not fit the model (nothing was touched)", problems)
    order = {path: place for place, path in enumerate(modules)}
    return sorted(targets, key=lambda one: order[one.owner])


def nonfinite(adapter: Adapter) -> list[str]:
    """Return a line for each tensor, or scaling, of an adapter that holds NaN or infinity.

    Example:
        >>> import torch
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 2), torch.full((1, 1), torch.nan), 1.0)
        >>> nonfinite(Adapter({"q": pair}, LoRAConfig(rank=1)))
        ['q.lora_B: 1 of 1 values are not finite']
    """
    problems = [
        f"{name}: {(~torch.isfinite(tensor)).sum().item():,} of {tensor.numel():,} values are not finite"
        for name, tensor in adapter.tensors().items()
        if not bool(torch.isfinite(tensor).all())
    ]
    return problems + [
        f"{path}: its scaling is {pair.scaling}"
        for path, pair in adapter.modules.items()
        if not math.isfinite(pair.scaling)
    ]


def fitted(pair: LowRank, target: Target, module: nn.Module) -> LowRank:
    """Return an adapter's factors in the form that the layer has.

    Args:
        pair: The factors, which `targets_of` has found to fit.
        target: The layer.
        module: The module that is wrapped.
    """
    if pair.form == "experts_by_position":
        A, B = pair.lora_A, pair.lora_B
        if not module.is_transposed:  # (E, out, in): the first axis is the output
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        return replace(pair, lora_A=A, lora_B=B, form="experts")
    return pair if (target.kind.form, pair.form) in _TAKEN else replace(pair, form=target.kind.form)


def _target(modules: Mapping[str, nn.Module], path: str, owner: str, member: str, adapter: Adapter) -> Target:
    """Return the target of a module that the adapter brings: ranks and scaling are the values' own."""
    pair, kind = adapter.modules[path], kind_of(modules[owner], member)
    assert kind is not None  # unfit_layers has asked
    sizes = kind.sizes(modules[owner], member)
    parts = adapter.config.parts_for(path)
    trained = pair.rank - pair.frozen_rank
    if parts and not _holds_parts(pair, parts):
        parts = ()  # other tools' values, which fill the block matrix: they are used as they are
    shapes = kind.shapes(modules[owner], member, pair.rank)
    return Target(path, owner, member, kind, *sizes, shapes, trained // max(1, len(parts)), pair.scaling, parts)


def _holds_parts(pair: LowRank, parts: tuple[tuple[int, int], ...]) -> bool:
    """Tell whether lora_B is zero but for the blocks of the parts."""
    if pair.lora_B.ndim != 2 or pair.frozen_rank or pair.rank % len(parts) or parts[-1][1] > pair.sizes[0]:
        return False
    return bool(spread_parts(only_parts(pair.lora_B, parts), parts, pair.sizes[0]).equal(pair.lora_B))


def _misfits(target: Target, pair: LowRank, module: nn.Module) -> list[str]:
    form = target.kind.form
    if pair.form == "experts_by_position" and form == "experts":
        pair = fitted(pair, target, module)
    if (
        pair.form != form
        and not any({pair.form, form} <= alike for alike in _ALIKE)
        and (form, pair.form) not in _TAKEN
    ):
        return [f"{target.path}: the layer is of form {form!r}, the adapter's factors are of form {pair.form!r}"]
    found = (tuple(pair.lora_A.shape), tuple(pair.lora_B.shape))
    expected_A, expected_B = target.shapes
    if pair.form == "conv_across":
        expected_A = (expected_A[0], expected_A[1] * conv_groups(pair.lora_A, pair.lora_B), *expected_A[2:])
    if found == (expected_A, expected_B):
        return []
    expected, got = (target.out_features, target.in_features), pair.sizes
    if expected != got:
        return [f"{target.path}: the layer is (out, in) = {expected}, the adapter is for {got}"]
    return [
        f"{target.path}: lora_A and lora_B should have shapes {target.shapes[0]} and {target.shapes[1]} for rank "
        f"{pair.rank}, got {found[0]} and {found[1]}"
    ]
