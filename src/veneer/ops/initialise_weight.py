"""Initialisations that look at the layer's weight: its leading part, or what quantisation lost of it.

Shapes: O out, I in, R rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.initialise_svd import truncated_svd
from veneer.ops.initialise_values import Factors, as_matrix, check_rank, check_scaling, nonzero_matrix, whole_number


def pissa(
    weight_OI: Tensor,
    rank: int,
    scaling: float,
    *,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return the leading part of a weight, shared out evenly: train the strongest directions themselves.

    With the leading singular triples `U, S, Vh` of the weight:

        A = √(S / scaling) · Vh,   B = U · √(S / scaling),   scaling · B A = U S Vh

    Args:
        weight_OI: The layer's weight, of any floating dtype.
        rank: At most min(O, I).
        scaling: Factor of the update.
        niter: Power iterations of the randomised SVD (4 to 16 are usual); None for the exact one.
        generator: Of the randomised SVD.

    Returns:
        Factors that need a compensating pair: the paper freezes `W - scaling · B A`, we freeze W and count from here.

    Raises:
        ConfigError: If the rank is too high, the scaling not positive, the weight zero or not finite.

    Cost:
        One SVD of the weight in float32, see `truncated_svd`.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 1.0]))
        >>> factors = pissa(W, 1, 0.5)
        >>> (0.5 * factors.lora_B @ factors.lora_A).round(decimals=4).tolist(), factors.compensated
        ([[4.0, 0.0], [0.0, 0.0]], True)

    Source:
        Meng et al. 2024, arXiv:2404.02948, section 3. Differs: the base is not changed.
    """
    W_OI = nonzero_matrix(weight_OI, "the weight")
    check_rank(rank, min(W_OI.shape), f"a weight of {tuple(W_OI.shape)} has no more singular values")
    check_scaling(scaling)
    if niter is not None:
        whole_number(niter, "niter", 0)
    A_RI, B_OR = _shared_out(*truncated_svd(W_OI, rank, niter=niter, generator=generator), scaling)
    return Factors(A_RI, B_OR, compensated=True)


def olora(weight_OI: Tensor, rank: int) -> Factors:
    """Return the first `rank` columns of Q and rows of R of the weight's QR decomposition.

        B = Q[:, :rank],   A = R[:rank] = Bᵀ W

    B's columns are orthonormal; the scaling has no part in it, as in the paper and in PEFT.

    Args:
        weight_OI: The layer's weight, of any floating dtype.
        rank: At most min(O, I).

    Returns:
        Factors that need a compensating pair.

    Raises:
        ConfigError: If the rank is too high, the weight zero or not finite.

    Cost:
        2·O·R² + 2·O·I·R operations: Q's first columns depend on the weight's first columns alone, so no whole QR.

    Example:
        >>> factors = olora(torch.tensor([[3.0, 1.0], [4.0, 2.0]]), 1)
        >>> factors.lora_B.round(decimals=4).T.tolist(), factors.lora_A.round(decimals=4).tolist()
        ([[0.6000000238418579, 0.800000011920929]], [[5.0, 2.200000047683716]])

    Source:
        Büyükakyüz 2024, arXiv:2406.01775. Differs: the base is not changed; R's diagonal is not negative.
    """
    W_OI = nonzero_matrix(weight_OI, "the weight")
    check_rank(rank, min(W_OI.shape), f"Q of a weight of {tuple(W_OI.shape)} has no more columns")
    Q_OR, R_RR = torch.linalg.qr(W_OI[:, :rank])
    B_OR = Q_OR * torch.where(R_RR.diagonal() < 0, -1.0, 1.0)
    return Factors(B_OR.T @ W_OI, B_OR, compensated=True)


def loftq(
    weight_OI: Tensor, rank: int, scaling: float, quantise: Callable[[Tensor], Tensor], iterations: int = 1
) -> Factors:
    """Return the best low-rank repair of what quantisation took from a weight.

    With `W_q = quantise(W)`:

        scaling · B A = the leading part of W - W_q,   so that   W_q + scaling · B A ≈ W

    **Not compensated, on purpose**: the first output is not the quantised base's; it is closer to that of the model in
    full precision. That is all this initialisation is for.

    Args:
        weight_OI: The weight in full precision.
        rank: At most min(O, I).
        scaling: Factor of the update.
        quantise: Takes a weight to what the layer stores of it, dequantised. For a base that is quantised already and
            stays as it is, let it return that weight whatever it is given: then one iteration is all there is to do.
        iterations: Rounds of `Q = quantise(W - scaling · B A)`, then `B A` from `W - Q`. More than one is right only
            for a base that will hold the Q of the last round, not for one quantised from W.

    Raises:
        ConfigError: If the rank is too high, the scaling not positive, a matrix not finite, or `quantise` changes the
            shape.

    Cost:
        One quantisation and one exact SVD for each iteration.

    Example:
        >>> W = torch.tensor([[1.2, 0.0], [0.0, 3.0]])
        >>> factors = loftq(W, 1, 2.0, torch.round)
        >>> (W.round() + 2.0 * factors.lora_B @ factors.lora_A).round(decimals=4)[0, 0].item(), factors.compensated
        (1.2000000476837158, False)

    Source:
        Li et al. 2023, arXiv:2310.08659, algorithm 1. Differs: the factors are divided by the scaling, which PEFT
        leaves out, so that the repair is right at any alpha.
    """
    W_OI = as_matrix(weight_OI, "the weight")
    check_rank(rank, min(W_OI.shape), f"a weight of {tuple(W_OI.shape)} has no more singular values")
    check_scaling(scaling)
    repair_OI = torch.zeros_like(W_OI)
    A_RI, B_OR = W_OI[:rank], W_OI[:, :rank]  # replaced in the first of at least one rounds
    for _ in range(whole_number(iterations, "iterations", 1)):
        stored_OI = as_matrix(quantise(W_OI - repair_OI), "the quantised weight").to(W_OI.device)
        if stored_OI.shape != W_OI.shape:
            raise ConfigError(f"quantise returned shape {tuple(stored_OI.shape)} for a weight of {tuple(W_OI.shape)}")
        A_RI, B_OR = _shared_out(*truncated_svd(W_OI - stored_OI, rank), scaling)
        repair_OI = scaling * B_OR @ A_RI
    return Factors(A_RI, B_OR, compensated=False)


def _shared_out(U_OR: Tensor, S_R: Tensor, Vh_RI: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A, B with `scaling · B A = U S Vh` and rows and columns of equal length."""
    root_R = (S_R / scaling).sqrt()
    # A component of size zero would be a zero row times a zero column, which never trains; the row alone is kept.
    length_R = torch.where(root_R > 0, root_R, 1.0)
    return length_R[:, None] * Vh_RI, U_OR * root_R
