"""Parameters that train whole beside the factors: biases, and modules to save.

A trainable copy stands in for each while the adapter is attached; the frozen one waits and comes back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.config import LoRAConfig
from veneer.errors import AdapterError, TargetError
from veneer.names import did_you_mean, matches_suffix


@dataclass
class TrainedParameter:
    """A parameter that trains whole.

    Args:
        owner: The module that holds it.
        name: Its name there.
        original: The frozen parameter as it was.
        trained: The copy that trains.
    """

    owner: nn.Module
    name: str
    original: nn.Parameter
    trained: nn.Parameter


def trained_parameters(
    model: nn.Module, targets: Sequence[str], config: LoRAConfig, values: Mapping[str, Tensor] | None
) -> dict[str, TrainedParameter]:
    """Return the parameters that train whole, by full path; the model is not touched.

    Args:
        model: The model, nothing attached yet.
        targets: Paths of the adapted layers.
        config: Says which biases and modules.
        values: What an adapter brings, by full path; None for a fresh adapter, which starts from the base's values.

    Raises:
        TargetError: If a module to save shares a parameter with another (a tied head).
        AdapterError: If an adapter's parameters are not those of the model.
    """
    paths = list(_paths(model, targets, config)) if values is None else list(values)
    known = dict(model.named_parameters())
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if values is not None:
        _check_values(values, known, every)
    tied = [
        f"{path} is the same parameter as {', '.join(name for name in names if name != path)}"
        for path in paths
        if len(names := _names_of(model, path)) > 1
    ]
    if tied:
        raise TargetError("a tied parameter cannot train alone; untie it, or take it out of modules_to_save", tied)
    result = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        copy = nn.Parameter(known[path].detach().clone())
        if values is not None:
            with torch.no_grad():
                copy.copy_(values[path])
        result[path] = TrainedParameter(model.get_submodule(owner), name, known[path], copy)
    return result


def _check_values(values: Mapping[str, Tensor], known: Mapping[str, nn.Parameter], every: Sequence[str]) -> None:
    """Raise unless the model has a parameter of the same path and shape for each value."""
    problems = []
    for path, value in values.items():
        if path not in every:
            problems.append(f"{path}: the model has no such parameter{did_you_mean(path, every)}")
        elif path in known and known[path].shape != value.shape:
            problems.append(
                f"{path}: the model's shape is {tuple(known[path].shape)}, the adapter's {tuple(value.shape)}"
            )
    if problems:
        raise AdapterError("the adapter's trained parameters do not fit the model (nothing was touched)", problems)


def swap_in(one: TrainedParameter) -> None:
    """Let the trainable copy stand in for the frozen parameter."""
    setattr(one.owner, one.name, one.trained)


def swap_out(one: TrainedParameter) -> None:
    """Put the frozen parameter back, on the device where the model is now."""
    one.original.data = one.original.data.to(one.trained.device)
    setattr(one.owner, one.name, one.original)


def _paths(model: nn.Module, targets: Sequence[str], config: LoRAConfig) -> Iterator[str]:
    saved = [
        path
        for path, _ in model.named_modules()
        if path and any(matches_suffix(path, entry) for entry in config.modules_to_save)
    ]
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        in_saved = any(owner == root or owner.startswith(root + ".") for root in saved)
        adapted_bias = config.bias == "lora_only" and owner in targets
        if in_saved or (leaf == "bias" and (config.bias == "all" or adapted_bias)):
            yield name


def _names_of(model: nn.Module, path: str) -> list[str]:
    """Return every name under which the model holds the parameter at a path."""
    every = list(model.named_parameters(remove_duplicate=False))
    wanted = next(parameter for name, parameter in every if name == path)
    return [name for name, parameter in every if parameter is wanted]
