"""How two adapters relate: where their updates point, and what two of no relation would give.

Shapes: O out, I in, R and S the ranks of the two, M matrices of a stack.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.factors import as_matrices
from veneer.ops.low_rank import svd_of_product

_LIKE_MATRICES = ("linear", "transposed", "parameter", "attention_in", "attention_out")
"""Forms whose factors mean the same: which of them a file says depends on the tool that wrote it."""


@dataclass(frozen=True)
class Spaces:
    """How the spans of two updates lie to each other, on one side.

    Args:
        cosines: Of the principal angles, the largest first: 1 for a direction that both have.
        overlap: φ = ‖U₁ᵀU₂‖² / min(R, S), from 0 to 1: the share of the smaller span that lies in the other.
        strongest: The same of the strongest direction of each alone, φ(1, 1).
        chance: What `overlap` is on average for two random spans of these sizes: max(R, S) / n, exactly.
        chance_largest: What the largest cosine is for two random spans, in the limit of large ones.
    """

    cosines: tuple[float, ...]
    overlap: float
    strongest: float
    chance: float
    chance_largest: float


@dataclass(frozen=True)
class ModuleRelation:
    """How two updates of one module relate.

    Args:
        path: Its path.
        shape: (out, in).
        ranks: Of the two.
        norms: Frobenius norms of the two deltas.
        cosine: Of the two deltas as vectors; None where one is zero.
        chance: What the cosine of two random ones scatters by around zero (one standard deviation).
        columns: Of what they write: the spans of the outputs; None where one is zero.
        rows: Of what they read: the spans of the inputs; None where one is zero.
    """

    path: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    chance: float
    columns: Spaces | None
    rows: Spaces | None


@dataclass(frozen=True)
class Relation:
    """How two adapters relate; magnitudes (DoRA) have no part in it.

    Args:
        equal: Whether they are the same adapter, by their digests.
        norms: Frobenius norms of the two whole updates, modules that only one has included.
        cosine: Of the two whole updates as vectors, a missing module counting as zero; None where one is zero.
        chance: What the cosine of two random ones with these norms scatters by around zero.
        modules: Those that both have in one shape.
        only_first: Modules, trained parameters and tables that only the first has.
        only_second: Those that only the second has.
        unlike: Modules that both have, with why they cannot be compared.
        trained: Path of what trained whole in both, and ‖a - b‖ / ‖a‖ of its values.
    """

    equal: bool
    norms: tuple[float, float]
    cosine: float | None
    chance: float
    modules: tuple[ModuleRelation, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unlike: tuple[tuple[str, str], ...]
    trained: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def relate(first: Adapter, second: Adapter) -> Relation:
    """Say how two adapters relate: cosines of their deltas, angles between their spans, and what chance would give.

    Raises:
        AdapterError: If products of a module's factors leave the range of float64.

    Cost:
        Of the order of R² · (in + out) for each module; no delta is formed.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> one = Adapter({"q": LowRank(torch.eye(4)[:1], torch.ones(4, 1), 1.0)}, LoRAConfig(rank=1))
        >>> two = Adapter({"q": LowRank(torch.eye(4)[1:2], torch.ones(4, 1), 1.0)}, LoRAConfig(rank=1))
        >>> found = relate(one, two).modules[0]
        >>> found.cosine, round(found.columns.overlap, 9), found.rows.overlap
        (0.0, 1.0, 0.0)

    Source:
        φ: Hu et al. 2021, LoRA, arXiv:2106.09685, section 7.2 and appendix G. Differs: of the update's own singular
        vectors, scaled by both factors, where the paper takes those of one factor; with the baseline in closed form.
    """
    names = [{*one.modules, *one.trained, *one.tokens} for one in (first, second)]
    modules, unlike = [], []
    for path in sorted(set(first.modules) & set(second.modules)):
        one, other = first.modules[path], second.modules[path]
        if why := _unlike(one, other):
            unlike.append((path, why))
            continue
        try:
            modules.append(_relate(path, one, other))
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}") from None
    norms = (_norm(first), _norm(second))
    inner = math.fsum(one.cosine * math.prod(one.norms) for one in modules if one.cosine is not None)
    scatter = math.hypot(*(one.chance * math.prod(one.norms) for one in modules))
    product = math.prod(norms)
    return Relation(
        equal=first.digest == second.digest,
        norms=norms,
        cosine=inner / product if product else None,
        chance=scatter / product if product else 0.0,
        modules=tuple(modules),
        only_first=tuple(sorted(names[0] - names[1])),
        only_second=tuple(sorted(names[1] - names[0])),
        unlike=tuple(unlike),
        trained=tuple(
            (path, _distance(first.trained[path], second.trained[path]))
            for path in first.trained
            if path in second.trained and first.trained[path].shape == second.trained[path].shape
        ),
    )


def delta_inner(one: LowRank, other: LowRank) -> float:
    """Return the inner product of two deltas of one shape, without forming them.

    Equals `torch.sum(one.delta() * other.delta())`: s₁ s₂ · tr((B₁ᵀB₂)(A₂A₁ᵀ)), in float64.

    Example:
        >>> one = LowRank(torch.ones(1, 3), torch.ones(4, 1), scaling=2.0)
        >>> delta_inner(one, one)
        48.0

    Source:
        research: papers.md 4.3.
    """
    return math.fsum(one.scaling * other.scaling * value for value in _inner(one, other).tolist())


def chance_overlap(first: Sequence[int], second: Sequence[int], size: int) -> float:
    """Return the mean overlap of random spans: E ‖U₁ᵀU₂‖² = R · S / n for each matrix of a stack.

    Args:
        first: Dimension of the first span, for each matrix.
        second: That of the second.
        size: n, the dimension of the space.

    Example:
        >>> chance_overlap([8], [4], 64)
        0.125
    """
    mean = math.fsum(R * S / size for R, S in zip(first, second, strict=True))
    return mean / min(sum(first), sum(second))


def chance_largest(first: int, second: int, size: int) -> float:
    """Return the largest cosine of the principal angles between two random spans, in the limit of large ones.

    With a = R/n and b = S/n: √(a(1 - b)) + √(b(1 - a)), and 1 from a + b = 1 on. Of small spans it is less on
    average, by a fifth at ranks of 6 and 3.

    Example:
        >>> round(chance_largest(16, 16, 4096), 4), chance_largest(3, 2, 4)
        (0.1248, 1.0)

    Source:
        Wachter 1980, "The limiting empirical measure of multiple discriminant ratios": the edge of the spectrum.
    """
    a, b = first / size, second / size
    return 1.0 if a + b >= 1 else math.sqrt(a * (1 - b)) + math.sqrt(b * (1 - a))


def _relate(path: str, one: LowRank, other: LowRank) -> ModuleRelation:
    (U, S, V), (U2, S2, V2) = _decompose(one), _decompose(other)
    squares, squares2 = ([float(torch.sum(part**2)) for part in parts] for parts in (S, S2))
    norms = (math.sqrt(math.fsum(squares)), math.sqrt(math.fsum(squares2)))
    product, (outs, ins) = math.prod(norms), one.sizes
    # Rotations drawn at random make the inner product of two matrices scatter by ‖D₁‖ ‖D₂‖ / √(O · I).
    scatter = math.sqrt(math.fsum(a * b for a, b in zip(squares, squares2, strict=True)) / (outs * ins))
    sizes = (U[0].shape[0], V[0].shape[1])
    return ModuleRelation(
        path=path,
        shape=one.sizes,
        ranks=(one.rank, other.rank),
        norms=norms,
        cosine=max(-1.0, min(1.0, delta_inner(one, other) / product)) if product else None,
        chance=scatter / product if product else 0.0,
        columns=_spaces(U, U2, sizes[0]) if product else None,
        rows=_spaces([part.mT for part in V], [part.mT for part in V2], sizes[1]) if product else None,
    )


def _decompose(pair: LowRank) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return U, S and V of each matrix of a delta, without what is zero."""
    A_MRI, B_MOR = as_matrices(pair.form, pair.lora_A, pair.lora_B)
    found = [svd_of_product(B_OR, A_RI) for A_RI, B_OR in zip(A_MRI, B_MOR, strict=True)]
    return [U for U, _, _ in found], [abs(pair.scaling) * S for _, S, _ in found], [V for _, _, V in found]


