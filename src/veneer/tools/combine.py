"""Several adapters as one: `combine` makes an adapter of adapters, on their factors.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.factors import as_matrices, cat_ranks
from veneer.files.peft_values import MAX_RANK
from veneer.ops.low_rank import Factors, RowBlocks, balanced, product_norm, rounding, svd_of_product
from veneer.tools.combiners import RULES, joined
from veneer.tools.combiners_request import LINEAR, Request, read_request
from veneer.tools.combiners_rest import combined_config, combined_metadata, combined_whole
from veneer.tools.combiners_spaces import SPACES
from veneer.tools.made_card import made_card
from veneer.tools.stacks import (
    Closeness,
    built,
    closeness_json,
    evened_attention,
    rank_of_each,
    scaled_config,
    stack_of,
    whole,
)


@dataclass(frozen=True)
class Combination:
    """An adapter made of adapters, with how near it is to what the method means.

    Args:
        adapter: The adapter.
        modules: Module path to how near its update is to the method's own; an exact one differs by rounding alone.
        method: The method.
        options: What the method was told, defaults included.
        sources: Digest and weight of each adapter, in order.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 2.0)
        >>> one = Adapter({"q": pair}, LoRAConfig(rank=1, alpha=2, target_modules=["q"]))
        >>> combine([one, one], weights=[1.0, -0.5]).total.error
        0.0
    """

    adapter: Adapter
    modules: Mapping[str, Closeness]
    method: str
    options: Mapping[str, object]
    sources: tuple[tuple[str, float], ...]

    @property
    def total(self) -> Closeness:
        """All modules together."""
        return whole(self.modules.values())

    def to_json(self) -> dict[str, object]:
        """Return what was done and how near it is as plain values."""
        sources = [{"digest": digest, "weight": weight} for digest, weight in self.sources]
        made = {"digest": self.adapter.digest, "num_bytes": self.adapter.num_bytes}
        how = {"method": self.method, "options": dict(self.options), "of": sources}
        return {**made, **how, **closeness_json(self.modules)}

    def card(self, names: Sequence[str]) -> str:
        """Return the README of the combination; the names say where its adapters came from, in order."""
        told = zip(names, self.sources, strict=True)
        rows = [{"adapter": name, "digest": f"`{digest}`", "weight": f"{one:g}"} for name, (digest, one) in told]
        title = f"Combined of {len(rows)} adapters by `{self.method}`."
        return made_card(self.adapter, title, rows, {"method": self.method, **self.options}, self.total.error)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = LINEAR,
    rank: int | None = None,
    module_weights: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    any_base: bool = False,
    names: Sequence[str] | None = None,
    **options: object,
) -> Combination:
    """Return one adapter that does what several do together.

    With D_i = scaling_i · B_i A_i of a module, zero where an adapter lacks it, the method means

        linear            Σ w_i D_i
        magnitude_prune, dare_linear, ties, dare_ties      see `veneer.tools.combiners`

    `linear` (task arithmetic, addition, subtraction, averaging: all the same sum) stacks the factors, so that it is
    exact but for the rounding of the result to its dtype; with a `rank`, it is the best approximation of that rank, by
    thin QR of the stacked factors and the singular values of the small core. No update is formed. The other methods
    act on entries, in the `space` that is named, and give a matrix that is cut to a rank.

    Args:
        adapters: One or more, for the same base. Forms, rsLoRA, any ranks and scalings mix; the frozen start of a
            compensated initialisation counts as what it is, a part of the update.
        weights: A number for each, negative ones too. None means 1 / n each where the method adds, 1 each where it
            takes means (ties, dare_ties).
        method: `linear`, or a name in `veneer.tools.combiners.RULES`.
        rank: Highest rank of a module, of each expert in a stack, of all groups of a convolution together. None means
            the exact rank for `linear` and in small spaces; in the full space, the sum of the adapters' ranks.
        module_weights: Pattern, as in `rank_pattern`, to weights for the modules that it stands for; the first that
            does wins.
        seed: Fixes what dare draws; each entry's draw depends on the seed, the module and the adapter's place alone.
        any_base: Combine although the adapters were made for different bases or tasks.
        names: What errors call the adapters, such as their folders.
        options: `density`, the share of entries that stays (default 0.2 where the largest do, 0.1 where they are
            drawn); `space`, where entries are looked at: `full`, `core` or `knots`; `trained`, what becomes of
            parameters and token rows that trained whole: `exact` (where all adapters agree, or, with `linear` and
            weights that sum to 1, the weighted sum, which is the combination whatever the base), `first` (those of
            the first adapter that has them) or `drop`.

    Raises:
        ConfigError: If a setting is unknown or does not fit; all at once.
        AdapterError: If the adapters do not fit each other, have magnitudes (DoRA), or trained whole what cannot be
            combined; all at once.

    Cost:
        `linear`: of the order of (O + I) · R² operations a module, R the sum of ranks; beside the result, the memory of
        one module's stacked factors. For the others see `veneer.tools.combiners_spaces`.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> a = Adapter({"q": LowRank(torch.ones(1, 2), torch.ones(3, 1), 2.0)}, LoRAConfig(target_modules=["q"]))
        >>> b = Adapter({"v": LowRank(torch.ones(2, 2), torch.ones(3, 2), 0.5)}, LoRAConfig(target_modules=["v"]))
        >>> both = combine([a, b], weights=[1.0, 3.0]).adapter
        >>> [(path, pair.delta()[0, 0].item()) for path, pair in both.modules.items()]
        [('q', 2.0), ('v', 3.0)]

    Source:
        research: papers.md 4.1 and 4.3. Differs from PEFT's `add_weighted_adapter`: its `linear` and its methods
        without `_svd` join A and B each by itself, (Σ c_i B_i)(Σ c_i A_i), which has cross terms B_i A_j.
    """
    request = read_request(adapters, weights, method, rank, module_weights, (seed, any_base, names), options)
    trained, tokens = combined_whole(adapters, request)
    modules: dict[str, LowRank] = {}
    closeness: dict[str, Closeness] = {}
    problems: list[str] = []
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        try:
            modules[path], closeness[path] = _combined(path, adapters, request)
        except AdapterError as error:
            problems.append(f"{path}: {error.message}")
    if problems:
        raise AdapterError("these adapters cannot be combined", problems)
    modules = evened_attention(modules)
    config = scaled_config(combined_config(adapters, modules, trained, tokens), modules)
    adapter = Adapter(modules, config, trained, combined_metadata(adapters), tokens)
    sources = tuple((one.digest, weight) for one, weight in zip(adapters, request.weights, strict=True))
    return Combination(adapter, closeness, method, request.options, sources)


def _combined(path: str, adapters: Sequence[Adapter], request: Request) -> tuple[LowRank, Closeness]:
    """Return one module's pair, and how near it is."""
    weights = request.weights_for(path)
    places = [place for place, adapter in enumerate(adapters) if path in adapter.modules]
    places = [place for place in places if weights[place]] or places[:1]
    pairs = [adapters[place].modules[path] for place in places]
    chosen = [weights[place] for place in places]
    if request.method != LINEAR:
        return _by_entries(path, pairs, chosen, places, request)
    stacked = sum(pair.rank for pair in pairs)
    if stacked <= (request.rank or MAX_RANK):
        return _stacked(pairs, chosen, stacked)
    return _cut(pairs, chosen, request.rank or MAX_RANK)


