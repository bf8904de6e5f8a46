"""What a model's configuration says of its head: whether it is tied to the table."""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class TiesWords(Protocol):
    """The protocol of transformers' configurations for a head that is tied to the table."""

    tie_word_embeddings: bool | None


@runtime_checkable
class HasTextConfig(Protocol):
    """The protocol of transformers' configurations, of which some hold another one for text."""

    def get_text_config(self) -> object:
        """Return the configuration for text, often the same object."""


@runtime_checkable
class HasConfig(Protocol):
    """The protocol of transformers' models for their configuration."""

    config: object


def tying_configs(model: nn.Module) -> list[TiesWords]:
    """Return the configurations of a model that say whether its head is tied.

    Example:
        >>> tying_configs(nn.Linear(1, 1))
        []
    """
    config = model.config if isinstance(model, HasConfig) else None
    text = config.get_text_config() if isinstance(config, HasTextConfig) else None
    found = [one for one in (config, text) if isinstance(one, TiesWords)]
    return found[:1] if len(found) == 2 and found[0] is found[1] else found
