"""Low-rank arithmetic for files and tools alike: products of small matrices, never the dense update.

Shapes: O out, I in, R rank, Q columns of a random sketch; M, N rows and columns of any matrix. Everything is float64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import AdapterError

MAX_FACTOR_VALUES = 1 << 28
MAX_EXACT_VALUES = 1 << 20
"""Values of a dense matrix up to which its own decomposition is taken rather than a randomised one."""
MAX_HELD_VALUES = 1 << 26
"""Values of a matrix up to which a copy in float32 is held while its leading directions are sought."""
_ITERATIONS = 4
_BLOCK_VALUES = 1 << 21


@dataclass(frozen=True, eq=False)
class Factors:
    """An update as a product, `B_OR @ A_RI`, with what was left out of it.

    Args:
        B_OR: Shape (out, rank).
        A_RI: Shape (rank, in).
        dropped: Frobenius norm of the part of the update that the product lacks.

    Example:
        >>> Factors(torch.ones(3, 1), torch.ones(1, 2)).rank
        1
    """

    B_OR: Tensor
    A_RI: Tensor
    dropped: float = 0.0

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.B_OR.shape[1]


def require_affordable(rank: int, out_size: int, in_size: int) -> None:
    """Refuse factors that would fill the memory: a small file can stand for huge ones.

    Raises:
        AdapterError: If they hold more than 2**28 values.

    Example:
        >>> require_affordable(64, 4096, 4096)
    """
    values = rank * (out_size + in_size)
    if values > MAX_FACTOR_VALUES:
        raise AdapterError(
            f"factors of rank {rank} for a layer of shape ({out_size}, {in_size}) hold {values} values;"
            f" at most {MAX_FACTOR_VALUES} are formed. Give a lower rank, or merge this adapter with PEFT"
        )


def svd(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V with `U @ diag(S) @ V` the matrix, S without what is zero but for rounding.

    Raises:
        AdapterError: If the values leave the range of float64.

    Example:
        >>> U, S, V = svd(torch.ones(2, 3))
        >>> U.shape, S, V.shape
        (torch.Size([2, 1]), tensor([2.4495], dtype=torch.float64), torch.Size([1, 3]))
    """
    matrix_MN = matrix_MN.double()
    if not bool(torch.isfinite(matrix_MN).all()):
        raise AdapterError("its update is not finite: products of its factors leave the range of numbers")
    try:
        U, S, V = torch.linalg.svd(matrix_MN, full_matrices=False)
    except RuntimeError as cause:  # torch.linalg.LinAlgError is one
        raise AdapterError(f"its singular values cannot be computed: {cause}") from cause
    cut = max(matrix_MN.shape) * torch.finfo(torch.float64).eps
    count = int((cut * S[0] < S).sum()) if S.numel() else 0
    return U[:, :count], S[:count], V[:count]


def svd_of_product(B_MR: Tensor, A_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of `B_MR @ A_RN` by thin QR of both and an SVD of the small core.

    Equals `svd(B_MR @ A_RN)` up to signs.

    Cost:
        Of the order of R² · (M + N + R) operations; the product is not formed.

    Raises:
        AdapterError: As `svd`.

    Example:
        >>> svd_of_product(torch.ones(4, 1), torch.ones(1, 4))[1]
        tensor([4.], dtype=torch.float64)
    """
    B_MR, A_RN = B_MR.double(), A_RN.double()
    if not bool(torch.isfinite(B_MR).all() and torch.isfinite(A_RN).all()):
        raise AdapterError("its factors are not finite: products of its tensors leave the range of numbers")
    Q_B, R_B = torch.linalg.qr(B_MR)
    Q_A, R_A = torch.linalg.qr(A_RN.T)
    U, S, V = svd(R_B @ R_A.T)
    return Q_B @ U, S, V @ Q_A.T


def balanced(U: Tensor, S: Tensor, V: Tensor, most: int | None = None) -> Factors:
    """Return the best factors of at most a rank, each with the root of the singular values.

    Source:
        Eckart and Young 1936: no product of this rank is nearer in the Frobenius norm.

    Example:
        >>> balanced(torch.eye(2), torch.tensor([3.0, 2.0]), torch.eye(2), most=1).dropped
        2.0
    """
    kept = len(S) if most is None else min(most, len(S))
    root = S[:kept].sqrt()
    return Factors(U[:, :kept] * root, root[:, None] * V[:kept], float(torch.linalg.vector_norm(S[kept:])))


def khatri_rao(B1_OR: Tensor, A1_RI: Tensor, B2_OS: Tensor, A2_SI: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the elementwise product of two products.

        (B1 A1) ∘ (B2 A2) = Σ_rs (b1_r ∘ b2_s) (a1_r ∘ a2_s)ᵀ,

    so its rank is at most that of the one times that of the other.

    Example:
        >>> one, two = torch.full((2, 1), 2.0), torch.full((1, 2), 3.0)
        >>> B, A = khatri_rao(one, two, one, two)
        >>> B @ A
        tensor([[36., 36.],
                [36., 36.]])

    Source:
        Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098, proposition 1.
    """
    B_ORS = B1_OR[:, :, None] * B2_OS[:, None, :]
    A_RSI = A1_RI[:, None, :] * A2_SI[None, :, :]
    return B_ORS.flatten(1), A_RSI.flatten(0, 1)


def evened(factors: Factors) -> Factors:
    """Return the factors with columns of B as long as the rows of A, so that float32 holds both; rank 0 as zeros.

    Example:
        >>> even = evened(Factors(torch.full((1, 1), 9.0), torch.ones(1, 1)))
        >>> even.B_OR.item(), even.A_RI.item()
        (3.0, 3.0)
    """
    B, A = factors.B_OR, factors.A_RI
    if factors.rank == 0:
        return Factors(B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1]), factors.dropped)
    b_R, a_R = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)
    used = (b_R > 0) & (a_R > 0)
    root_R = torch.where(used, (a_R / torch.where(used, b_R, 1.0)).sqrt(), 1.0)
    return Factors(B * root_R, A / root_R[:, None], factors.dropped)


