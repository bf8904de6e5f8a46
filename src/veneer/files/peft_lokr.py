"""LoKr: the update is a Kronecker product of a small matrix and another, either of which may be a product itself.

The weight is cut into a × c blocks of b × d; `w1` (a, c) says how much of `w2` (b, d) each of them gets.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.files.peft_loha import lycoris_settings
from veneer.files.peft_method import Layout, Method, Parts, by_patterns
from veneer.files.peft_values import choice, show
from veneer.ops.low_rank import Factors, require_affordable, svd, svd_of_product

_NEAR_ROOT = -1

_W1: tuple[Layout, ...] = (
    {"lokr_w1": ("a", "c")},
    {"lokr_w1_a": ("a", "r"), "lokr_w1_b": ("r", "c")},
)
_W2: tuple[Layout, ...] = (
    {"lokr_w2": ("b", "d")},
    {"lokr_w2": ("b", "d", "k")},
    {"lokr_w2": ("b", "d", "k", "l")},
    {"lokr_w2_a": ("b", "r"), "lokr_w2_b": ("r", "d")},
    {"lokr_w2_a": ("r", "b"), "lokr_w2_b": ("r", "d"), "lokr_t2": ("r", "r", "k", "l")},
)
# Where w2 has three dimensions, PEFT's `torch.kron` takes w1 for (1, a, c), and the result is then read in the weight's
# shape: odd, but that is what such an adapter was trained with.
_PRODUCTS = {2: "ac,bd->abcd", 3: "ac,bdk->badck", 4: "ac,bdkl->abcdkl"}


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return how LoKr cuts a dimension: (number of blocks, size of a block).

    The number is the factor where that divides the size, else the largest divisor that is no more than it and no
    more than the root; -1 stands for no limit.

    Example:
        >>> factorization(256, -1), factorization(128, 4), factorization(127, -1), factorization(12, 5)
        ((16, 16), (4, 32), (1, 127), (3, 4))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == _NEAR_ROOT else max(1, min(factor, math.isqrt(size)))
    count = next(one for one in range(limit, 0, -1) if size % one == 0)
    return count, size // count


def _settings(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    factor = raw.get("decompose_factor", _NEAR_ROOT)
    if type(factor) is not int:
        problems.append(f"decompose_factor: expected a whole number, got {show(factor)}")
        factor = _NEAR_ROOT
    return lycoris_settings(raw, problems) | {
        "decompose_both": choice(raw, "decompose_both", (False, True), problems),
        "decompose_factor": factor,
    }


def _fits(parts: Parts, rank: int, settings: Mapping[str, Any]) -> list[str]:
    """Tell where the tensors are not cut and decomposed as the configuration says."""
    problems = []
    (a, c), full_w2 = _outer(parts), "lokr_w2" in parts
    b, d = _blocks(parts)
    factor = settings["decompose_factor"]
    if factorization(a * b, factor)[0] != a:
        problems.append(f"is cut into {a} rows of blocks; decompose_factor={factor} cuts {a * b} into others")
    # A convolution's kernel may lie flat in the last dimension of w2_b, and the file does not tell.
    if (full_w2 or "lokr_t2" in parts) and factorization(c * d, factor)[0] != c:
        problems.append(f"is cut into {c} columns of blocks; decompose_factor={factor} cuts {c * d} into others")
    decomposed = settings["decompose_both"] and rank < max(a, c) / 2
    if decomposed != ("lokr_w1_a" in parts):
        both = settings["decompose_both"]
        problems.append(f"w1 is {'full' if decomposed else 'decomposed'}, not as decompose_both={both} says")
    if full_w2 != (rank >= max(b, d) / 2):
        problems.append(f"w2 is {'full' if full_w2 else 'decomposed'}, which rank {rank} does not give")
    if "lokr_t2" in parts and not settings["use_effective_conv2d"]:
        problems.append("has lokr_t2, which use_effective_conv2d=False has not")
    return problems


def _w1(parts: Parts) -> Tensor:
    if "lokr_w1" in parts:
        return parts["lokr_w1"].double()
    return parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()


def _w2(parts: Parts) -> Tensor:
    if "lokr_w2" in parts:
        return parts["lokr_w2"].double()
    a, b = parts["lokr_w2_a"].double(), parts["lokr_w2_b"].double()
    if "lokr_t2" in parts:
        return torch.einsum("rskl,rb,sd->bdkl", parts["lokr_t2"].double(), a, b)
    return a @ b


def _blocks(parts: Parts) -> tuple[int, int]:
    """Return the first two sizes of w2, without forming it."""
    if "lokr_w2" in parts:
        b, d = parts["lokr_w2"].shape[:2]
        return b, d
    side = 1 if "lokr_t2" in parts else 0
    return parts["lokr_w2_a"].shape[side], parts["lokr_w2_b"].shape[1]


def _outer(parts: Parts) -> tuple[int, int]:
    """Return the sizes of w1, without forming it."""
    if "lokr_w1" in parts:
        a, c = parts["lokr_w1"].shape
        return a, c
    return parts["lokr_w1_a"].shape[0], parts["lokr_w1_b"].shape[1]


def _shape(parts: Parts) -> tuple[int, ...]:
    (a, c), (b, d) = _outer(parts), _blocks(parts)
    kernel = next((tuple(parts[name].shape[2:]) for name in ("lokr_w2", "lokr_t2") if name in parts), ())
    return (a * b, c * d, *kernel)


def _delta(parts: Parts, scaling: float) -> Tensor:
    """Return `scaling * kron(w1, w2)` as PEFT forms it."""
    w1, w2 = _w1(parts), _w2(parts)
    return scaling * torch.einsum(_PRODUCTS[w2.ndim], w1, w2).reshape(_shape(parts))


def _factors(parts: Parts, scaling: float, most: int | None) -> Factors | None:
    """Return the best factors from the singular values of the two small matrices.

    With w1 = U1 S1 V1 and w2 = U2 S2 V2, kron(w1, w2) = kron(U1, U2) kron(S1, S2) kron(V1, V2) is the singular value
    decomposition of the update: its largest values are picked before anything of the layer's size is formed.
    """
    if "lokr_w2" in parts and parts["lokr_w2"].ndim == 3:
        return None
    factored = "lokr_w1_a" in parts
    U1, S1, V1 = svd_of_product(parts["lokr_w1_a"], parts["lokr_w1_b"]) if factored else svd(parts["lokr_w1"])
    if "lokr_w2_a" in parts and "lokr_t2" not in parts:
        U2, S2, V2 = svd_of_product(parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        U2, S2, V2 = svd(_w2(parts).flatten(1))
    values, order = torch.sort(scaling * torch.outer(S1, S2).flatten(), descending=True, stable=True)
    kept = len(values) if most is None else min(most, len(values))
    require_affordable(kept, U1.shape[0] * U2.shape[0], V1.shape[1] * V2.shape[1])
    first, second = order[:kept] // max(1, len(S2)), order[:kept] % max(1, len(S2))
    root = values[:kept].sqrt()
    B = (U1[:, None, first] * U2[None, :, second]).flatten(0, 1) * root
    A = (V1[first][:, :, None] * V2[second][:, None, :]).flatten(1) * root[:, None]
    return Factors(B, A, float(torch.linalg.vector_norm(values[kept:])))


LOKR = Method(
    name="LoKr",
    layouts=tuple({**w1, **w2} for w1 in _W1 for w2 in _W2),
    keys=(
        "r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor",
    ),
    ignored=("rank_dropout", "module_dropout", "init_weights", "rank_dropout_scale"),
    settings=_settings,
    numbers=by_patterns,
    fits=_fits,
    shape=_shape,
    delta=_delta,
    factors=_factors,
)  # fmt: skip
"""LoKr (Yeh et al. 2023, arXiv:2309.14859; LyCORIS; PEFT 0.21.2 `tuners/lokr`)."""
