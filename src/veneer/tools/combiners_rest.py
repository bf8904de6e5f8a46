"""What becomes of all that is no product of factors when adapters are combined: what trained whole, settings, metadata.

A value that trained whole stands in the place of the base's, W0 + (v_i − W0). Its combination is
W0 + Σ w_i (v_i − W0), which needs the base, unless Σ w_i = 1: then it is Σ w_i v_i, whatever the base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.peft_layout import targets_of
from veneer.names import matches_suffix
from veneer.tools.combiners_request import LINEAR, Request
from veneer.tools.stacks import plain_config

_CLOSE = 1e-9


def combined_whole(adapters: Sequence[Adapter], request: Request) -> tuple[dict[str, Tensor], dict[str, TokenRows]]:
    """Return the parameters that trained whole, and the rows of tokens.

    Raises:
        AdapterError: If they cannot be combined, naming each.
    """
    trained: dict[str, Tensor] = {}
    tokens: dict[str, TokenRows] = {}
    problems: list[str] = []
    for path in sorted({path for adapter in adapters for path in adapter.trained}):
        values = [adapter.trained.get(path) for adapter in adapters]
        one = _one_of(path, values, [path] * len(values), request, problems)
        if one is not None:
            trained[path] = one
    for path in sorted({path for adapter in adapters for path in adapter.tokens}):
        held = [adapter.tokens.get(path) for adapter in adapters]
        rows = [None if one is None else one.rows for one in held]
        labels = ["" if one is None else str(one.indices) for one in held]
        summed = _one_of(path, rows, labels, request, problems)
        first = next(one for one in held if one is not None)
        if summed is not None:
            tokens[path] = TokenRows(first.indices, summed)
    if problems:
        raise AdapterError(
            "what trained whole replaces the base's values, so a combination needs the base, unless it is linear, every"
            " adapter has it and the weights sum to 1. Give such weights, or trained='first' to take those of the first"
            " adapter that has them, or trained='drop' to leave them out",
            problems,
        )
    return trained, tokens


def combined_config(
    adapters: Sequence[Adapter],
    modules: Mapping[str, LowRank],
    trained: Mapping[str, Tensor],
    tokens: Mapping[str, TokenRows],
) -> LoRAConfig:
    """Return the settings of the combination, but for ranks and alphas."""
    configs = [adapter.config for adapter in adapters]
    layers, parameters = targets_of(modules)
    biases = {config.bias for config in configs} if any(path.endswith("bias") for path in trained) else {"none"}
    saved = sorted({entry for config in configs for entry in config.modules_to_save if _holds(trained, entry)})
    dropouts = {config.dropout for config in configs}
    changes = {
        "target_modules": _suffixes(configs, layers) if layers or parameters or tokens else configs[0].target_modules,
        "target_parameters": tuple(parameters),
        "exclude_modules": (),
        "layers_to_transform": None,
        "layers_pattern": None,
        "dropout": dropouts.pop() if len(dropouts) == 1 and modules else 0.0,
        "bias": next(one for one in ("all", "lora_only", "none") if one in biases),
        "modules_to_save": tuple(saved),
        "token_rows": {path: one.indices for path, one in tokens.items()},
    }
    return plain_config(configs[0]).model_copy(update=changes)


def combined_metadata(adapters: Sequence[Adapter]) -> AdapterMetadata:
    """Return what all adapters that say anything say alike; what they differ in is left unsaid."""
    said = {}
    for field in fields(AdapterMetadata):
        values = {getattr(adapter.metadata, field.name) for adapter in adapters} - {None, ()}
        if len(values) == 1:
            said[field.name] = values.pop()
    return AdapterMetadata(**said)


def _one_of(
    path: str, values: Sequence[Tensor | None], labels: Sequence[str], request: Request, problems: list[str]
) -> Tensor | None:
    """Return the one value for what trained whole, or None with the problem noted, or where it is to be dropped."""
    held = [value for value in values if value is not None]
    if request.trained == "drop":
        return None
    if request.trained == "first":
        return held[0]
    alike = len({(label, value.shape) for label, value in zip(labels, values, strict=True) if value is not None}) == 1
    everywhere = len(held) == len(values) and alike
    if everywhere and all(torch.equal(held[0], value) for value in held[1:]):
        return held[0]
    weights = request.weights_for(path)
    if everywhere and request.method == LINEAR and math.isclose(math.fsum(weights), 1.0, rel_tol=_CLOSE):
        summed = sum(weight * value.double() for weight, value in zip(weights, held, strict=True))
        assert isinstance(summed, Tensor)
        return summed.to(held[0].dtype)
    names = [name for name, value in zip(request.names, values, strict=True) if value is not None]
    why = "their values differ" if everywhere else "their tokens or shapes differ"
    if len(held) < len(values):
        why = f"only {', '.join(names)} have it"
    problems.append(f"{path}: {why}")
    return None


def _holds(trained: Mapping[str, Tensor], entry: str) -> bool:
    return any(f".{entry}." in f".{path}" for path in trained)


def _suffixes(configs: Sequence[LoRAConfig], layers: Sequence[str]) -> tuple[str, ...]:
    """Return the configurations' own suffixes where they are plain lists that stand for the layers, else the paths."""
    lists = [config.target_modules for config in configs]
    plain = all(isinstance(one, tuple) for one in lists) and not any(
        config.exclude_modules or config.layers_to_transform is not None for config in configs
    )
    suffixes = sorted({name for one in lists if isinstance(one, tuple) for name in one})
    if plain and all(any(matches_suffix(path, name) for name in suffixes) for path in layers):
        return tuple(suffixes)
    return tuple(layers)
