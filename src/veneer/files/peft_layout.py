"""Where PEFT's layout puts each form of factors, and what its keys stand for.

    form            keys behind the module's path P                            shapes
    linear          P.lora_A.weight, P.lora_B.weight                           (R, I), (O, R)
    embedding       P.lora_embedding_A, P.lora_embedding_B                     (R, N), (D, R)
    conv            P.lora_A.weight, P.lora_B.weight                           (R, I, k…), (O, R/g, 1…)
    attention_in    P.lora_A.weight, P.lora_B.weight                           (R, I), (3·D, R)
    attention_out   P.base_layer.out_proj.lora_A.weight, …                     (R, I), (O, R)
    experts         P[.base_layer…].lora_A.weight, …                           (E·R, I), (O, R·E)
    parameter       P[.base_layer…].lora_A.weight, …                           (R, I), (O, R)

PEFT applies the output projection of an attention twice (0.21.2, `MultiheadAttention.merge`: once by hand, once by the
layer's own merge, in training too). What a file means is what PEFT makes of it, so lora_B of `attention_out` is half of
ours there; halving a float is exact. (peft#3774 would mend it; later versions are refused until that is settled.)

A magnitude is P.lora_magnitude_vector: (O,), for convolutions (1, O, 1…). Parameters of one module are nested, the
first in its order innermost (research: peft-format.md 3 and 4).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter import LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.factors import conv_groups
from veneer.names import matches_suffix

ATTENTION_IN, ATTENTION_OUT = "in_proj_weight", "out_proj.weight"
_OUT_PROJ = ".base_layer.out_proj"
_ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""The order in which transformers' experts hold their projections."""
_BY_NAME = ("experts", "parameter")
_APPLIED_TWICE = (0, 21, 2)
_NO_LAYOUT = {
    "conv_transpose": "PEFT's layout has no place for a transposed convolution",
    "experts_by_position": "which axis is the input only the model tells; attach it to its model, detach, save that",
}
_PLAIN = ("linear", "transposed", "embedding", "conv", "conv_across")


@dataclass(frozen=True)
class Keys:
    """The keys of one pair of factors.

    Args:
        A: Key of lora_A.
        B: Key of lora_B.
        magnitude: Key of the magnitude, or None.
        is_embedding: Whether they are those of an embedding.
    """

    A: str
    B: str
    magnitude: str | None = None
    is_embedding: bool = False


@dataclass(frozen=True)
class Placed:
    """A pair of factors whose form is known."""

    keys: Keys
    form: str


