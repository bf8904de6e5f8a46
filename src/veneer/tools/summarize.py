"""What an adapter is, said from its numbers alone."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from veneer.adapter import Adapter, LowRank
from veneer.factors import as_matrices


@dataclass(frozen=True)
class TargetSummary:
    """Modules alike: same last name, shape, rank and scaling.

    Args:
        name: Last part of their paths.
        count: How many there are.
        shape: (out, in) of the layers they update.
        rank: Inner dimension.
        scaling: The factor that is applied.
        num_parameters: Of all of them.
        num_bytes: Of all of them.
        norm: Root of the summed squared Frobenius norms of their deltas.
        untrained: How many have a `lora_B` that is all zero.
        form: What the axes of their factors are, see `veneer.factors`.
        has_magnitude: Whether they have magnitudes (DoRA), which the norm leaves out.
    """

    name: str
    count: int
    shape: tuple[int, int]
    rank: int
    scaling: float
    num_parameters: int
    num_bytes: int
    norm: float
    untrained: int
    form: str
    has_magnitude: bool


@dataclass(frozen=True)
class Summary:
    """What an adapter is.

    Args:
        digest: Its identity.
        base: Name of the base model.
        base_fingerprint: Digest of the base's weights.
        row_format: Kind of rows it was trained on.
        dtypes: Dtypes of its tensors.
        ranks: Ranks of its modules, sorted.
        num_modules: How many layers it updates.
        num_parameters: How many numbers it holds.
        num_bytes: How many bytes they take.
        norm: Frobenius norm of the whole update.
        targets: Modules alike, together.
        trained: Path and shape of whatever trained whole, rows of tokens included.
    """

    digest: str
    base: str | None
    base_fingerprint: str | None
    row_format: str | None
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    num_modules: int
    num_parameters: int
    num_bytes: int
    norm: float
    targets: tuple[TargetSummary, ...]
    trained: tuple[tuple[str, tuple[int, ...]], ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def summarize(adapter: Adapter) -> Summary:
    """Say what an adapter is: base, ranks, targets, sizes, norms, digest.

    Cost:
        Of the order of rank² · (in + out) for each module; no delta is formed.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)
        >>> round(summarize(Adapter({"0": pair}, LoRAConfig(rank=1))).norm, 4)
        1.7321
    """
    groups: dict[tuple[Any, ...], list[LowRank]] = {}
    for path, pair in adapter.modules.items():
        key = (path.rpartition(".")[2], pair.sizes, pair.rank, pair.scaling, pair.form, pair.magnitude is not None)
        groups.setdefault(key, []).append(pair)
    targets = tuple(_target(key, alike) for key, alike in groups.items())
    return Summary(
        digest=adapter.digest,
        base=adapter.metadata.base,
        base_fingerprint=adapter.metadata.base_fingerprint,
        row_format=adapter.metadata.row_format,
        dtypes=tuple(sorted({str(one.dtype).removeprefix("torch.") for one in adapter.tensors().values()})),
        ranks=tuple(sorted({pair.rank for pair in adapter.modules.values()})),
        num_modules=len(adapter.modules),
        num_parameters=adapter.num_parameters,
        num_bytes=adapter.num_bytes,
        norm=math.hypot(*(target.norm for target in targets)),
        targets=targets,
        trained=(
            *((path, tuple(one.shape)) for path, one in adapter.trained.items()),
            *(
                (f"{path} (rows of {len(one.indices)} tokens)", tuple(one.rows.shape))
                for path, one in adapter.tokens.items()
            ),
        ),
    )


def delta_norm(pair: LowRank) -> float:
    """Return the Frobenius norm of a module's delta, without forming it.

    Equals `torch.linalg.norm(pair.delta())`: ‖sBA‖² = s² · tr((BᵀB)(AAᵀ)), in float64.

    Example:
        >>> delta_norm(LowRank(torch.ones(1, 3), torch.ones(4, 1), scaling=1.0)) == 12**0.5
        True

    Source:
        research: papers.md 4.3.
    """
    A, B = as_matrices(pair.form, pair.lora_A.double(), pair.lora_B.double())
    return abs(pair.scaling) * math.sqrt(max(0.0, torch.sum((B.mT @ B) * (A @ A.mT)).item()))


def _target(key: tuple[Any, ...], alike: Sequence[LowRank]) -> TargetSummary:
    name, shape, rank, scaling, form, has_magnitude = key
    tensors = [tensor for pair in alike for tensor in pair.tensors().values()]
    return TargetSummary(
        name=name,
        count=len(alike),
        shape=shape,
        rank=rank,
        scaling=scaling,
        num_parameters=sum(one.numel() for one in tensors),
        num_bytes=sum(one.numel() * one.element_size() for one in tensors),
        norm=math.hypot(*(delta_norm(pair) for pair in alike)),
        untrained=sum(not pair.lora_B.any() for pair in alike),
        form=form,
        has_magnitude=has_magnitude,
    )
