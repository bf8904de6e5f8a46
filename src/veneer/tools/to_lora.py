"""An adapter of another method as a plain LoRA adapter, with the error that this makes.

Shapes: O out, I in, R rank.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.patterns import scales_for
from veneer.files.peft_method import ModuleUpdate
from veneer.files.peft_other import OtherAdapter
from veneer.files.peft_values import MAX_RANK
from veneer.ops.low_rank import Factors, balanced, evened, product_norm, rounding, svd, svd_of_product

MAX_DENSE = 1 << 28
MAX_VALUES = 1 << 29


@dataclass(frozen=True)
class Conversion:
    """A LoRA adapter made of another one.

    Args:
        adapter: The adapter; every scaling is 1, the factors are float32.
        errors: Module path to ‖B A − delta‖ / ‖delta‖ in the Frobenius norm, rounding to float32 included.

    Example:
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
    return Conversion(Adapter(pairs, _config_for(pairs, other), dict(other.trained), other.metadata), errors)


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


def _config_for(pairs: Mapping[str, LowRank], other: OtherAdapter) -> LoRAConfig:
    """Return settings that give every module its rank and a scaling of 1."""
    config = other.config
    common = Counter(sorted(pair.rank for pair in pairs.values())).most_common(1)[0][0]
    scales = scales_for(Adapter(pairs, config.model_copy(update={"rank": common, "alpha": float(common)})))
    numbers = {
        "rank": scales.rank,
        "alpha": scales.alpha,
        "rank_pattern": dict(scales.rank_pattern),
        "alpha_pattern": dict(scales.alpha_pattern),
    }
    return config.model_copy(update=numbers)
