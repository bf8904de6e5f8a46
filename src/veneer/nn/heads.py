"""The output head of a language model, which `"all-linear"` leaves out."""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasOutputHead(Protocol):
    """The protocol of transformers' language models for their output head."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, or None."""


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Return the output head of a language model, or nothing for any other module.

    Example:
        >>> output_heads(nn.Linear(1, 1))
        []
    """
    head = model.get_output_embeddings() if isinstance(model, HasOutputHead) else None
    return [] if head is None else [head]
