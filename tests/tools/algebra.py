"""Pairs and adapters for the tests of adapter algebra: every form of factors, at small sizes."""

import torch

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig

FORM_SHAPES = {
    "linear": lambda r: ((r, 6), (8, r)),
    "transposed": lambda r: ((r, 6), (8, r)),
    "embedding": lambda r: ((r, 9), (5, r)),
    "parameter": lambda r: ((r, 6), (8, r)),
    "attention_in": lambda r: ((r, 6), (18, r)),
    "attention_out": lambda r: ((r, 6), (6, r)),
    "conv": lambda r: ((2 * r, 3, 3, 2), (8, r, 1, 1)),  # two groups
    "conv_across": lambda r: ((2 * r, 6, 3), (8, r, 1)),
    "conv_transpose": lambda r: ((2 * r, 3, 2), (6, r, 1)),
    "experts": lambda r: ((3, r, 6), (3, 8, r)),
    "experts_by_position": lambda r: ((3, r, 6), (3, 8, r)),
}
"""Form to the shapes of A and B for a rank (of each group)."""


def pair_of(form: str, rank: int, seed: int, scaling: float = 1.0) -> LowRank:
    """Return random factors."""
    generator = torch.Generator().manual_seed(seed)
    shape_A, shape_B = FORM_SHAPES[form](rank)
    return LowRank(torch.randn(shape_A, generator=generator), torch.randn(shape_B, generator=generator), scaling, form)


def adapter_of(**modules: LowRank) -> Adapter:
    """Return an adapter of some modules."""
    config = LoRAConfig(
        rank=next(iter(modules.values())).rank, target_modules=sorted({p.split(".")[-1] for p in modules})
    )
    return Adapter(modules, config)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖; of nothing, ‖found‖."""
    norm = torch.linalg.vector_norm(expected.double()).item()
    return torch.linalg.vector_norm(found.double() - expected).item() / (norm or 1.0)