def _spaces(first: Sequence[Tensor], second: Sequence[Tensor], size: int) -> Spaces:
    """Return how the spans of orthonormal columns lie, those of a stack taken together."""
    products = [one.mT @ other for one, other in zip(first, second, strict=True)]
    cosines = sorted(
        (min(1.0, value) for one in products for value in torch.linalg.svdvals(one).tolist()), reverse=True
    )
    ranks, ranks2 = [one.shape[1] for one in first], [one.shape[1] for one in second]
    tops = [float(one[0, 0] ** 2) for one in products if one.numel()]
    return Spaces(
        cosines=tuple(cosines),
        overlap=math.fsum(value**2 for value in cosines) / min(sum(ranks), sum(ranks2)),
        strongest=math.fsum(tops) / len(tops) if tops else 0.0,
        chance=chance_overlap(ranks, ranks2, size),
        chance_largest=max(chance_largest(R, S, size) for R, S in zip(ranks, ranks2, strict=True)),
    )


def _inner(one: LowRank, other: LowRank) -> Tensor:
    """Return tr((B₁ᵀB₂)(A₂A₁ᵀ)) for each matrix of a stack."""
    A, B = as_matrices(one.form, one.lora_A.double(), one.lora_B.double())
    A2, B2 = as_matrices(other.form, other.lora_A.double(), other.lora_B.double())
    return torch.sum((B.mT @ B2) * (A @ A2.mT), (-2, -1))


def _unlike(one: LowRank, other: LowRank) -> str | None:
    """Return why two updates cannot be compared, or None."""
    if one.form != other.form and not {one.form, other.form} <= set(_LIKE_MATRICES):
        return f"its factors are of form {one.form!r} and {other.form!r}"
    shapes = [as_matrices(pair.form, pair.lora_A, pair.lora_B) for pair in (one, other)]
    first, second = ((B.shape[0], B.shape[1], A.shape[2]) for A, B in shapes)
    return None if first == second else f"(matrices, out, in) are {first} and {second}"


def _norm(adapter: Adapter) -> float:
    return math.sqrt(math.fsum(max(0.0, delta_inner(pair, pair)) for pair in adapter.modules.values()))


def _distance(one: Tensor, other: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(one.double()))
    difference = float(torch.linalg.vector_norm(one.double() - other.double()))
    return difference / norm if norm else float(difference > 0)
