"""Low-rank arithmetic that the other methods need: products of small matrices, never the dense update.

Shapes: O out, I in, R rank; M, N rows and columns of any matrix. Everything is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import AdapterError

MAX_FACTOR_VALUES = 1 << 28


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