def product_norm(B_MR: Tensor, A_RN: Tensor) -> float:
    """Return ‖B A‖ without forming it: ‖BA‖² = tr((BᵀB)(AAᵀ)).

    Where B A nearly cancels, half of the digits are lost; see `rounding` for a way around.

    Example:
        >>> product_norm(torch.ones(4, 1), torch.ones(1, 4))
        4.0

    Source:
        research: papers.md 4.3.
    """
    return math.sqrt(max(0.0, torch.sum((B_MR.T @ B_MR) * (A_RN @ A_RN.T)).item()))


def rounding(B_MR: Tensor, A_RN: Tensor, B_rounded: Tensor, A_rounded: Tensor) -> float:
    """Return ‖B A − B' A'‖ of factors and the same ones rounded, without forming either product.

    B A − B' A' = (B − B') A + B' (A − A'): nothing cancels.

    Example:
        >>> rounding(torch.ones(4, 1), torch.ones(1, 4), torch.ones(4, 1), torch.full((1, 4), 0.5))
        2.0
    """
    B_rounded, A_rounded = B_rounded.double(), A_rounded.double()
    return product_norm(torch.cat([B_MR - B_rounded, B_rounded], dim=1), torch.cat([A_RN, A_RN - A_rounded]))


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """A matrix that is computed block of rows by block of rows, each time anew: no more than a block is held.

    Args:
        shape: Of the matrix.
        block: Returns the rows from a start to a stop, in float64, the same values each time it is asked.
        rows: How many a block has; the last one may have fewer.

    Example:
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> [len(block) for _, block in RowBlocks((3, 3), lambda start, stop: eye[start:stop], 2).blocks()]
        [2, 1]
    """

    shape: tuple[int, int]
    block: Callable[[int, int], Tensor]
    rows: int

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the place of each block of rows and its values."""
        for start in range(0, self.shape[0], self.rows):
            stop = min(start + self.rows, self.shape[0])
            yield slice(start, stop), self.block(start, stop)


def block_rows(columns: int) -> int:
    """Return how many rows of so many columns make a block: a function of the shape alone, about 16 MB.

    Example:
        >>> block_rows(4096)
        512
    """
    return max(1, _BLOCK_VALUES // max(1, columns))


def best_of_rows(matrix: RowBlocks, rank: int) -> Factors:
    """Return nearly the best factors of a rank of a matrix that is too large to hold, and what they leave out.

    A matrix of at most `MAX_EXACT_VALUES` is decomposed itself. Else a random sketch of 2 · rank + 10 columns meets
    the matrix four times from either side; what is left out is measured, not estimated. The directions are sought in
    float32 where a copy can be held; the factors are computed in float64.

    Cost:
        12 products of O · I · (2 · rank + 10) operations; the blocks are computed three times, or eleven times where no
        copy is held. Memory for a block, for the sketches, and for the copy: 268 MB at most.

    Raises:
        AdapterError: If the values leave the range of float64.

    Example:
        >>> eye = 3 * torch.eye(4, dtype=torch.float64)
        >>> round(best_of_rows(RowBlocks((4, 4), lambda start, stop: eye[start:stop], 2), 3).dropped, 6)
        3.0

    Source:
        Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1; the columns as in `truncated_svd`.
    """
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] * matrix.shape[1] <= MAX_EXACT_VALUES:
        return balanced(*svd(torch.cat([block for _, block in matrix.blocks()])), rank)
    columns = min(2 * rank + 10, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis_IQ = torch.randn(matrix.shape[1], columns, generator=generator, dtype=torch.float64)
    rough = _held(matrix) if matrix.shape[0] * matrix.shape[1] <= MAX_HELD_VALUES else matrix
    for _ in range(_ITERATIONS):
        basis_OQ = torch.linalg.qr(_times(rough, basis_IQ)).Q
        basis_IQ = torch.linalg.qr(_transposed_times(rough, basis_OQ)).Q
    basis_OQ = torch.linalg.qr(_times(rough, basis_IQ)).Q
    del rough
    U, S, V = svd(_transposed_times(matrix, basis_OQ).T)
    found = balanced(basis_OQ @ U, S, V, rank)
    missed = [torch.linalg.vector_norm(block - found.B_OR[rows] @ found.A_RI).item() for rows, block in matrix.blocks()]
    return Factors(found.B_OR, found.A_RI, math.hypot(*missed))


def _held(matrix: RowBlocks) -> RowBlocks:
    """Return the matrix with its values computed once, in float32."""
    held = torch.empty(matrix.shape)
    for rows, block in matrix.blocks():
        held[rows] = block
    return RowBlocks(matrix.shape, lambda start, stop: held[start:stop], matrix.rows)


def _times(matrix: RowBlocks, right_IQ: Tensor) -> Tensor:
    return torch.cat([(block @ right_IQ.to(block.dtype)).double() for _, block in matrix.blocks()])


def _transposed_times(matrix: RowBlocks, left_OQ: Tensor) -> Tensor:
    out_IQ = left_OQ.new_zeros(matrix.shape[1], left_OQ.shape[1])
    for rows, block in matrix.blocks():
        out_IQ += block.T @ left_OQ[rows].to(block.dtype)
    return out_IQ
