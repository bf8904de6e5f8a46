"""A slot: the trainable factors of one adapter in one layer."""

import math

import torch
from torch import Tensor, nn


class Slot(nn.Module):
    """The factors of one adapter in one layer, trainable.

    Args:
        lora_A: Down projection, shape (rank, in).
        lora_B: Up projection, shape (out, rank).
        scaling: Factor of the update.
        dropout: Probability that an input of the low-rank branch is zeroed in training.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout

    def extra_repr(self) -> str:
        """Return the rank, the scaling and the dropout for `print(model)`."""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def kaiming_uniform(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Return a fresh `lora_A` in float32, uniform in ±1/√in.

    Equals `nn.init.kaiming_uniform_(a=√5)`, with a generator of its own.

    Example:
        >>> kaiming_uniform(2, 4, torch.Generator().manual_seed(0)).abs().max().item() <= 0.5
        True

    Source:
        microsoft/LoRA `loralib/layers.py`; the paper's text says Gaussian, its code is uniform.
    """
    bound = 1 / math.sqrt(in_features)
    return (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
