"""What an adapter is, said from its numbers alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.names import last_name
from veneer.tools.spectrum import Spectrum, spectrum


@dataclass(frozen=True)
class ModuleSummary:
    """One module.

    Args:
        path: Its path.
        shape: (out, in) of the layer it updates.
        form: What the axes of its factors are, see `veneer.factors`.
        rank: Inner dimension.
        scaling: The factor that is applied.
        num_parameters: How many numbers it holds.
        num_bytes: How many bytes they take.
        norm: Frobenius norm of its delta.
        share: Its part of the whole update's squared norm.
        relative: Its norm over that of the base's weight, where that is known.
        singular_values: Of its delta, the largest first.
        effective_rank: exp of the entropy of the squared singular values' shares.
        stable_rank: Squared norm over the largest squared singular value.
        untrained: Whether its `lora_B` is all zero.
        has_magnitude: Whether it has a magnitude (DoRA), which the norm leaves out.
    """

    path: str
    shape: tuple[int, int]
    form: str
    rank: int
    scaling: float
    num_parameters: int
    num_bytes: int
    norm: float
    share: float
    relative: float | None
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    untrained: bool
    has_magnitude: bool


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
        share: Their part of the whole update's squared norm.
        relative: Their norm over that of the base's weights, where all of them are known.
        effective_rank: Mean of those of the modules.
        stable_rank: Mean of those of the modules.
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
    share: float
    relative: float | None
    effective_rank: float
    stable_rank: float
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
        modules: Each module, by its path.
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
    modules: tuple[ModuleSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)

    def changed_most(self, count: int = 5) -> tuple[ModuleSummary, ...]:
        """Return the modules that it changes most: relative to the base's weights where all are known, else by norm."""
        known = all(one.relative is not None for one in self.modules)
        order = sorted(self.modules, key=lambda one: -(one.relative or 0.0) if known else -one.norm)
        return tuple(order[:count])


def summarize(adapter: Adapter, weight_norms: Mapping[str, float] | None = None) -> Summary:
    """Say what an adapter is: base, ranks, targets, sizes, norms, spectra, digest.

    Args:
        adapter: The adapter.
        weight_norms: Module path to the Frobenius norm of the base's weight, see `veneer.tools.check_base`.

    Raises:
        AdapterError: If products of a module's factors leave the range of float64.

    Cost:
        Of the order of rank² · (in + out) for each module; no delta is formed.

    Example:
        >>> import torch
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)
        >>> round(summarize(Adapter({"0": pair}, LoRAConfig(rank=1))).norm, 4)
        1.7321
    """
    spectra = {path: _spectrum(path, pair) for path, pair in adapter.modules.items()}
    norm = math.hypot(*(one.norm for one in spectra.values()))
    norms = weight_norms or {}
    modules = tuple(_module(path, pair, spectra[path], norm, norms.get(path)) for path, pair in adapter.modules.items())
    groups: dict[tuple[Any, ...], list[ModuleSummary]] = {}
    for one in modules:
        key = (last_name(one.path), one.shape, one.rank, one.scaling, one.form, one.has_magnitude)
        groups.setdefault(key, []).append(one)
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
        norm=norm,
        targets=tuple(_target(key[0], alike, norms) for key, alike in groups.items()),
        trained=(
            *((path, tuple(one.shape)) for path, one in adapter.trained.items()),
            *(
                (f"{path} (rows of {len(one.indices)} tokens)", tuple(one.rows.shape))
                for path, one in adapter.tokens.items()
            ),
        ),
        modules=modules,
    )


def _spectrum(path: str, pair: LowRank) -> Spectrum:
    try:
        return spectrum(pair)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error.message}") from None


def _module(path: str, pair: LowRank, spectrum: Spectrum, norm: float, weight_norm: float | None) -> ModuleSummary:
    tensors = pair.tensors().values()
    return ModuleSummary(
        path=path,
        shape=pair.sizes,
        form=pair.form,
        rank=pair.rank,
        scaling=pair.scaling,
        num_parameters=sum(one.numel() for one in tensors),
        num_bytes=sum(one.numel() * one.element_size() for one in tensors),
        norm=spectrum.norm,
        share=_part(spectrum.norm, norm) ** 2,
        relative=None if weight_norm is None else _part(spectrum.norm, weight_norm),
        singular_values=spectrum.values,
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
        untrained=not bool(pair.lora_B.any()),
        has_magnitude=pair.magnitude is not None,
    )


def _target(name: str, alike: Sequence[ModuleSummary], norms: Mapping[str, float]) -> TargetSummary:
    first, norm = alike[0], math.hypot(*(one.norm for one in alike))
    known = [norms[one.path] for one in alike if one.path in norms]
    return TargetSummary(
        name=name,
        count=len(alike),
        shape=first.shape,
        rank=first.rank,
        scaling=first.scaling,
        num_parameters=sum(one.num_parameters for one in alike),
        num_bytes=sum(one.num_bytes for one in alike),
        norm=norm,
        share=math.fsum(one.share for one in alike),
        relative=_part(norm, math.hypot(*known)) if len(known) == len(alike) else None,
        effective_rank=math.fsum(one.effective_rank for one in alike) / len(alike),
        stable_rank=math.fsum(one.stable_rank for one in alike) / len(alike),
        untrained=sum(one.untrained for one in alike),
        form=first.form,
        has_magnitude=first.has_magnitude,
    )


def _part(value: float, whole: float) -> float:
    return value / whole if whole else 0.0
