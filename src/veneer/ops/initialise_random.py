"""Initialisations that look at nothing: random numbers, and a product that is zero.

Shapes: O out, I in, R rank, H half of it.
"""

import math

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.initialise_values import Factors, check_rank


def kaiming(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Return `lora_A` uniform in ±1/√in and `lora_B` zero: LoRA's usual start.

    Equals `nn.init.kaiming_uniform_(lora_A, a=√5)`, with a generator of its own.

    Args:
        shape: Of the weight: (out, in).
        rank: Any, also above min(out, in).
        generator: A CPU generator.

    Raises:
        ConfigError: If the rank is below 1.

    Example:
        >>> factors = kaiming((3, 4), 2, torch.Generator().manual_seed(0))
        >>> factors.lora_A.abs().max().item() <= 0.5, factors.lora_B.any().item()
        (True, False)

    Source:
        microsoft/LoRA `loralib/layers.py`; the paper's text says Gaussian, its code is uniform.
    """
    check_rank(rank)
    A_RI = (torch.rand(rank, shape[1], generator=generator) * 2 - 1) * (1 / math.sqrt(shape[1]))
    return Factors(A_RI, torch.zeros(shape[0], rank), compensated=False)


def gaussian(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Return `lora_A` normal with standard deviation 1/rank and `lora_B` zero.

    Args:
        shape: Of the weight: (out, in).
        rank: Any.
        generator: A CPU generator.

    Raises:
        ConfigError: If the rank is below 1.

    Example:
        >>> gaussian((3, 4), 2, torch.Generator().manual_seed(0)).lora_A.shape
        torch.Size([2, 4])

    Source:
        PEFT 0.21 `init_lora_weights="gaussian"`, after diffusers. (Hu et al. 2021, section 4.1, give no deviation.)
    """
    check_rank(rank)
    A_RI = torch.randn(rank, shape[1], generator=generator) / rank
    return Factors(A_RI, torch.zeros(shape[0], rank), compensated=False)


def orthogonal(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Return two factors that are both random and whose product is zero up to rounding.

    With an orthogonal Q of size (R, R) whose even and odd rows are E and F (R/2, R), and normal X, Y:

        A = 0.1 · Fᵀ X,   B = 0.1 · Y E,   B A = 0.01 · Y (E Fᵀ) X = 0

    Neither factor is zero, so both get a gradient in the first step. The product is zero only up to float32 rounding
    (1e-7 of |B| |A|): the first output is the base's but for the last digits, not bit for bit.

    Args:
        shape: Of the weight: (out, in).
        rank: An even number.
        generator: A CPU generator.

    Raises:
        ConfigError: If the rank is odd or below 1: half of it goes to each factor.

    Cost:
        O(R³ + R²·(I + O)) in float64.

    Example:
        >>> factors = orthogonal((3, 4), 2, torch.Generator().manual_seed(0))
        >>> (factors.lora_B @ factors.lora_A).abs().max().item() < 1e-7, factors.lora_B.any().item()
        (True, True)

    Source:
        datta0.github.io, "Rethink LoRA initialisations", section "Orthogonal initialisation"; PEFT 0.21
        `init_lora_weights="orthogonal"`. Differs: in float64, so that rounding to float32 is the only error.
    """
    check_rank(rank)
    if rank % 2:
        raise ConfigError(f"initialisation 'orthogonal' needs an even rank, got {rank}: half of it goes to each factor")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    Q_RR = torch.linalg.qr(normal(rank, rank)).Q
    A_RI = Q_RR[1::2].T @ normal(rank // 2, shape[1]) / 10
    B_OR = normal(shape[0], rank // 2) @ Q_RR[0::2] / 10
    return Factors(A_RI.float(), B_OR.float(), compensated=False)
