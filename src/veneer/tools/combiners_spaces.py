"""The spaces that a rule on entries can act in: of the update itself, or of the small matrices that span it.

Shapes: O out, I in, R_i rank of an adapter, Q at most Σ R_i.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from veneer.ops.low_rank import Factors, RowBlocks, balanced, best_of_rows, block_rows, svd, svd_of_product

Merge = Callable[[Sequence[RowBlocks]], RowBlocks]
"""Joins the adapters' matrices, of one shape, entry by entry."""

Space = Callable[[Sequence[tuple[Tensor, Tensor]], Merge, int | None], tuple[Factors, float]]
"""Gets each adapter's B (O, R) and A (R, I), how to merge, and the highest rank of the result.

Returns the factors and the norm of what the rule gave before it was cut to the rank.
"""


def in_full(pairs: Sequence[tuple[Tensor, Tensor]], merge: Merge, rank: int | None) -> tuple[Factors, float]:
    """Merge the entries of the updates themselves. What comes out has full rank, so it is cut: to Σ R_i if not told.

    Equals `merge([B @ A for B, A in pairs])` and its best approximation of the rank.

    Cost:
        The result is computed by blocks of rows four times (twelve where it is too large for `best_of_rows` to hold a
        copy), each update twice more for its threshold: n · O · I · R_i operations each time. Memory for a block of
        rows of each adapter, and that copy.
    """
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
    rows = block_rows(shape[1])
    merged = merge([RowBlocks(shape, _product_rows(B, A), rows) for B, A in pairs])
    norm = math.hypot(*(torch.linalg.vector_norm(block).item() for _, block in merged.blocks()))
    return best_of_rows(merged, rank or sum(B.shape[1] for B, _ in pairs)), norm


def in_core(pairs: Sequence[tuple[Tensor, Tensor]], merge: Merge, rank: int | None) -> tuple[Factors, float]:
    """Merge the entries of M_i = Uᵀ B_i A_i Vᵀ, with U and V bases of what all updates reach and read; back by U · V.

    U holds the left singular vectors of [D_1 … D_n], V the right ones of [D_1; …; D_n]. The result has rank at most
    Σ R_i by itself.

    Cost:
        Of the order of (O + I) · Q² + n · Q³ operations; the update is not formed.

    Source:
        Panariello et al. 2025, Core Space, arXiv:2509.17786. Differs: the bases are those of the updates and not of
        the factors, so that a factor moved from A to B, or another order of adapters, changes nothing.
    """
    Q_B, Q_A, cores = _cores(pairs)
    left, right = svd(torch.cat(cores, 1))[0], svd(torch.cat(cores, 0))[2]
    if not left.shape[1]:
        return _nothing(pairs), 0.0
    merged = _merge_small([left.T @ core @ right.T for core in cores], merge)
    U, S, V = svd(merged)
    return balanced(Q_B @ (left @ U), S, (V @ right) @ Q_A.T, rank), torch.linalg.vector_norm(S).item()


def in_knots(pairs: Sequence[tuple[Tensor, Tensor]], merge: Merge, rank: int | None) -> tuple[Factors, float]:
    """Merge the entries of V_i, where [D_1 … D_n] = U S [V_1 … V_n]; the result is U S V.

    Cost:
        Of the order of (O + n · I) · Q² operations; the update is not formed.

    Source:
        Stoica et al. 2024, KnOTS, arXiv:2410.19735, section 4. Differs: the decomposition is that of the small core.
    """
    Q_B, Q_A, cores = _cores(pairs)
    U, S, _ = svd(torch.cat(cores, 1))
    if not len(S):
        return _nothing(pairs), 0.0
    merged = _merge_small([(U.T @ core / S[:, None]) @ Q_A.T for core in cores], merge)
    left, values, right = svd_of_product((Q_B @ U) * S, merged)
    return balanced(left, values, right, rank), torch.linalg.vector_norm(values).item()


SPACES: Mapping[str, Space] = MappingProxyType({"full": in_full, "core": in_core, "knots": in_knots})
"""The spaces by name."""


def _product_rows(B_OR: Tensor, A_RI: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: B_OR[start:stop] @ A_RI


def _merge_small(matrices: Sequence[Tensor], merge: Merge) -> Tensor:
    """Merge matrices that are held, each as one block."""
    shape = (matrices[0].shape[0], matrices[0].shape[1])
    return merge([RowBlocks(shape, _rows_of(one), shape[0]) for one in matrices]).block(0, shape[0])


def _rows_of(matrix: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: matrix[start:stop]


def _cores(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return bases of all columns of B and all rows of A, and each update between them: D_i = Q_B C_i Q_Aᵀ."""
    Q_B, R_B = torch.linalg.qr(torch.cat([B for B, _ in pairs], 1))
    Q_A, R_A = torch.linalg.qr(torch.cat([A for _, A in pairs], 0).T)
    cores, start = [], 0
    for B, _ in pairs:
        ranks = slice(start, start + B.shape[1])
        cores.append(R_B[:, ranks] @ R_A[:, ranks].T)
        start = ranks.stop
    return Q_B, Q_A, cores


def _nothing(pairs: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    B, A = pairs[0]
    return Factors(B.new_zeros(B.shape[0], 0), A.new_zeros(0, A.shape[1]))
