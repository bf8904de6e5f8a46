"""An adapter of another method as a plain LoRA adapter, with the error that this makes.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.factors import conv_groups, row_axes
from veneer.files.peft_method import ModuleUpdate
from veneer.files.peft_other import OtherAdapter
from veneer.files.peft_values import MAX_RANK
from veneer.ops.dora import magnitude_ratio
from veneer.ops.low_rank import (
    Factors,
    RowBlocks,
    balanced,
    best_of_rows,
    block_rows,
    evened,
    product_norm,
    rounding,
    svd,
    svd_of_product,
)
from veneer.tools.stacks import built, plain_config, scaled_config

MAX_DENSE = 1 << 28
MAX_VALUES = 1 << 29
_WITH_MAGNITUDES = ("linear", "transposed", "embedding", "conv", "conv_across")


@dataclass(frozen=True)
class Conversion:
    """A LoRA adapter made of another one.

    Args:
        adapter: The adapter; every scaling is 1, the factors are float32.
        errors: Module path to ‖B A − delta‖ / ‖delta‖ in the Frobenius norm, rounding to float32 included.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        >>> Conversion(Adapter({"q": pair, "v": pair}, LoRAConfig(rank=1)), {"q": 1e-8, "v": 0.2}).worst
        0.2
    """

    adapter: Adapter
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest error of all modules."""
        return max(self.errors.values())


def to_lora(other: OtherAdapter, *, rank: int | None = None) -> Conversion:
    """Return the LoRA adapter that does what an adapter of another method does, or the nearest one of a rank.

    Without a rank the update stays what it is but for rounding: VeRA keeps its rank, AdaLoRA loses what was pruned,
    LoHa takes rank r² and LoKr the product of its halves' ranks (never more than the layer's own). With a rank,
    each module gets the best product of at most that rank.

    Args:
        other: What `read_other` read.
        rank: Highest rank of a module.

    Raises:
        AdapterError: If a layer is a convolution whose kernel is larger than one, an update is not finite in float32,
            or the result would be too large; every problem is listed.

    Cost:
        For a rank: of the order of R² · (out + in) of the method's own R; no update is formed, except where the
        method has no factors of less than the layer's own rank, which takes its singular value decomposition.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> from veneer.files.peft_adalora import ADALORA
        >>> parts = {"lora_A": torch.eye(2, 3), "lora_B": torch.eye(4, 2), "lora_E": torch.tensor([[3.0], [4.0]])}
        >>> update = ModuleUpdate(ADALORA, parts, scaling=0.5, shape=(4, 3))
        >>> other = OtherAdapter("adalora", {"q": update}, {}, LoRAConfig(target_modules=["q"]))
        >>> found = to_lora(other, rank=1)
        >>> found.adapter.modules["q"].delta()[1, 1].round(decimals=6), round(found.worst, 6)
        (tensor(2., dtype=torch.float64), 0.6)

    Source:
        Eckart and Young 1936, by QR of both factors and an SVD of the core (research: papers.md 4.3).
    """
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"rank: expected a whole number from 1 to {MAX_RANK}, got {rank!r}")
    pairs: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    problems: list[str] = []
    values = 0
    for path, update in other.modules.items():
        try:
            pairs[path], errors[path] = _convert(update, rank)
        except AdapterError as error:
            problems.append(f"{path}: {error.message}")
            continue
        values += pairs[path].lora_A.numel() + pairs[path].lora_B.numel()
        if values > MAX_VALUES:
            problems.append(f"the adapter would hold over {MAX_VALUES} values; give a lower rank")
            break
    if problems:
        raise AdapterError(f"this {other.method} adapter cannot become a LoRA adapter", problems)
    return Conversion(Adapter(pairs, scaled_config(other.config, pairs), dict(other.trained), other.metadata), errors)


def _convert(update: ModuleUpdate, rank: int | None) -> tuple[LowRank, float]:
    """Return a module's factors in float32 and their relative error."""
    if prod(update.shape[2:]) != 1:
        raise AdapterError(
            f"a convolution with a kernel of {'x'.join(map(str, update.shape[2:]))} (weight {update.shape}) is not"
            " converted: LoRA adapters here hold matrices. Leave it out, or merge this adapter with PEFT"
        )
    exact = _factors(update, rank)
    if exact.rank > MAX_RANK:
        raise AdapterError(f"takes rank {exact.rank}, at most {MAX_RANK} is read; give a rank")
    even = evened(exact)
    B, A = even.B_OR, even.A_RI
    rounded = LowRank(A.float(), B.float(), 1.0)
    if not bool(torch.isfinite(rounded.lora_A).all() and torch.isfinite(rounded.lora_B).all()):
        raise AdapterError("its update leaves the range of float32")
    total = math.hypot(product_norm(B, A), exact.dropped)
    # What was left out lies at right angles to what was kept, and so to its rounding but for products of roundings.
    error = math.hypot(rounding(B, A, rounded.lora_B, rounded.lora_A), exact.dropped)
    if not math.isfinite(total + error):
        raise AdapterError("its update is not finite: products of its factors leave the range of numbers")
    return rounded, error / total if total else 0.0