def _stacked(pairs: Sequence[LowRank], weights: Sequence[float], rank: int) -> tuple[LowRank, Closeness]:
    """Return the sum as factors side by side, with the largest of all w_i · scaling_i in front: it is not rounded."""
    factors = [weight * pair.scaling for weight, pair in zip(weights, pairs, strict=True)]
    first, dtype = pairs[0], torch.float32
    for pair in pairs:
        dtype = torch.promote_types(dtype, pair.lora_A.dtype)
    # An attention's two projections share one alpha in files, so that a common factor for both is the only one.
    scaling = 1.0 if first.form.startswith("attention") else max(map(abs, factors)) or 1.0
    ratios = [one / scaling for one in factors]
    exact = [(one.lora_A.double(), one.lora_B.double() * ratio) for one, ratio in zip(pairs, ratios, strict=True)]
    A, B = cat_ranks(first.form, exact)
    pair = LowRank(A.to(dtype), B.to(dtype), scaling, first.form)
    if not bool(torch.isfinite(pair.lora_B).all()):
        raise AdapterError(f"its update leaves the range of {str(dtype).removeprefix('torch.')}")
    meant = zip(*as_matrices(first.form, A, B), strict=True)
    kept = zip(*as_matrices(first.form, pair.lora_A, pair.lora_B), strict=True)
    norms, missed = [], []
    for (A_RI, B_OR), (A_kept, B_kept) in zip(meant, kept, strict=True):
        norms.append(product_norm(B_OR, A_RI))
        missed.append(0.0 if B_OR.equal(B_kept.double()) else rounding(B_OR, A_RI, B_kept, A_kept))
    norm = scaling * math.hypot(*norms)
    if not math.isfinite(norm):
        raise AdapterError("its update is not finite: products of its factors leave the range of numbers")
    return pair, Closeness(rank, pair.rank, norm, scaling * math.hypot(*missed))


def _cut(pairs: Sequence[LowRank], weights: Sequence[float], rank: int) -> tuple[LowRank, Closeness]:
    """Return the best approximation of the sum."""
    found, norms = [], []
    stacks = list(zip(*(stack_of(pair) for pair in pairs), strict=True))
    for matrices in stacks:
        weighted = [(B * weight, A) for (B, A), weight in zip(matrices, weights, strict=True)]
        B_OR, A_RI = torch.cat([B for B, _ in weighted], 1), torch.cat([A for _, A in weighted], 0)
        U, S, V = svd_of_product(B_OR, A_RI)
        # Where updates cancel, what is left of them is rounding: nothing to keep ranks for.
        floor = sum(product_norm(B, A) for B, A in weighted) * sum(B_OR.shape) * torch.finfo(torch.float64).eps
        count = int((floor < S).sum())
        U, S, V = U[:, :count], S[:count], V[:count]
        found.append(balanced(U, S, V, rank_of_each(pairs[0].form, rank, len(stacks))))
        norms.append(torch.linalg.vector_norm(S).item())
    return built(pairs[0], found, norms, sum(pair.rank for pair in pairs))


def _by_entries(
    path: str, pairs: Sequence[LowRank], weights: Sequence[float], places: Sequence[int], request: Request
) -> tuple[LowRank, Closeness]:
    """Return what a rule on entries gives in its space, cut to the rank."""
    rule, space = RULES[request.method], SPACES[request.space]
    found: list[Factors] = []
    norms: list[float] = []
    stacks = list(zip(*(stack_of(pair) for pair in pairs), strict=True))
    rank = None if request.rank is None else rank_of_each(pairs[0].form, request.rank, len(stacks))
    for number, matrices in enumerate(stacks):
        keys = [f"{request.seed}\0{path}\0{number}\0{place}" for place in places]

        def merge(deltas: Sequence[RowBlocks], keys: Sequence[str] = keys) -> RowBlocks:
            return joined(rule, deltas, weights, request.density, keys)

        factors, norm = space(matrices, merge, rank)
        found.append(factors)
        norms.append(norm)
    return built(pairs[0], found, norms, sum(pair.rank for pair in pairs))