def write_factors(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the tensors of an adapter's modules by their names without PEFT's prefix.

    Raises:
        AdapterError: For what PEFT's layout has no place for, all at once.
    """
    problems = [f"{path}: {_NO_LAYOUT[pair.form]}" for path, pair in modules.items() if pair.form in _NO_LAYOUT]
    problems += [
        f"{path}: PEFT has magnitudes (DoRA) only for layers, not for form {pair.form!r}"
        for path, pair in modules.items()
        if pair.magnitude is not None and pair.form not in _PLAIN
    ]
    linear, transposed = (
        [path for path, pair in modules.items() if pair.form == form] for form in ("linear", "transposed")
    )
    if linear and transposed:
        problems.append(
            f"{linear[0]} is linear and {transposed[0]} transposed (Conv1D); PEFT says one of them for all matrices"
        )
    if problems:
        raise AdapterError("the adapter cannot be written in PEFT's layout", problems)
    named: dict[str, Tensor] = {}
    for path, pair in modules.items():
        if pair.form in _PLAIN:
            named |= _write_plain(path, pair)
    named |= _write_attention(modules)
    for owner, leaves in _by_owner(modules).items():
        for depth, leaf in enumerate(reversed(leaves)):
            pair = modules[f"{owner}.{leaf}"]
            A, B = (_stacked(pair.lora_A, pair.lora_B)) if pair.form == "experts" else (pair.lora_A, pair.lora_B)
            place = owner + ".base_layer" * depth
            named |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
    return named


def targets_of(modules: Mapping[str, LowRank]) -> tuple[list[str], list[str]]:
    """Return the paths for `target_modules` and those for `target_parameters`."""
    parameters = sorted(path for path, pair in modules.items() if pair.form in _BY_NAME)
    layers = {owner_of(path, pair.form) for path, pair in modules.items() if path not in parameters}
    return sorted(layers), parameters


def owner_of(path: str, form: str) -> str:
    """Return the path by which PEFT's patterns know a pair: an attention's own, for either of its projections.

    Example:
        >>> owner_of("layers.0.attn.in_proj_weight", "attention_in"), owner_of("layers.0.q_proj", "linear")
        ('layers.0.attn', 'layers.0.q_proj')
    """
    names = (f".{ATTENTION_IN}", f".{ATTENTION_OUT}") if form.startswith("attention") else ()
    return next((path.removesuffix(name) for name in names if path.endswith(name)), path)


def place_factors(
    found: Mapping[str, Keys], tensors: Mapping[str, Tensor], config: LoRAConfig, transposed: bool
) -> "tuple[dict[str, Placed], list[str]]":
    """Return each pair by the path of what it adapts, with its form; and what cannot be told.

    Args:
        found: Keys by the path before them, `base_layer` parts included.
        tensors: The tensors by key.
        config: Says which parameters are targeted by name.
        transposed: Whether matrices are those of transformers' Conv1D.
    """
    placed: dict[str, Placed] = {}
    problems: list[str] = []
    nested: dict[str, list[str]] = {}
    for raw in found:
        owner = raw
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        if owner != raw or _targets_parameters(owner, found, config):
            nested.setdefault(owner, []).append(raw)
    for raw, keys in found.items():
        owner = raw.removesuffix(_OUT_PROJ)
        if owner != raw:
            placed[f"{owner}.{ATTENTION_OUT}"] = Placed(keys, "attention_out")
            if owner not in found:
                problems.append(f"{keys.A!r}: the output projection of an attention without its input projection")
        elif f"{raw}{_OUT_PROJ}" in found:
            placed[f"{raw}.{ATTENTION_IN}"] = Placed(keys, "attention_in")
        elif not any(raw in raws for raws in nested.values()):
            placed[raw] = Placed(keys, _plain_form(keys, tensors, transposed))
    for owner, raws in nested.items():
        leaves = _leaves(owner, config)
        if len(leaves) != len(raws) or (len(leaves) > 1 and not set(leaves) <= set(_ORDER)):
            problems.append(
                f"{owner}: {len(raws)} pairs of factors for its parameters, target_parameters names "
                f"{', '.join(leaves) or 'none'}; which is which cannot be told"
            )
            continue
        for leaf, raw in zip(leaves, sorted(raws, key=len, reverse=True), strict=True):
            placed[f"{owner}.{leaf}"] = Placed(found[raw], "")  # matrix or stack: its rank tells, see read_pair
    problems += [
        f"{one.keys.A!r}: nested factors, and neither those of an attention nor of a parameter"
        for path, one in placed.items()
        if "base_layer" in path.split(".")
    ]
    return placed, problems


def read_pair(placed: Placed, tensors: Mapping[str, Tensor], rank: int, version: str | None) -> LowRank:
    """Return the factors that a pair of keys holds, with scaling 1.

    Args:
        placed: The keys and their form; an empty form is a parameter's, a matrix or a stack of experts.
        tensors: The tensors by key.
        rank: The rank that the configuration gives.
        version: PEFT's version, which decides how experts are laid out.

    Raises:
        AdapterError: If the shapes are not those of the form and the rank.
    """
    keys, form = placed.keys, placed.form
    A, B = tensors[keys.A], tensors[keys.B]
    if not form:
        form = "parameter" if A.shape[0] == rank else "experts"
    if form == "experts":
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
            raise AdapterError(f"{keys.A!r}: expected a stack of rank {rank} a matrix, got {_shapes(A, B)}")
        A = A.unflatten(0, (-1, rank))
        B = B.unflatten(1, (rank, -1)).permute(2, 0, 1)
        number = _version(version)
        if number < (0, 19):
            form = "experts_by_position"
        elif number < (0, 19, 1):  # this one alone exchanged inputs and outputs
            A, B = B.transpose(1, 2), A.transpose(1, 2)
    else:
        wrong = [
            f"{key!r}: expected rank {rank}, as r or rank_pattern says, got {found}"
            for key, found in ((keys.A, A.shape[0]), (keys.B, B.shape[1] if "conv" not in form else rank))
            if found != rank
        ]
        if wrong:
            raise AdapterError("its rank is another", wrong)
    if form == "conv_across" and _is_within_groups(A, B):
        form, A = "conv", _within_groups(A, B)
    if form == "attention_out":
        if _version(version) > _APPLIED_TWICE:
            raise AdapterError(
                f"{keys.A!r}: written by PEFT {version}; up to 0.21.2 it applied an attention's output twice "
                "(peft#3774), and of this version it is not known"
            )
        B = B * 2
    magnitude = None if keys.magnitude is None else tensors[keys.magnitude].reshape(-1)
    return LowRank(A, B, 1.0, form, magnitude)


def _write_plain(path: str, pair: LowRank) -> dict[str, Tensor]:
    A, B = pair.lora_A, pair.lora_B
    if pair.form == "embedding":
        named = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
    else:
        wide = _across_groups(A, B) if pair.form == "conv" and conv_groups(A, B) > 1 else A
        named = {f"{path}.lora_A.weight": wide, f"{path}.lora_B.weight": B}
    if pair.magnitude is not None:
        shape = (1, -1, *(1,) * (A.ndim - 2)) if A.ndim > 2 else (-1,)
        named[f"{path}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    return named


def _write_attention(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return both projections of each attention: PEFT has them together, the one not adapted as zeros."""
    named: dict[str, Tensor] = {}
    owners = {owner_of(path, pair.form) for path, pair in modules.items() if pair.form.startswith("attention")}
    for owner in sorted(owners):
        inward, outward = modules.get(f"{owner}.{ATTENTION_IN}"), modules.get(f"{owner}.{ATTENTION_OUT}")
        other = inward or outward
        if other is None or (inward and outward and inward.rank != outward.rank):
            raise AdapterError(
                f"{owner}: PEFT's layout holds a packed input and an output projection of one rank; "
                "these parameters do not fit it"
            )
        size = other.sizes[1]
        zero_A = other.lora_A.new_zeros(other.rank, size)
        pairs = {
            f"{owner}": (inward.lora_A, inward.lora_B) if inward else (zero_A, zero_A.new_zeros(3 * size, other.rank)),
            f"{owner}{_OUT_PROJ}": (outward.lora_A, outward.lora_B / 2)
            if outward
            else (zero_A, zero_A.new_zeros(size, other.rank)),
        }
        for place, (A, B) in pairs.items():
            named |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
    return named


def _by_owner(modules: Mapping[str, LowRank]) -> dict[str, list[str]]:
    """Return the names of the parameters adapted in each module, in the module's order."""
    owners: dict[str, list[str]] = {}
    for path, pair in modules.items():
        if pair.form in _BY_NAME:
            owner, _, leaf = path.rpartition(".")
            owners.setdefault(owner, []).append(leaf)
    for owner, leaves in owners.items():
        if len(leaves) > 1 and not set(leaves) <= set(_ORDER):
            raise AdapterError(
                f"{owner}: PEFT nests {', '.join(sorted(leaves))} in the order of the module, which only it knows; "
                "adapt one of them"
            )
    return {owner: _in_order(leaves) for owner, leaves in owners.items()}


def _in_order(leaves: Collection[str]) -> list[str]:
    return sorted(leaves, key=lambda leaf: _ORDER.index(leaf) if leaf in _ORDER else 0)


def _leaves(owner: str, config: LoRAConfig) -> list[str]:
    """Return the parameters of a module that `target_parameters` names, in the module's order."""
    found = set()
    for entry in config.target_parameters:
        parent, _, leaf = entry.rpartition(".")
        if not parent or matches_suffix(owner, parent):
            found.add(leaf)
    return _in_order(found)


def _targets_parameters(owner: str, found: Mapping[str, Keys], config: LoRAConfig) -> bool:
    """Tell whether the factors of a path are those of a parameter named in `target_parameters`."""
    if not config.target_parameters or owner not in found:
        return False  # as nearly always; what follows looks through all targets
    entries: Sequence[str] = config.target_modules if isinstance(config.target_modules, tuple) else ()
    is_layer = any(matches_suffix(owner, entry) for entry in entries) or f"{owner}{_OUT_PROJ}" in found
    return bool(_leaves(owner, config)) and not is_layer and not found[owner].is_embedding


def _plain_form(keys: Keys, tensors: Mapping[str, Tensor], transposed: bool) -> str:
    if keys.is_embedding:
        return "embedding"
    A, B = tensors[keys.A], tensors[keys.B]
    if A.ndim > 2:
        across = B.ndim == A.ndim and A.shape[0] != B.shape[1]
        return "conv_across" if across else "conv"
    return "transposed" if transposed else "linear"


def _stacked(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E, R, I) as (E·R, I), expert by expert, and (E, O, R) as (O, R·E), rank by rank."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)


def _version(version: str | None) -> tuple[int, ...]:
    """Return PEFT's version as numbers; it is not written before 0.18."""
    return tuple(int(part) for part in (version or "0.17").split(".")[:3] if part.isdigit())


def _across_groups(A: Tensor, B: Tensor) -> Tensor:
    """Return the kernels of each group's ranks over all inputs, zero for those of other groups: PEFT's form."""
    groups = conv_groups(A, B)
    wide = A.new_zeros(A.shape[0], A.shape[1] * groups, *A.shape[2:])
    each, inputs = A.shape[0] // groups, A.shape[1]
    for group in range(groups):
        rows, columns = slice(group * each, (group + 1) * each), slice(group * inputs, (group + 1) * inputs)
        wide[rows, columns] = A[rows]
    return wide


def _within_groups(A: Tensor, B: Tensor) -> Tensor:
    """Return of each group's ranks the kernels over its own inputs: the inverse of `_across_groups`."""
    groups = conv_groups(A, B)
    each, inputs = A.shape[0] // groups, A.shape[1] // groups
    blocks = [A[group * each : (group + 1) * each, group * inputs : (group + 1) * inputs] for group in range(groups)]
    return torch.cat(blocks)


def _is_within_groups(A: Tensor, B: Tensor) -> bool:
    """Tell whether no group's ranks look at the inputs of another."""
    if B.shape[1] == 0 or A.shape[0] % B.shape[1] or A.shape[1] % conv_groups(A, B):
        return False
    return bool(torch.equal(_across_groups(_within_groups(A, B), B), A))


def _shapes(A: Tensor, B: Tensor) -> str:
    return f"{tuple(A.shape)} and {tuple(B.shape)}"
