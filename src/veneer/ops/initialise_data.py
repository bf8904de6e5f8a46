"""Initialisations that look at data: at a layer's inputs, or at the gradient of its weight.

Shapes: O out, I in, R rank, D directions.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.names import did_you_mean
from veneer.ops.initialise_svd import truncated_svd
from veneer.ops.initialise_values import Factors, as_matrix, check_rank, nonzero_matrix, whole_number

GA_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
"""Which of the first 2·rank singular pairs go to A and which to B, see `lora_ga`."""

_ORTHONORMAL = 1e-3
"""How far directions may be from orthonormal: far more than rounding, far less than raw inputs."""


def eva(directions_DI: Tensor, out_features: int, rank: int) -> Factors:
    """Return `lora_A` that looks where the layer's inputs vary most, and `lora_B` zero.

        A = the first `rank` right singular vectors of the layer's inputs,   B = 0

    Args:
        directions_DI: Orthonormal rows, strongest first, as `nn.observe.input_directions` finds them; at least `rank`.
        out_features: Size of an output row.
        rank: At most D.

    Returns:
        Factors whose product is zero: nothing to compensate.

    Raises:
        ConfigError: If there are too few directions, or they are not orthonormal (raw inputs, say).

    Example:
        >>> eva(torch.eye(3)[:2], 5, 1).lora_A.tolist()
        [[1.0, 0.0, 0.0]]

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.
    """
    V_DI = as_matrix(directions_DI, "the directions of the inputs")
    check_rank(rank, V_DI.shape[0], f"the inputs that were seen span {V_DI.shape[0]} directions (more data spans more)")
    A_RI = V_DI[:rank].clone()
    worst = (A_RI @ A_RI.T - torch.eye(rank, device=A_RI.device)).abs().max().item()
    if worst > _ORTHONORMAL:
        raise ConfigError(
            "initialisation 'eva' needs orthonormal directions, as nn.observe.input_directions finds them, and not the "
            f"inputs themselves: the rows' products differ from the identity by {worst:.2g}"
        )
    return Factors(A_RI, torch.zeros(out_features, rank, device=A_RI.device), compensated=False)


def redistribute_ranks(explained: Mapping[str, Tensor], rank: int, rho: float) -> dict[str, int]:
    """Share out the ranks of all layers so that they explain the most of their inputs' variance.

    The budget is `rank · number of layers`. It goes to the largest of all values, of which a layer has the first
    `round(rank · rho)` in the running. At equal values the earlier layer wins.

    Args:
        explained: For each layer, the share of its inputs' variance that each direction explains.
        rank: Mean rank of the layers.
        rho: Highest rank of a layer as a multiple of the mean; 1 gives every layer the same.

    Returns:
        A rank for each layer, in the same order; 0 for a layer that is better left as it is. Their sum is the budget.

    Raises:
        ConfigError: If `rho` is below 1, values are missing or not finite, or there are fewer than the budget.

    Example:
        >>> redistribute_ranks({"flat": torch.tensor([0.3, 0.3, 0.2]), "steep": torch.tensor([0.9, 0.1, 0.0])}, 2, 1.5)
        {'flat': 3, 'steep': 1}

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3; PEFT's `rho`; as there, keep each layer's scaling.
    """
    check_rank(rank)
    if not (math.isfinite(rho) and rho >= 1):
        raise ConfigError(f"rho must be a number of at least 1 (no redistribution), got {rho}")
    bad = [path for path, one in explained.items() if one.dim() != 1 or not bool(torch.isfinite(one).all())]
    if bad:
        raise ConfigError("explained variances must be finite numbers in one dimension", bad)
    most, budget = round(rank * rho), rank * len(explained)
    candidates = [
        (-value, place, path)
        for place, (path, one) in enumerate(explained.items())
        for value in sorted(one.tolist(), reverse=True)[:most]
    ]
    if len(candidates) < budget:
        raise ConfigError(
            f"rank={rank} for {len(explained)} layers needs {budget} directions, found {len(candidates)} "
            f"(at most {most} a layer); lower the rank, or observe more data"
        )
    ranks = dict.fromkeys(explained, 0)
    for _, _, path in sorted(candidates)[:budget]:
        ranks[path] += 1
    return ranks


def lora_ga(
    gradient_OI: Tensor,
    rank: int,
    *,
    stable_gamma: float = 16.0,
    direction: str = "ArB2r",
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return factors whose first step goes where full fine-tuning's would.

    With the 2·rank leading singular triples `U, S, Vh` of the gradient and `c = out^¼ / √gamma`:

        "ArB2r":  A = c · Vh[:rank],         B = c · U[:, rank : 2·rank]
        "A2rBr":  A = c · Vh[rank : 2·rank], B = c · U[:, :rank]
        "ArBr":   A = c · Vh[1::2],          B = c · U[:, 0::2]

    A and B get different directions, so that their first steps add up to the best rank-2·rank fit of the gradient.
    The scaling has no part in it.

    Args:
        gradient_OI: Gradient of the loss by the weight, from a few batches.
        rank: At most min(O, I) / 2.
        stable_gamma: The larger, the smaller both factors; 16 is the default of the authors and of PEFT.
        direction: One of `GA_DIRECTIONS`.
        niter: Power iterations of the randomised SVD (the authors use 4); None for the exact one.
        generator: Of the randomised SVD.

    Returns:
        Factors that need a compensating pair.

    Raises:
        ConfigError: If the rank is too high, an option is wrong, the gradient zero or not finite.

    Cost:
        One SVD of the gradient in float32, see `truncated_svd`.

    Example:
        >>> factors = lora_ga(torch.diag(torch.tensor([3.0, 2.0])), 1, stable_gamma=2**0.5)
        >>> factors.lora_A.tolist(), factors.lora_B.round(decimals=4).T.tolist()
        ([[1.0, 0.0]], [[0.0, 1.0]])

    Source:
        Wang et al. 2024, arXiv:2407.05000, section 3; the authors' Outsider565/LoRA-GA, `scale: stable`. Differs: the
        base is not changed. PEFT 0.21 differs from both: it multiplies B by the gradient's singular values, so that B
        scales with the loss, and leaves A without the factor c.
    """
    G_OI = nonzero_matrix(gradient_OI, "the gradient")
    check_rank(rank, min(G_OI.shape) // 2, f"LoRA-GA takes 2·rank singular pairs of a gradient {tuple(G_OI.shape)}")
    if direction not in GA_DIRECTIONS:
        raise ConfigError(
            f"direction must be one of {', '.join(GA_DIRECTIONS)}, got {direction!r}"
            f"{did_you_mean(str(direction), GA_DIRECTIONS)}"
        )
    if not (isinstance(stable_gamma, int | float) and math.isfinite(stable_gamma) and stable_gamma > 0):
        raise ConfigError(f"stable_gamma must be positive and finite, got {stable_gamma!r}")
    if niter is not None:
        whole_number(niter, "niter", 0)
    U, _, Vh = truncated_svd(G_OI, 2 * rank, niter=niter, generator=generator)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    rows, columns = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, None, 2), slice(0, None, 2)),
    }[direction]
    size = G_OI.shape[0] ** 0.25 / math.sqrt(stable_gamma)
    return Factors(size * Vh[rows], size * U[:, columns], compensated=True)
