"""The singular values of a module's update, from its factors alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.factors import as_matrices

_NEGLIGIBLE = 1e-9
"""Singular values below this share of the largest are the rounding of float32, not directions that trained."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update, the largest first.

    Args:
        values: All of them that the rank allows, those that are zero too; of several matrices (experts, the groups of a
            convolution) those of each, together.

    Example:
        >>> one = Spectrum((3.0, 4.0, 0.0))
        >>> one.norm, round(one.stable_rank, 4), round(one.effective_rank, 4), one.used
        (5.0, 1.5625, 1.9221, 2)
    """

    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of the update: the root of the summed squares."""
        return math.hypot(*self.values)

    @property
    def stable_rank(self) -> float:
        """‖·‖²_F / ‖·‖²₂, from 1 to the rank; 0 for a zero update."""
        shares = _shares(self.values)
        return 1.0 / max(shares) if shares else 0.0

    @property
    def effective_rank(self) -> float:
        """Exp of the entropy of σ² / Σσ², from 1 to the rank; 0 for a zero update.

        Source:
            Roy and Vetterli 2007, "The effective rank". Differs: shares of the energy σ², not of σ.
        """
        shares = _shares(self.values)
        if not shares:
            return 0.0
        # The exponential of a logarithm of the count may lie a rounding above it.
        return min(math.exp(-sum(share * math.log(share) for share in shares if share)), float(len(shares)))

    @property
    def used(self) -> int:
        """How many singular values are not negligible beside the largest."""
        least = _NEGLIGIBLE * max(self.values, default=0.0)
        return sum(value > least for value in self.values)

    def rank_for(self, energy: float) -> int:
        """Return how many of the largest hold a share of the summed squares.

        Example:
            >>> Spectrum((3.0, 1.0, 1.0)).rank_for(0.9)
            2
        """
        kept, count = 0.0, 0
        for share in sorted(_shares(self.values), reverse=True):
            if kept >= energy:
                break
            kept, count = kept + share, count + 1
        return count


def spectrum(pair: LowRank) -> Spectrum:
    """Return the singular values of a module's delta; a magnitude (DoRA) has no part in it.

    Equals, for one matrix, `torch.linalg.svdvals(pair.delta())[:rank]`, by thin QR of both factors and the singular
    values of the small core.

    Raises:
        AdapterError: If the products of the factors leave the range of float64.

    Cost:
        Of the order of R² · (in + out); the delta is not formed, nor are the singular vectors.

    Example:
        >>> [round(value, 4) for value in spectrum(LowRank(torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)).values]
        [1.7321]
    """
    A_MRI, B_MOR = as_matrices(pair.form, pair.lora_A.double(), pair.lora_B.double())
    core = _triangle(B_MOR) @ _triangle(A_MRI.mT).mT
    if not bool(torch.isfinite(core).all()):
        raise AdapterError("its update is not finite: products of its factors leave the range of numbers")
    values = abs(pair.scaling) * torch.linalg.svdvals(core).reshape(-1)
    return Spectrum(tuple(sorted(values.tolist(), reverse=True)))


def _triangle(matrix: Tensor) -> Tensor:
    """Return the triangular factor of a QR decomposition."""
    return torch.linalg.qr(matrix, mode="r")[1]


def _shares(values: Sequence[float]) -> list[float]:
    """Return each value's share of the summed squares; nothing where all are zero."""
    largest = max(values, default=0.0)
    if not largest:
        return []
    squares = [(value / largest) ** 2 for value in values]  # scaled first: squares of tiny ones would be zero
    return [square / sum(squares) for square in squares]
