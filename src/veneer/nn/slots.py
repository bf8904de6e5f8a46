"""A slot: the trainable factors of one adapter in one layer."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from veneer.adapter import LowRank
from veneer.factors import cat_ranks, cut_ranks

Parts = tuple[tuple[int, int], ...]
"""Runs of output rows, each with factors of its own."""


class Slot(nn.Module):
    """The factors of one adapter in one layer, trainable.

    What is applied is `scaling · (B A - B0 A0)`: the frozen pair is there where an initialisation needs it, so that the
    first output is the base's. With parts, each run of output rows has ranks of its own, and `lora_B` holds only those
    rows: `factors` puts them where they belong.

    Args:
        pair: The first values.
        dropout: Probability that an input of the low-rank branch is zeroed in training.
        parts: Runs of output rows, or none for all rows together.
        freeze_A: Whether `lora_A` stays as it is (LoRA-FA).
        dtype: Dtype of what trains.
    """

    magnitude: nn.Parameter | None
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    weight_norm2: Tensor | None

    def __init__(
        self,
        pair: LowRank,
        *,
        dropout: float = 0.0,
        parts: Parts = (),
        freeze_A: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        A, B = pair.lora_A.to(dtype, copy=True), pair.lora_B.to(dtype, copy=True)
        A0 = B0 = None
        if pair.frozen_rank:
            (A, B), (A0, B0) = cut_ranks(pair.form, A, B, pair.frozen_rank)
        if parts:
            B = only_parts(B, parts)
        self.lora_A = nn.Parameter(A.clone(), requires_grad=not freeze_A)
        self.lora_B = nn.Parameter(B.clone())
        magnitude = None if pair.magnitude is None else nn.Parameter(pair.magnitude.to(dtype, copy=True))
        self.register_parameter("magnitude", magnitude)
        # Not in the state dict: they are part of how the adapter began, and come back with it.
        self.register_buffer("frozen_A", None if A0 is None else A0.clone(), persistent=False)
        self.register_buffer("frozen_B", None if B0 is None else B0.clone(), persistent=False)
        self.register_buffer("weight_norm2", None, persistent=False)
        self.form, self.scaling, self.dropout, self.parts = pair.form, pair.scaling, dropout, parts
        self.out_features = pair.sizes[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move or a cast; the norms a move only, for in 16 bits their squares overflow."""
        norm2 = self.weight_norm2
        super()._apply(fn, recurse)
        if norm2 is not None:
            self.weight_norm2 = norm2.to(self.lora_A.device)
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what trains by its name in `LowRank.tensors`."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude}
        return {name: one for name, one in named.items() if one is not None}

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the A and B that are applied, the frozen pair included, in a dtype."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.parts:
            B = spread_parts(B, self.parts, self.out_features)
        if self.frozen_A is not None and self.frozen_B is not None:
            A, B = cat_ranks(self.form, [(A, B), (self.frozen_A, self.frozen_B)])
        return A.to(dtype), B.to(dtype)

    def pair(self) -> LowRank:
        """Return the values as they are now."""
        A, B = self.factors(self.lora_A.dtype)
        frozen = 0
        if self.frozen_A is not None and self.frozen_B is not None:
            frozen = LowRank(self.frozen_A, self.frozen_B, 1.0, self.form).rank
        return LowRank(A, B, self.scaling, self.form, self.magnitude, frozen)

    def extra_repr(self) -> str:
        """Return the rank, the scaling and the dropout for `print(model)`."""
        rank = self.lora_A.shape[1 if self.form == "experts" else 0]
        return f"rank={rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def only_parts(B_OR: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """Return the rows of each part, with the ranks of that part alone; `spread_parts` is the inverse.

    Example:
        >>> only_parts(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), [(0, 1), (2, 3)]).tolist()
        [[1.0], [2.0]]
    """
    rank = B_OR.shape[1] // len(parts)
    rows = [B_OR[start:stop, place * rank : (place + 1) * rank] for place, (start, stop) in enumerate(parts)]
    return torch.cat(rows)


def spread_parts(B_PR: Tensor, parts: Sequence[tuple[int, int]], out_features: int) -> Tensor:
    """Return a block matrix (out, parts · rank) with each part's rows and ranks in their places, zero elsewhere.

    Example:
        >>> spread_parts(torch.tensor([[1.0], [2.0]]), [(0, 1), (2, 3)], 3).tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]
    """
    rank, row = B_PR.shape[1], 0
    out = B_PR.new_zeros(out_features, rank * len(parts))
    for place, (start, stop) in enumerate(parts):
        out[start:stop, place * rank : (place + 1) * rank] = B_PR[row : row + stop - start]
        row += stop - start
    return out
