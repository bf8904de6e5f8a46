"""`adapter_config.json` of PEFT's other methods, read strictly: what all of them share."""

from collections.abc import Mapping
from typing import Any

from veneer.adapter import AdapterMetadata
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError
from veneer.files.peft_method import Method
from veneer.files.peft_values import choice, dropout, is_empty, layers, layers_pattern, names, show, text
from veneer.names import did_you_mean

_USED = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip
_CHANGES_NOTHING = ("auto_mapping", "peft_version", "inference_mode", "runtime_config")


def read_config(
    raw: Any, methods: Mapping[str, Method], where: str
) -> tuple[str, LoRAConfig, dict[str, Any], AdapterMetadata]:
    """Return the method's `peft_type`, what LoRA would say of the same layers, the method's settings, and the base.

    Args:
        raw: The parsed `adapter_config.json`.
        methods: The methods by `peft_type`.
        where: What errors call it.

    Raises:
        AdapterError: If a key is unknown, of the wrong type, or stands for something not supported; all at once.

    Example:
        >>> from veneer.files.peft_loha import LOHA
        >>> raw = {"peft_type": "LOHA", "target_modules": ["q"], "r": 4, "alpha": 2}
        >>> name, config, settings, _ = read_config(raw, {"LOHA": LOHA}, "config")
        >>> name, config.target_modules, settings["r"]
        ('LOHA', ('q',), 4)
    """
    if not isinstance(raw, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    name = raw.get("peft_type")
    if not isinstance(name, str) or name not in methods:
        known = ", ".join(map(repr, methods))
        cure = "; LoRA is read by load_adapter" if name == "LORA" else ""
        raise AdapterError(f"{where}: expected peft_type {known}, got {show(name)}{cure}")
    method = methods[name]
    problems = _unusable_keys(raw, method)
    settings = method.settings(raw, problems)
    values: dict[str, Any] = {
        "target_modules": names(raw, "target_modules", problems, regex=True),
        "exclude_modules": names(raw, "exclude_modules", problems, regex=True),
        "layers_to_transform": layers(raw, "layers_to_transform", problems),
        "layers_pattern": layers_pattern(raw, "layers_pattern", problems),
        "modules_to_save": names(raw, "modules_to_save", problems),
        "dropout": dropout(raw, method.dropout, problems) if method.dropout else 0.0,
        "bias": _bias(raw, method, problems),
    }
    if not values["target_modules"] and not any(problem.startswith("target_modules") for problem in problems):
        problems.append("target_modules: expected suffixes or a regular expression, got none")
    metadata = AdapterMetadata(
        base=text(raw, "base_model_name_or_path", problems),
        revision=text(raw, "revision", problems),
        task_type=text(raw, "task_type", problems),
    )
    if not problems:
        try:
            return name, LoRAConfig(**values), settings, metadata
        except ConfigError as cause:
            problems += cause.problems
    raise AdapterError(f"{where}: cannot be read exactly as it is meant", problems)


def _bias(raw: Mapping[str, Any], method: Method, problems: list[str]) -> str:
    if method.only is None:
        return "none"
    bias = choice(raw, "bias", ("none", "all", method.only), problems)
    return "lora_only" if bias == method.only else bias


def _unusable_keys(raw: Mapping[str, Any], method: Method) -> list[str]:
    known = (*_USED, *_CHANGES_NOTHING, *method.keys, *method.ignored)
    problems = []
    for key, value in raw.items():
        if key in known or is_empty(value):
            continue
        if key in method.unsupported:
            problems.append(f"{key}: {method.unsupported[key]} is not supported (got {show(value)})")
        else:
            near = did_you_mean(key, (*known, *method.unsupported))
            problems.append(f"{key}: with {method.name}, a value here has no meaning that is known{near}")
    return problems
