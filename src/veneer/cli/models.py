"""What `eval` and `generate` share: a base with an adapter in it, and settings of generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import veneer
from veneer.errors import ConfigError
from veneer.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from veneer.adapter import Adapter
    from veneer.base.source import Source
    from veneer.config import SamplingConfig


@dataclass(frozen=True)
class Opened:
    """A base that was found, with its tokenizer and the adapter to put in; its weights are not loaded yet."""

    source: "Source"
    tokenizer: "PreTrainedTokenizerBase"
    adapter: "Adapter | None"
    any_base: bool
    storage: str | None
    dtype: str | None

    @property
    def digest(self) -> str | None:
        """The adapter's identity; None for the base alone."""
        return None if self.adapter is None else self.adapter.digest

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for, where it says so."""
        return veneer.num_positions(veneer.load_config(self.source))

    def model(self) -> "PreTrainedModel":
        """Load the weights, and attach the adapter."""
        model = veneer.load_model(self.source, dtype=self.dtype, storage=self.storage)
        if self.adapter is not None:
            veneer.attach(model, self.adapter, any_base=self.any_base)
        return model


def open_base(base: str, adapter: str | None, any_base: bool, storage: str | None, dtype: str | None = None) -> Opened:
    """Find a base and read its tokenizer, and an adapter where one is named: what is wrong shows before weights load.

    Raises:
        AdapterError: If the adapter cannot be read, or was trained with another chat template.
        ConfigError: If the storage or the dtype is unknown.
    """
    veneer.check_storage(storage)
    veneer.named_dtype(dtype)
    value = veneer.load_adapter(adapter) if adapter is not None else None
    source = veneer.find_source(base)
    tokenizer = veneer.load_tokenizer(source)
    if value is not None and not any_base:
        veneer.check_template(value.metadata, tokenizer)
    return Opened(source, tokenizer, value, any_base, storage, dtype)


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
