"""What `eval` and `generate` share: a base with an adapter in it, and settings of generation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import veneer
from veneer.errors import ConfigError
from veneer.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from veneer.config import SamplingConfig


def load(base: str, adapter: str | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a base model and its tokenizer, with an adapter attached where one is named."""
    value = veneer.load_adapter(adapter) if adapter is not None else None  # a bad adapter shows before the base loads
    model, tokenizer = veneer.load_base(base)
    if value is not None:
        veneer.attach(model, value)
    return model, tokenizer


def sampling_from(settings: Sequence[str] | None) -> "SamplingConfig":
    """Return the settings of generation from `key=value` texts.

    Raises:
        ConfigError: If one is not `key=value`, unknown, or no number.
    """
    values: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        known = veneer.SamplingConfig.model_fields
        if not equals or key not in known:
            raise ConfigError(f"--set {setting!r}: expected one of {', '.join(known)}{did_you_mean(key, known)}")
        try:
            values[key] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            raise ConfigError(f"--set {setting!r}: {text!r} is not a number") from None
    return veneer.SamplingConfig(**values)
