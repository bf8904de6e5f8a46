"""The leading directions of rows that come in batches: a truncated SVD that is brought up to date.

Shapes: N rows, I in, R rank, D directions (at most R).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import NonFiniteError
from veneer.ops.initialise_svd import truncated_svd

EXACT_SIZE = 256
"""Up to this smaller side of a batch the SVD is exact; above, it is randomised (2,048 rows of 576 or 1,536 at rank 32:
0.02 or 0.04 s for 0.07 or 0.67 s on two cores)."""

POWER_ITERATIONS = 4
"""Of the randomised SVD."""


@dataclass(frozen=True)
class Directions:
    """The leading right singular vectors of all rows seen so far.

    Args:
        directions_DI: Orthonormal rows, strongest first, each with its largest entry positive. Fewer than asked for
            where the rows span no more.
        values_D: Their singular values.
        energy: Sum of all squares of the rows (of their distances from the mean, where centred).
        rows: How many rows were seen.
        mean_I: Their mean in float64, or None where they are not centred.
        converged: Whether the last batch hardly turned the directions, so that later ones were left out.
    """

    directions_DI: Tensor
    values_D: Tensor
    energy: float
    rows: int
    mean_I: Tensor | None = None
    converged: bool = False

    @property
    def explained(self) -> Tensor:
        """Share of the energy that each direction explains, in float64; they add up to at most 1."""
        return self.values_D.double().square() / (self.energy or 1.0)


def add_rows(before: Directions | None, x_NI: Tensor, rank: int, *, centred: bool = False) -> Directions:
    """Return the directions of the rows seen before and these.

    Equals, where `before` kept everything that is not zero (or is None),

        torch.linalg.svd(torch.cat([*rows_before, x]), full_matrices=False)     # truncated to `rank`

    up to rounding while a batch is small (`EXACT_SIZE`), else up to the randomised SVD's error: at rank 32 of SmolLM2's
    inputs each direction has a cosine of at least 0.996 with the exact one, the first 16 of 0.9999. What truncation
    left out before is lost.

    Args:
        before: What came before, or None.
        x_NI: New rows, of any floating dtype.
        rank: How many directions to keep.
        centred: Take the mean of all rows away, as PEFT does: directions of variance, not of size.

    Raises:
        NonFiniteError: If a row holds NaN or infinity.

    Cost:
        An SVD of a matrix (R + N, I), exact or randomised by `EXACT_SIZE`; memory for twice the batch.

    Example:
        >>> first = add_rows(None, torch.tensor([[3.0, 0.0]]), 2)
        >>> both = add_rows(first, torch.tensor([[0.0, 4.0]]), 2)
        >>> first.directions_DI.tolist(), both.directions_DI.tolist(), both.values_D.tolist()
        ([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [4.0, 3.0])

    Source:
        Ross et al. 2008, "Incremental learning for robust visual tracking", section 3.3, as in EVA (arXiv:2410.07170).
    """
    if not bool(torch.isfinite(x_NI).all()):
        raise NonFiniteError(f"a layer's input of shape {tuple(x_NI.shape)} holds NaN or infinity")
    # Sums are taken in float64, which Apple's GPUs lack.
    x_NI = (x_NI.cpu() if x_NI.device.type == "mps" else x_NI).float()
    parts = [x_NI]
    count = x_NI.shape[0]
    mean_I = x_NI.double().mean(0) if centred else None
    if mean_I is not None:
        parts = [x_NI - mean_I.float()]
    energy = parts[0].square().sum(dtype=torch.float64).item()
    if before is not None:
        parts.insert(0, before.directions_DI * before.values_D[:, None])
        energy += before.energy
        if mean_I is not None and before.mean_I is not None:
            # The two means' distance is a row of its own.
            step_I = (mean_I - before.mean_I) * math.sqrt(before.rows * count / (before.rows + count))
            parts.append(step_I.float()[None])
            energy += step_I.square().sum().item()
            mean_I = (before.mean_I * before.rows + mean_I * count) / (before.rows + count)
        count += before.rows
    directions_DI, values_D = _leading(torch.cat(parts), rank)
    return Directions(directions_DI, values_D, energy, count, mean_I)


def turned(before: Directions, after: Directions) -> float:
    """Return how far the direction that turned most has turned: 1 less the cosine; 1 where their number changed.

    Example:
        >>> one = add_rows(None, torch.eye(2), 1)
        >>> turned(one, one)
        0.0
    """
    if before.directions_DI.shape != after.directions_DI.shape or not len(after.directions_DI):
        return 1.0
    cosines_D = (before.directions_DI * after.directions_DI).sum(1).abs()
    return 1.0 - min(1.0, cosines_D.min().item())


def _leading(M_NI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading right singular vectors and values, without those that are rounding."""
    niter = None if min(M_NI.shape) <= EXACT_SIZE else POWER_ITERATIONS
    _, S, Vh = truncated_svd(M_NI, min(rank, *M_NI.shape), niter=niter)
    noise = S[0] * torch.finfo(S.dtype).eps * math.sqrt(max(M_NI.shape)) if len(S) else S.sum()
    kept = noise < S
    return Vh[kept], S[kept]