def _factors(update: ModuleUpdate, rank: int | None) -> Factors:
    """Return the exact factors, or the best of at most a rank."""
    out_size, in_size = update.shape[0], prod(update.shape[1:])
    found = update.factors(rank)
    if found is None or found.rank > min(out_size, in_size):
        if out_size * in_size > MAX_DENSE:
            raise AdapterError(
                f"its update has no factors of less than full rank, and {out_size} x {in_size} values are too many to"
                f" decompose (at most {MAX_DENSE}). Merge this adapter with PEFT"
            )
        return balanced(*svd(update.delta().reshape(out_size, in_size)), rank)
    if rank is not None and found.rank > rank:
        return balanced(*svd_of_product(found.B_OR, found.A_RI), rank)
    return found


def dora_to_lora(adapter: Adapter, read_weight: Callable[[str], Tensor], *, rank: int) -> Conversion:
    """Return the LoRA adapter nearest to one with magnitudes (DoRA), on the base whose weights are given.

    A module with a magnitude m makes m · (W + s B A) / ‖W + s B A‖ of the weight W, norms over its inputs. What that
    adds, m · (W + s B A) / ‖W + s B A‖ − W, has full rank; the best approximation of the rank is taken, and its
    error is measured. Modules without magnitudes stay as they are.

    Args:
        adapter: The adapter.
        read_weight: Returns the weight of the module at a path, in the shape that the module stores.
        rank: Highest rank of a module that has a magnitude, of all groups of a convolution together.

    Raises:
        AdapterError: If no module has a magnitude, a weight has another shape, or the result is not finite; all at
            once.

    Cost:
        Of the order of O · I · rank operations a module, times 11 where the matrix is large (`best_of_rows`); memory
        for one weight in float64 three times.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.zeros(1, 2), torch.zeros(2, 1), 1.0, magnitude=torch.tensor([2.0, 1.0]))
        >>> dora = Adapter({"q": pair}, LoRAConfig(rank=1, target_modules=["q"], use_dora=True))
        >>> dora_to_lora(dora, lambda path: torch.eye(2), rank=1).adapter.modules["q"].delta().tolist()
        [[1.0, 0.0], [0.0, 0.0]]

    Source:
        Liu et al. 2024, DoRA, arXiv:2402.09353, equation 5.
    """
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"rank: expected a whole number from 1 to {MAX_RANK}, got {rank!r}")
    if all(pair.magnitude is None for pair in adapter.modules.values()):
        raise AdapterError("no module of this adapter has a magnitude (DoRA): it is a LoRA adapter as it is")
    pairs: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    problems: list[str] = []
    for path, pair in adapter.modules.items():
        if pair.magnitude is None:
            pairs[path], errors[path] = replace(pair, frozen_rank=0), 0.0
            continue
        try:
            pairs[path], errors[path] = _without_magnitude(pair, pair.magnitude, read_weight(path), rank)
        except AdapterError as error:
            problems.append(f"{path}: {error.message}")
    if problems:
        raise AdapterError("this DoRA adapter cannot become a LoRA adapter", problems)
    config = scaled_config(plain_config(adapter.config), pairs)
    return Conversion(replace(adapter, modules=pairs, config=config), errors)


def _without_magnitude(pair: LowRank, magnitude: Tensor, weight: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return a module's factors and their relative error."""
    if pair.form not in _WITH_MAGNITUDES:
        raise AdapterError(f"a magnitude on factors of form {pair.form!r} is not converted")
    total, weight = pair.delta(), weight.double()
    if total.shape != weight.shape:
        raise AdapterError(f"expected a weight of shape {tuple(total.shape)} from the base, got {tuple(weight.shape)}")
    total += weight
    axes = row_axes(pair.form, total.ndim)
    norm = torch.linalg.vector_norm(total, dim=axes, keepdim=True)
    ratio = magnitude_ratio(magnitude.double().reshape(norm.shape), norm)
    matrices = _matrices(pair, total.mul_(ratio).sub_(weight))
    # A convolution's groups share the rank.
    each = max(1, rank // len(matrices))
    found = [best_of_rows(_rows_of(one), each) for one in matrices]
    norms = [torch.linalg.vector_norm(one).item() for one in matrices]
    new, closeness = built(pair, found, norms, pair.rank)
    return new, closeness.error


def _matrices(pair: LowRank, delta: Tensor) -> list[Tensor]:
    """Return the matrices, (out, in), that hold all values of an update: the products of `factors.as_matrices`."""
    if pair.form in ("embedding", "transposed"):
        return [delta.T]
    if pair.form not in ("conv", "conv_across"):
        return [delta]
    return list(delta.flatten(1).unflatten(0, (conv_groups(pair.lora_A, pair.lora_B), -1)))


def _rows_of(matrix: Tensor) -> RowBlocks:
    shape = (matrix.shape[0], matrix.shape[1])
    return RowBlocks(shape, lambda start, stop: matrix[start:stop], block_rows(shape[1]))
