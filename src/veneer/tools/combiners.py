"""The rules by which updates of several adapters are joined, element by element; the spaces that they act in.

For the updates D_1 … D_n of one matrix, weights w_i and a density d:

    trim(D)   keeps the d · size entries of D that are largest in magnitude, zero elsewhere
    draw(D)   keeps each entry with probability d, divided by d, zero elsewhere

    magnitude_prune   Σ w_i trim(D_i)
    dare_linear       Σ w_i draw(D_i)
    ties              elect(trim(D_1), …), the mean over the adapters that agree with the elected sign:
                      s = sign(Σ T_i) with sign(0) = 1;  Σ_i w_i T_i [sign(T_i) = s] / max(1, Σ_i [sign(T_i) = s])
    dare_ties         elect(draw(D_1), …)

Shapes: O out, I in. A matrix is computed by blocks of rows, each time anew, and never held.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from veneer.ops.low_rank import RowBlocks

Prune = Callable[[RowBlocks, float, str], RowBlocks]
"""Makes a matrix sparse; gets the density and a key that fixes what is drawn."""

Join = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Joins the same entries of several matrices, with their weights."""

_HALF = 1 << 16


@dataclass(frozen=True)
class Rule:
    """One rule that acts on each entry by itself.

    Args:
        prune: What is done to each adapter's update.
        join: How they become one.
        density: The share of entries that stays where nothing else is said.
        averages: Whether it takes means, so that weights of 1 are its plain form, rather than sums.
    """

    prune: Prune
    join: Join
    density: float
    averages: bool


def trimmed(delta: RowBlocks, density: float, key: str) -> RowBlocks:  # noqa: ARG001 (nothing is drawn)
    """Return a matrix with its largest entries alone; those as large as the last of them, in float32, stay too.

    Cost:
        Two passes over the matrix for the threshold, which is exact, and its own later.

    Example:
        >>> delta = RowBlocks((1, 4), lambda start, stop: torch.tensor([[1.0, -4.0, 3.0, 0.5]]).double(), 1)
        >>> trimmed(delta, 0.5, "").block(0, 1).tolist()
        [[0.0, -4.0, 3.0, 0.0]]

    Source:
        Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3. Differs: each matrix is trimmed by itself, as in
        PEFT, and not all of the model at once.
    """
    count = max(1, int(density * delta.shape[0] * delta.shape[1]))
    if density >= 1:
        return delta
    least = kth_magnitude(delta, count)

    def block(start: int, stop: int) -> Tensor:
        values = delta.block(start, stop)
        return torch.where(values.abs().float() >= least, values, 0.0)

    return RowBlocks(delta.shape, block, delta.rows)


def drawn(delta: RowBlocks, density: float, key: str) -> RowBlocks:
    """Return a matrix with each entry kept by a draw, and divided by the density, so that its mean stays.

    Which entries stay depends on the key and the shape alone.

    Example:
        >>> ones = RowBlocks((2, 8), lambda start, stop: torch.ones(stop - start, 8).double(), 1)
        >>> sorted(set(drawn(ones, 0.5, "seed 0").block(0, 1).flatten().tolist()))
        [0.0, 2.0]

    Source:
        Yu et al. 2023, DARE, arXiv:2311.03099, section 3.
    """
    if density >= 1:
        return delta

    def block(start: int, stop: int) -> Tensor:
        values = delta.block(start, stop)
        digest = hashlib.sha256(f"{key}\0{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        stays = torch.rand(values.shape, generator=generator) < density
        return torch.where(stays, values / density, 0.0)

    return RowBlocks(delta.shape, block, delta.rows)


def total(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_i T_i.

    Example:
        >>> total([torch.ones(2), torch.ones(2)], [1.0, -0.5]).tolist()
        [0.5, 0.5]
    """
    out = values[0] * weights[0]
    for one, weight in zip(values[1:], weights[1:], strict=True):
        out.add_(one, alpha=weight)
    return out


def elected(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the entries that have the sign of the sum, as many as there are.

    Example:
        >>> elected([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 3.0])], [1.0, 1.0]).tolist()
        [3.0, 2.0]

    Source:
        Yadav et al. 2023, arXiv:2306.01708, sections 3.2 and 3.3; weights as PEFT 0.21 has them: after the election.
    """
    sign = torch.where(sum(values[1:], values[0]) >= 0, 1.0, -1.0)
    out, count = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for one, weight in zip(values, weights, strict=True):
        agrees = one.sign() == sign
        out += torch.where(agrees, one * weight, 0.0)
        count += agrees
    return out / count.clamp_min(1.0)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "ties": Rule(trimmed, elected, density=0.2, averages=True),
        "magnitude_prune": Rule(trimmed, total, density=0.2, averages=False),
        "dare_linear": Rule(drawn, total, density=0.1, averages=False),
        "dare_ties": Rule(drawn, elected, density=0.1, averages=True),
    }
)
"""The rules by name. What adds updates as they are is `linear`, which needs no entries: see `combine`."""


def joined(
    rule: Rule, deltas: Sequence[RowBlocks], weights: Sequence[float], density: float, keys: Sequence[str]
) -> RowBlocks:
    """Return the matrix that a rule makes of several of one shape.

    Example:
        >>> eye = RowBlocks((2, 2), lambda start, stop: torch.eye(2).double()[start:stop], 2)
        >>> joined(RULES["magnitude_prune"], [eye, eye], [1.0, 0.5], 0.5, ["", ""]).block(0, 1).tolist()
        [[1.5, 0.0]]
    """
    pruned = [rule.prune(delta, density, key) for delta, key in zip(deltas, keys, strict=True)]

    def block(start: int, stop: int) -> Tensor:
        return rule.join([one.block(start, stop) for one in pruned], weights)

    return RowBlocks(deltas[0].shape, block, deltas[0].rows)


def kth_magnitude(delta: RowBlocks, count: int) -> float:
    """Return the magnitude of the entry that is the `count`-th largest, in float32, without sorting or holding them.

    Equals `delta.float().abs().flatten().sort(descending=True).values[count - 1]`: the bits of a float without a sign
    rise with its value, so that counting the upper half of them and then the lower finds it.

    Example:
        >>> row = RowBlocks((1, 3), lambda start, stop: torch.tensor([[1.0, -3.0, 2.0]]).double(), 1)
        >>> kth_magnitude(row, 2)
        2.0
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)
    for _, block in delta.blocks():
        upper += torch.bincount(_bits(block) >> 16, minlength=_HALF)
    high, above = _place(upper, count)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for _, block in delta.blocks():
        bits = _bits(block)
        lower += torch.bincount(bits[bits >> 16 == high] & (_HALF - 1), minlength=_HALF)
    low, _ = _place(lower, count - above)
    return torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32).item()


def _bits(block: Tensor) -> Tensor:
    return block.abs().float().flatten().view(torch.int32)


def _place(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `wanted`-th largest, and how many lie in bins above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < wanted).sum())
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0
