"""An adapter at another rank: the best approximation of each update, by the factors alone.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError, ConfigError
from veneer.files.peft_values import MAX_RANK
from veneer.ops.low_rank import balanced, svd_of_product
from veneer.tools.made_card import made_card
from veneer.tools.stacks import (
    Closeness,
    built,
    closeness_json,
    dora_problems,
    evened_attention,
    plain_config,
    rank_of_each,
    scaled_config,
    stack_of,
    whole,
)

_ROUNDING = 1e-12
"""What the share of a norm can be short of 1 by, with nothing left out."""


@dataclass(frozen=True)
class Resizing:
    """An adapter at another rank, with how near it is to what it was.

    Args:
        adapter: The adapter.
        modules: Module path to how near its update is to the one before.
        source: Digest of the adapter before.
        asked: The rank or the energy that was asked for, and whether it was spread over all modules.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2), 1.0)
        >>> resize(Adapter({"q": pair}, LoRAConfig(rank=2, target_modules=["q"])), rank=1).total.error
        0.6
    """

    adapter: Adapter
    modules: Mapping[str, Closeness]
    source: str
    asked: Mapping[str, object]

    @property
    def total(self) -> Closeness:
        """All modules together."""
        return whole(self.modules.values())

    def to_json(self) -> dict[str, object]:
        """Return what was done and how near it is as plain values."""
        made = {"digest": self.adapter.digest, "num_bytes": self.adapter.num_bytes}
        how = {"of": [{"digest": self.source}], "options": dict(self.asked)}
        return {**made, **how, **closeness_json(self.modules)}

    def card(self, name: str) -> str:
        """Return the README of the adapter; the name says where the one before came from."""
        rows = [{"adapter": name, "digest": f"`{self.source}`"}]
        return made_card(self.adapter, "Resized from another adapter.", rows, self.asked, self.total.error)


def resize(adapter: Adapter, *, rank: int | None = None, energy: float | None = None, spread: bool = False) -> Resizing:
    """Return the adapter with the best updates of a rank, or of the least rank that keeps a share of the energy.

    The energy of an update is its squared Frobenius norm, the sum of its σ². What is left out of an update D is
    measured: ‖D' − D‖ = √(Σ of the σ² left out), rounding to the result's dtype besides.

    Args:
        adapter: The adapter. What trained whole goes along as it is.
        rank: Highest rank of a module, of each expert in a stack, of all groups of a convolution together. A module
            of this rank or less stays as it is.
        energy: Share of the energy to keep, above 0 and at most 1.
        spread: Give ranks to modules by need: the largest σ² of all are kept, as many as `rank` times the number of
            modules, or until `energy` of all modules' is reached. Each keeps one at least.

    Raises:
        ConfigError: If not exactly one of rank and energy is given, or out of range.
        AdapterError: If there is no module, an update is not finite, or modules have magnitudes (DoRA); all at once.

    Cost:
        Of the order of R² · (O + I) operations a module; no update is formed.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2), 1.0)
        >>> found = resize(Adapter({"q": pair}, LoRAConfig(rank=2, target_modules=["q"])), energy=0.6)
        >>> found.adapter.modules["q"].rank, round(found.total.kept, 6)
        (1, 0.64)

    Source:
        Eckart and Young 1936, by QR of both factors and an SVD of the core (research: papers.md 4.3). The energy rule
        is kohya's `sv_fro`, squared.
    """
    _check(adapter, rank, energy)
    modules: dict[str, LowRank] = {}
    closeness: dict[str, Closeness] = {}
    problems = []
    budget = _spread(adapter, rank, energy) if spread else None
    for path, pair in adapter.modules.items():
        try:
            most = rank if budget is None else budget.get(path)
            modules[path], closeness[path] = _resized(pair, most, energy)
        except AdapterError as error:
            problems.append(f"{path}: {error.message}")
    if problems:
        raise AdapterError("this adapter cannot be resized", problems)
    modules = evened_attention(modules)
    config = scaled_config(plain_config(adapter.config), modules)
    asked = {"rank": rank, "energy": energy, "spread": spread}
    return Resizing(replace(adapter, modules=modules, config=config), closeness, adapter.digest, asked)


def _check(adapter: Adapter, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("give rank or energy, one of them")
    if rank is not None and not (type(rank) is int and 1 <= rank <= MAX_RANK):
        raise ConfigError(f"rank: expected a whole number from 1 to {MAX_RANK}, got {rank!r}")
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise ConfigError(f"energy: expected a number above 0 and at most 1, got {energy!r}")
    if not adapter.modules:
        raise AdapterError("this adapter cannot be resized", ["it has no factors, only what trained whole"])
    if problems := dora_problems(adapter, "ADAPTER"):
        raise AdapterError("this adapter cannot be resized", problems)


def _resized(pair: LowRank, rank: int | None, energy: float | None) -> tuple[LowRank, Closeness]:
    """Return a module's pair cut to a rank, or to an energy without one; one that is not above it as it is."""
    triples = _triples(pair)
    norms = [torch.linalg.vector_norm(S).item() for _, S, _ in triples]
    if rank is None:
        most = _kept(_levels(triples), energy)
        rank = most * (len(triples) if pair.form.startswith("conv") else 1)
    else:
        most = rank_of_each(pair.form, rank, len(triples))
    if rank >= pair.rank:
        return replace(pair, frozen_rank=0), Closeness(pair.rank, pair.rank, math.hypot(*norms), 0.0)
    return built(pair, [balanced(*one, most) for one in triples], norms, pair.rank)


def _triples(pair: LowRank) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [svd_of_product(B, A) for B, A in stack_of(pair)]


def _levels(triples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return the energy of each rank of a module: that of all its matrices together, falling."""
    most = max(len(S) for _, S, _ in triples)
    padded = [torch.nn.functional.pad(S.square(), (0, most - len(S))) for _, S, _ in triples]
    return torch.stack(padded).sum(0)


def _kept(levels: Tensor, energy: float | None) -> int:
    """Return the least rank that keeps a share of the energy."""
    if energy is None or not len(levels):
        return 1
    reached = levels.cumsum(0) >= min(energy, 1 - _ROUNDING) * levels.sum()
    return int(reached.int().argmax()) + 1


def _spread(adapter: Adapter, rank: int | None, energy: float | None) -> dict[str, int]:
    """Return each module's rank where the largest energies of all are kept.

    A convolution's groups share a level, which costs as many ranks as there are groups.
    """
    paths, levels, costs = [], [], []
    for path, pair in adapter.modules.items():
        with suppress(AdapterError):  # told with all others when it is cut
            triples = _triples(pair)
            paths.append(path)
            levels.append(_levels(triples))
            costs.append(len(triples) if pair.form.startswith("conv") else 1)
    owner = torch.cat([torch.full((len(one),), place) for place, one in enumerate(levels)])
    each = torch.tensor(costs)[owner]
    values = torch.cat(levels) / each
    order = values.argsort(descending=True, stable=True)
    if rank is not None:
        count = int((each[order].cumsum(0) <= rank * len(paths)).sum())
    else:
        count = _kept((values * each)[order], energy)
    # Each module's energies fall, so that those kept of it are its first.
    counts = torch.bincount(owner[order[:count]], minlength=len(paths))
    return {path: max(1, int(one)) * cost for path, one, cost in zip(paths, counts, costs, strict=True)}
