"""`adapter_config.json` as PEFT 0.21.2 writes it: read strictly, written the same way every time.

PEFT drops what it does not know with a warning; its own documentation says that the result is then incorrect. Here
each key is one of: used, known to change nothing, or an error that names it (research: peft-format.md 2 and 8).
"""

from collections.abc import Mapping
from typing import Any

from veneer.adapter import Adapter, AdapterMetadata
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError
from veneer.files.patterns import scales_for
from veneer.files.peft_layout import targets_of
from veneer.files.peft_values import (
    choice,
    dropout,
    is_empty,
    layers,
    layers_pattern,
    names,
    number,
    pattern,
    show,
    text,
    token_ids,
    token_rows,
)
from veneer.names import did_you_mean, matches_suffix

PEFT_VERSION = "0.21.2"
_PEFT_RANK = 8
_PEFT_ALPHA = 8
_EXACT_INTEGERS = 2.0**53

_USED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save", "peft_type", "task_type",
    "base_model_name_or_path", "revision", "init_lora_weights", "use_dora", "target_parameters", "fan_in_fan_out",
    "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
_CHANGES_NOTHING = (
    "auto_mapping", "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config",
    # These set up initialisations; `init_lora_weights` tells whether one was used that matters.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip
_UNSUPPORTED = {
    "lora_bias": "a bias of lora_B",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "ensure_weight_tying": "adapters tied between layers",
    "enable_lora": "parts of a fused layer (PEFT 0.2)",
    "merge_weights": "merging while evaluating (PEFT 0.2)",
}
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BY_NAME = {"experts", "parameter"}
_BIASES = ("none", "all", "lora_only")


def config_from_peft(raw: Any, where: str) -> tuple[LoRAConfig, AdapterMetadata]:
    """Return our settings for a PEFT configuration, and what it says of the base.

    Args:
        raw: The parsed `adapter_config.json`.
        where: What errors call it.

    Raises:
        AdapterError: If a key is unknown, of the wrong type, or stands for something not supported; all at once.

    Example:
        >>> config, _ = config_from_peft({"peft_type": "LORA", "target_modules": ["v", "q"], "r": 4}, "config")
        >>> config.rank, config.alpha, config.target_modules
        (4, 8.0, ('q', 'v'))
    """
    if not isinstance(raw, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"{where}: expected peft_type 'LORA', got {raw.get('peft_type')!r}; LoHa, LoKr, VeRA and AdaLoRA become"
            " LoRA by to_lora(read_other(folder)).adapter"
        )
    problems = _unusable_keys(raw) + _initialisation_problems(raw.get("init_lora_weights"))
    values: dict[str, Any] = {
        "rank": number(raw, "r", _PEFT_RANK, problems, whole=True),
        "alpha": number(raw, "lora_alpha", _PEFT_ALPHA, problems),
        "dropout": dropout(raw, "lora_dropout", problems),
        "target_modules": names(raw, "target_modules", problems, regex=True),
        "exclude_modules": names(raw, "exclude_modules", problems, regex=True),
        "layers_to_transform": layers(raw, "layers_to_transform", problems),
        "layers_pattern": layers_pattern(raw, "layers_pattern", problems),
        "rank_pattern": pattern(raw, "rank_pattern", problems, whole=True),
        "alpha_pattern": pattern(raw, "alpha_pattern", problems),
        "use_rslora": choice(raw, "use_rslora", (False, True), problems),
        "bias": choice(raw, "bias", _BIASES, problems),
        "modules_to_save": names(raw, "modules_to_save", problems),
        "target_parameters": names(raw, "target_parameters", problems),
        "use_dora": choice(raw, "use_dora", (False, True), problems),
        "invocation_tokens": token_ids(raw, "alora_invocation_tokens", problems),
        "token_rows": token_rows(raw, "trainable_token_indices", problems),
    }
    choice(raw, "fan_in_fan_out", (False, True), problems)  # files.peft reads it: it is the layers', not the settings'
    if (
        not values["target_modules"]
        and not values["target_parameters"]
        and not any(problem.startswith("target_modules") for problem in problems)
    ):
        problems.append("target_modules: expected suffixes or a regular expression, got none")
    metadata = AdapterMetadata(
        base=text(raw, "base_model_name_or_path", problems),
        revision=text(raw, "revision", problems),
        task_type=text(raw, "task_type", problems),
    )
    if problems:
        raise AdapterError(f"{where}: cannot be read exactly as it is meant", problems)
    try:
        return LoRAConfig(**values), metadata
    except ConfigError as cause:
        raise AdapterError(f"{where}: cannot be read exactly as it is meant", cause.problems) from None


def config_to_peft(adapter: Adapter) -> dict[str, Any]:
    """Return the PEFT configuration that makes PEFT adapt an adapter's modules with its ranks and scalings.

    Raises:
        AdapterError: If there is no module, or a scaling cannot be written.

    Example:
        >>> import torch
        >>> from veneer.adapter import LowRank
        >>> pair = LowRank(torch.zeros(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> raw = config_to_peft(Adapter({"layers.0.q_proj": pair}, LoRAConfig(rank=2, alpha=4)))
        >>> raw["target_modules"], raw["r"], raw["lora_alpha"]
        (['layers.0.q_proj'], 2, 4)
    """
    if not adapter.modules:
        what = "parameters that trained whole" + (" and rows of tokens" if adapter.tokens else "")
        raise AdapterError(f"PEFT's layout needs at least one adapted module, got only {what}")
    config, metadata, scales = adapter.config, adapter.metadata, scales_for(adapter)
    forms = {pair.form for pair in adapter.modules.values()}
    used = {
        "r": scales.rank,
        "lora_alpha": _whole(scales.alpha),
        # PEFT refuses dropout for parameters by name; ours stands in the manifest's notes.
        "lora_dropout": 0.0 if forms & _BY_NAME else config.dropout,
        "target_modules": _targets(adapter) or None,
        "target_parameters": targets_of(adapter.modules)[1] or None,
        "trainable_token_indices": {path: list(one.indices) for path, one in adapter.tokens.items()} or None,
        "alora_invocation_tokens": list(config.invocation_tokens) or None,
        "use_dora": any(pair.magnitude is not None for pair in adapter.modules.values()),
        "fan_in_fan_out": "transposed" in forms,
        "rank_pattern": dict(scales.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in scales.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "bias": config.bias,
        "modules_to_save": _saved(adapter) or None,
        "peft_type": "LORA",
        "task_type": metadata.task_type,
        "base_model_name_or_path": metadata.base,
        "revision": metadata.revision,
        "init_lora_weights": True,
        # The target modules are what these would leave.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    defaults: dict[str, Any] = dict.fromkeys((*_CHANGES_NOTHING, *_UNSUPPORTED))
    for key in ("enable_lora", "merge_weights", "runtime_config"):
        del defaults[key]  # PEFT 0.21.2 does not write them
    defaults |= dict.fromkeys(("lora_bias", "use_qalora", "ensure_weight_tying"), False)
    defaults |= {"peft_version": PEFT_VERSION, "inference_mode": True, "loftq_config": {}, "qalora_group_size": 16}
    return defaults | {"megatron_core": "megatron.core"} | used


def _targets(adapter: Adapter) -> list[str]:
    """Return the configuration's own suffixes where they are a plain list that fits, else the full paths."""
    config, layers = adapter.config, targets_of(adapter.modules)[0]
    suffixes = config.target_modules
    if isinstance(suffixes, tuple) and layers and not config.exclude_modules and config.layers_to_transform is None:
        hits = [{suffix for suffix in suffixes if matches_suffix(path, suffix)} for path in layers]
        if all(hits) and set().union(*hits) == set(suffixes):
            return sorted(suffixes)
    return layers


def _saved(adapter: Adapter) -> list[str]:
    """Return the full paths of the modules that trained whole: PEFT takes an entry for every path that ends in it."""
    found = set()
    for entry in adapter.config.modules_to_save:
        for name in adapter.trained:
            parts = name.split(".")[:-1]
            paths = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
            found.add(next((path for path in paths if path.endswith(entry)), None))
    return sorted(path for path in found if path is not None)


def _whole(alpha: float) -> int | float:
    """Return an integer where that is the same number: PEFT and others expect one."""
    return int(alpha) if alpha.is_integer() and alpha < _EXACT_INTEGERS else alpha


def _unusable_keys(raw: Mapping[str, Any]) -> list[str]:
    known = (*_USED, *_CHANGES_NOTHING, *_UNSUPPORTED)
    problems = []
    for key, value in raw.items():
        if key in _UNSUPPORTED and not is_empty(value):
            problems.append(f"{key}: {_UNSUPPORTED[key]} is not supported (got {show(value)})")
        elif key not in known and not is_empty(value):
            problems.append(f"{key}: unknown key with a value, so its meaning would be lost{did_you_mean(key, known)}")
    return problems


def _initialisation_problems(value: Any) -> list[str]:
    if value is None or isinstance(value, bool):
        return []
    name = value.lower() if isinstance(value, str) else ""
    if name in _HARMLESS_INITS:
        return []
    if any(name == one or name.startswith(f"{one}_niter_") for one in _CHANGING_INITS):
        return [
            f"init_lora_weights: {value!r} changed the base model's weights, so this file alone is wrong on the"
            " original base; convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        ]
    near = did_you_mean(name, (*_HARMLESS_INITS, *_CHANGING_INITS))
    return [f"init_lora_weights: unknown initialisation {show(value)}{near}"]
