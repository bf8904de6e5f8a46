"""A module's factors as stacks of plain matrices and back, with what the way back loses.

Shapes: M matrices of a stack (experts, groups of a convolution; one else), O out, I in, R rank.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.factors import as_matrices, conv_groups
from veneer.files.patterns import scales_for
from veneer.files.peft_layout import owner_of
from veneer.ops.low_rank import Factors, evened, rounding


@dataclass(frozen=True)
class Closeness:
    """How near a module's new update is to the one that was meant.

    Args:
        rank_before: Inner dimension of what it was made of.
        rank: Inner dimension now.
        norm: Frobenius norm of the update that was meant.
        missed: Frobenius norm of the difference, rounding included.

    Example:
        >>> one = Closeness(32, 16, norm=5.0, missed=3.0)
        >>> one.error, round(one.kept, 6)
        (0.6, 0.64)
    """

    rank_before: int
    rank: int
    norm: float
    missed: float

    @property
    def error(self) -> float:
        """The difference relative to what was meant: ‖new − meant‖ / ‖meant‖."""
        return self.missed / self.norm if self.norm else 0.0

    @property
    def kept(self) -> float:
        """Share of the squared Frobenius norm that is kept: what is left out lies at right angles to what is kept."""
        return max(0.0, 1.0 - self.error**2)


def whole(modules: Iterable[Closeness]) -> Closeness:
    """Return how near all modules together are; the ranks are summed.

    Example:
        >>> whole([Closeness(2, 1, 3.0, 0.0), Closeness(2, 1, 4.0, 1.0)])
        Closeness(rank_before=4, rank=2, norm=5.0, missed=1.0)
    """
    every = list(modules)
    return Closeness(
        sum(one.rank_before for one in every),
        sum(one.rank for one in every),
        math.hypot(*(one.norm for one in every)),
        math.hypot(*(one.missed for one in every)),
    )


def closeness_json(modules: Mapping[str, Closeness]) -> dict[str, object]:
    """Return the figures of all modules, and of each, as plain values.

    Example:
        >>> closeness_json({"q": Closeness(2, 1, 2.0, 1.0)})["relative_error"]
        0.5
    """
    total = whole(modules.values())
    each = [
        {"path": path, "rank_before": one.rank_before, "rank": one.rank, **_figures(one)}
        for path, one in modules.items()
    ]
    return {**_figures(total), "modules": each}


def _figures(one: Closeness) -> dict[str, float]:
    return {"norm": one.norm, "kept": one.kept, "relative_error": one.error}


def stack_of(pair: LowRank) -> list[tuple[Tensor, Tensor]]:
    """Return B (O, R) times the scaling and A (R, I) of each matrix of a module, in float64.

    Raises:
        AdapterError: If a value is not finite: a rule that compares would leave it out in silence.

    Example:
        >>> [(B.tolist(), A.tolist()) for B, A in stack_of(LowRank(torch.ones(1, 2), torch.ones(1, 1), 0.5))]
        [([[0.5]], [[1.0, 1.0]])]
    """
    scaled = pair.lora_B.double() * pair.scaling
    if not bool(torch.isfinite(pair.lora_A).all() and torch.isfinite(scaled).all()):
        raise AdapterError("its factors are not finite")
    A_MRI, B_MOR = as_matrices(pair.form, pair.lora_A.double(), scaled)
    return list(zip(B_MOR, A_MRI, strict=True))


def rank_of_each(form: str, rank: int, count: int) -> int:
    """Return the rank of each matrix where the pair's is given: a convolution's groups share it.

    Example:
        >>> rank_of_each("conv", 8, 2), rank_of_each("experts", 8, 2)
        (4, 8)
    """
    return max(1, rank // count) if form.startswith("conv") else rank


def built(
    like: LowRank, factors: Sequence[Factors], norms: Sequence[float], rank_before: int
) -> tuple[LowRank, Closeness]:
    """Return a module's pair with scaling 1 of the factors of its matrices, and how near it is to what was meant.

    Args:
        like: Tells the form and its axes.
        factors: Of each matrix; those of lower rank are filled up with zeros.
        norms: Frobenius norm of each matrix that was meant.
        rank_before: For the record.

    Raises:
        AdapterError: If a value leaves the range of the dtype.
    """
    dtype = torch.promote_types(like.lora_A.dtype, torch.float32)
    even = [evened(one) for one in factors]
    most = max(one.rank for one in even)
    A_MRI = torch.stack([torch.nn.functional.pad(one.A_RI, (0, 0, 0, most - one.rank)) for one in even])
    B_MOR = torch.stack([torch.nn.functional.pad(one.B_OR, (0, most - one.rank)) for one in even])
    pair = unstacked(like, A_MRI.to(dtype), B_MOR.to(dtype))
    if not bool(torch.isfinite(pair.lora_A).all() and torch.isfinite(pair.lora_B).all()):
        raise AdapterError(f"its update leaves the range of {str(dtype).removeprefix('torch.')}")
    # What was left out lies at right angles to what was kept, and so to its rounding but for products of roundings.
    A_kept, B_kept = as_matrices(pair.form, pair.lora_A, pair.lora_B)
    rounded = [rounding(*both) for both in zip(B_MOR, A_MRI, B_kept, A_kept, strict=True)]
    missed = math.hypot(*(one.dropped for one in even), *rounded)
    norm = math.hypot(*norms)
    if not math.isfinite(norm + missed):
        raise AdapterError("its update is not finite: products of its factors leave the range of numbers")
    return pair, Closeness(rank_before, pair.rank, norm, missed)


def unstacked(like: LowRank, A_MRI: Tensor, B_MOR: Tensor) -> LowRank:
    """Return the pair whose `as_matrices` are these, with scaling 1: its inverse.

    Example:
        >>> pair = LowRank(torch.ones(4, 3, 3, 3), torch.ones(8, 2, 1, 1), 1.0, "conv")
        >>> A, B = as_matrices("conv", pair.lora_A, pair.lora_B)
        >>> unstacked(pair, A, B).lora_B.equal(pair.lora_B)
        True
    """
    if like.form.startswith("experts"):
        return LowRank(A_MRI, B_MOR, 1.0, like.form)
    kernel = like.lora_A.shape[2:]
    A = A_MRI.flatten(0, 1).unflatten(1, (-1, *kernel))
    B = B_MOR.flatten(0, 1).unflatten(1, (-1, *(1 for _ in kernel)))
    return LowRank(A, B, 1.0, like.form)


def layout_of(pair: LowRank) -> tuple[object, ...]:
    """Return what two pairs must share for their updates to be added: form, sizes, and how they are stacked.

    Example:
        >>> layout_of(LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0))
        ('linear', (3, 2))
    """
    A, B = pair.lora_A, pair.lora_B
    if pair.form.startswith("experts"):
        return pair.form, pair.sizes, f"{A.shape[0]} experts"
    if pair.form.startswith("conv"):
        return pair.form, (B.shape[0], *A.shape[1:]), f"{conv_groups(A, B)} groups"
    return pair.form, pair.sizes


def scaled_config(config: LoRAConfig, modules: Mapping[str, LowRank]) -> LoRAConfig:
    """Return settings that give every module its own rank and scaling.

    Example:
        >>> pair = LowRank(torch.ones(2, 2), torch.ones(3, 2), 1.0)
        >>> scaled_config(LoRAConfig(rank=4, target_modules=["q"]), {"q": pair}).scaling_for("q")
        1.0
    """
    if not modules:
        return config
    common = Counter(sorted(pair.rank for pair in modules.values())).most_common(1)[0][0]
    plain = config.model_copy(update={"rank": common, "alpha": float(common)})
    return scales_for(Adapter(modules, plain)).within(config)


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """Return the settings of factors that did not start by training: nothing of how they began is left.

    Example:
        >>> plain_config(LoRAConfig(init="pissa", use_rslora=True)).init
        'kaiming'
    """
    changes = {"use_rslora": False, "use_dora": False, "freeze_A": False, "parts": {}}
    return config.model_copy(update={**changes, "init": "kaiming", "init_options": {}})


def dora_problems(adapter: Adapter, name: str) -> list[str]:
    """Return a line where modules have magnitudes: their update is no product, and depends on the base.

    Example:
        >>> dora_problems(Adapter({"q": LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)}, LoRAConfig()), "a")
        []
    """
    found = [path for path, pair in adapter.modules.items() if pair.magnitude is not None]
    if not found:
        return []
    return [
        f"{name}: {len(found)} of {len(adapter.modules)} modules have magnitudes (DoRA), such as {found[0]}: what they"
        f" change depends on the base. Convert it first: veneer convert {name} --to lora --base BASE --rank"
        f" {2 * max(adapter.modules[path].rank for path in found)} --out DIR"
    ]


def evened_attention(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return the modules with both projections of an attention at one rank, by zeros: files hold them together."""
    most: dict[str, int] = {}
    for path, pair in modules.items():
        if pair.form.startswith("attention"):
            owner = owner_of(path, pair.form)
            most[owner] = max(most.get(owner, 0), pair.rank)
    return {path: _filled(pair, most.get(owner_of(path, pair.form), pair.rank)) for path, pair in modules.items()}


def _filled(pair: LowRank, rank: int) -> LowRank:
    if not pair.form.startswith("attention") or pair.rank == rank:
        return pair
    lacking = rank - pair.rank
    return replace(
        pair,
        lora_A=torch.nn.functional.pad(pair.lora_A, (0, 0, 0, lacking)),
        lora_B=torch.nn.functional.pad(pair.lora_B, (0, lacking)),
    )
