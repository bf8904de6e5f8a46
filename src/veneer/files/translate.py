"""What formats of other programs share: scalings put into factors, ranks evened, forms told from the base's shapes.

PEFT's files say each module's rank and scaling. Most others say one for all, or none; what differs is put into
lora_B, which changes no delta but for one rounding.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.factors import cat_ranks
from veneer.files.format import Hints
from veneer.files.patterns import MAX_PATH
from veneer.files.peft_values import MAX_RANK
from veneer.files.shards import Checkpoint
from veneer.names import did_you_mean

TABLES = (
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "embed_in",
    "embed_positions", "tok_embeddings", "embeddings", "embedding", "shared",
)  # fmt: skip
"""What models call their embedding tables."""

GATE_UP, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"

_TRANSPOSING = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose layers are transformers' Conv1D: their square matrices tell nothing by their shape."""


def at_scaling(pair: LowRank, scaling: float) -> LowRank:
    """Return the pair with the same delta and another scaling: what is between them goes into lora_B.

    The dtype stays where the product is exact in it; otherwise both factors become float32 (float64 stays), so that a
    delta changes by one rounding at most.

    Example:
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), scaling=0.5)
        >>> at_scaling(pair, 2.0).lora_B.flatten().tolist()
        [0.25, 0.25]
    """
    if pair.scaling == scaling:
        return pair
    wanted = pair.lora_B.double() * (pair.scaling / scaling)
    dtype = pair.lora_B.dtype
    if not torch.equal(wanted.to(dtype).double(), wanted) and dtype != torch.float64:
        dtype = torch.float32
    return replace(pair, lora_A=pair.lora_A.to(dtype), lora_B=wanted.to(dtype), scaling=scaling)


def at_rank(pair: LowRank, rank: int) -> LowRank:
    """Return the pair with zeros up to a rank; its delta and its scaling stay.

    Raises:
        AdapterError: If it has more ranks already.

    Example:
        >>> at_rank(LowRank(torch.ones(1, 2), torch.ones(2, 1), scaling=0.5), 3).lora_A.tolist()
        [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    missing = rank - pair.rank
    if missing < 0:
        raise AdapterError(f"expected a rank of at most {rank}, got {pair.rank}")
    if missing == 0:
        return pair
    A, B = pair.lora_A, pair.lora_B
    axis = 1 if pair.form.startswith("experts") else 0
    zeros_A = A.new_zeros(*A.shape[:axis], missing, *A.shape[axis + 1 :])
    zeros_B = B.new_zeros(*B.shape[: axis + 1], missing, *B.shape[axis + 2 :])
    A, B = cat_ranks(pair.form, [(A, B), (zeros_A, zeros_B)])
    return replace(pair, lora_A=A, lora_B=B)


def common_scaling(modules: Mapping[str, LowRank]) -> float:
    """Return the scaling that most modules have, the largest of several.

    Example:
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), scaling=0.5)
        >>> common_scaling({"a": pair, "b": pair})
        0.5
    """
    return Counter(sorted((pair.scaling for pair in modules.values()), reverse=True)).most_common(1)[0][0]


def alpha_problem(hints: Hints, program: str) -> str | None:
    """Return why the hinted alpha cannot be used for files that do not hold it, or None.

    Example:
        >>> alpha_problem(Hints(alpha=-1), "loralib")
        'alpha must be positive and finite, got -1'
    """
    if hints.alpha is None:
        return (
            f"{program} stores no alpha, and without it the update's size is unknown; give the one that the layers are"
            " made with: --alpha"
        )
    return None if 0 < hints.alpha < float("inf") else f"alpha must be positive and finite, got {hints.alpha!r}"


def alpha_hint(hints: Hints, where: str, program: str) -> float:
    """Return the alpha that somebody said, for files that do not hold it.

    Raises:
        AdapterError: If nobody did, or it is not a positive number.

    Example:
        >>> alpha_hint(Hints(alpha=16), "a.safetensors", "loralib")
        16.0
    """
    if problem := alpha_problem(hints, program):
        raise AdapterError(f"{where}: {problem}")
    return float(hints.alpha or 0.0)


def path_problem(path: str) -> str | None:
    """Return why a name is no path of a module, or None.

    Example:
        >>> path_problem("layers..q")
        'not the path of a module (empty or unprintable parts, or longer than 256)'
    """
    if len(path) <= MAX_PATH and path.isprintable() and all(path.split(".")):
        return None
    return f"not the path of a module (empty or unprintable parts, or longer than {MAX_PATH})"


def pair_problem(A: Tensor, B: Tensor, ndim: int = 2) -> str | None:
    """Return why two tensors from a file are no factors, or None; the ranks are compared by `LowRank`.

    Example:
        >>> pair_problem(torch.ones(2, 3), torch.ones(0, 2))
        'expected two tensors of 2 axes, none of them empty, got (2, 3) and (0, 2); were shards not gathered?'
    """
    if any(one.ndim != ndim or 0 in one.shape for one in (A, B)):
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        return f"expected two tensors of {ndim} axes, none of them empty, got {shapes}; were shards not gathered?"
    if A.dtype != B.dtype or not A.dtype.is_floating_point:
        return f"expected one floating dtype, got {A.dtype} and {B.dtype}"
    return None


def rank_problem(rank: int) -> str | None:
    """Return why a rank is refused, or None."""
    return None if 1 <= rank <= MAX_RANK else f"expected a rank from 1 to {MAX_RANK}, got {rank}"


def weight_shape(base: Checkpoint | None, path: str) -> tuple[int, ...] | None:
    """Return the shape of a module's weight in a base, whose names may begin later or earlier than the module's path.

    Raises:
        AdapterError: If several tensors are meant as well as each other.
    """
    if base is None:
        return None
    name = f"{path}.weight"
    if name in base.tensors:
        return base.tensors[name].shape
    near = [other for other in base.tensors if name.endswith(f".{other}") or other.endswith(f".{name}")]
    if len(near) > 1:
        raise AdapterError(f"{path}: may be {' or '.join(sorted(near)[:5])} of the base")
    return base.tensors[near[0]].shape if near else None


def matrix_form(path: str, sizes: tuple[int, int], base: Checkpoint | None) -> str:
    """Return the form of a pair of matrices, from the base's weight, or from its name where no base is given.

    Args:
        path: The module's path.
        sizes: (out, in) of the factors.
        base: The base.

    Raises:
        AdapterError: If the base has no such module, or its weight has another shape.

    Example:
        >>> matrix_form("model.embed_tokens", (64, 1000), None), matrix_form("layers.0.q_proj", (64, 64), None)
        ('embedding', 'linear')
    """
    is_table = path.rpartition(".")[2] in TABLES
    if base is None:
        return "embedding" if is_table else "linear"
    shape = weight_shape(base, path)
    if shape is None:
        near = did_you_mean(f"{path}.weight", base.tensors)
        raise AdapterError(f"{path}: {base.folder} has no {path + '.weight'!r}{near}")
    across = sizes[::-1]
    if is_table and shape == across:
        return "embedding"
    transposing = base.config.get("model_type") in _TRANSPOSING
    if shape == sizes and not (transposing and shape == across and not path.endswith("lm_head")):
        return "linear"
    if shape == across:
        return "transposed" if transposing else "embedding"
    raise AdapterError(f"{path}: expected factors for the base's weight of shape {shape}, got (out, in) = {sizes}")


def split_gate_up(pair: LowRank, path: str) -> tuple[LowRank, LowRank]:
    """Return the gate's and the up projection's part of factors that hold both, the gate's outputs first.

    Raises:
        AdapterError: If the outputs are not two halves.

    Example:
        >>> pair = LowRank(torch.ones(3, 2, 5), torch.ones(3, 8, 2), 1.0, "experts")
        >>> split_gate_up(pair, "experts.gate_up_proj")[1].sizes
        (4, 5)
    """
    outputs = pair.lora_B.shape[1]
    if outputs % 2:
        raise AdapterError(f"{path}: expected the outputs of two projections, got {outputs}")
    return replace(pair, lora_B=pair.lora_B[:, : outputs // 2]), replace(pair, lora_B=pair.lora_B[:, outputs // 2 :])


def join_gate_up(gate: LowRank | None, up: LowRank | None, path: str) -> LowRank:
    """Return the factors of both projections in one: their ranks side by side, each with its own outputs.

    Ranks that both share are kept once. The inverse of `split_gate_up`; one that is None adds nothing.

    Raises:
        AdapterError: If they do not belong together.

    Example:
        >>> pair = LowRank(torch.ones(3, 2, 5), torch.ones(3, 8, 2), 1.0, "experts")
        >>> join_gate_up(*split_gate_up(pair, "x"), "x").rank
        2
    """
    one = gate or up
    if one is None:
        raise AdapterError(f"{path}: neither a gate nor an up projection")
    zeros = torch.zeros_like(one.lora_B)
    if gate is None or up is None:
        halves = [zeros, one.lora_B] if gate is None else [one.lora_B, zeros]
        return replace(one, lora_B=torch.cat(halves, 1))
    if gate.lora_A.shape[::2] != up.lora_A.shape[::2] or gate.lora_B.shape[:2] != up.lora_B.shape[:2]:
        raise AdapterError(f"{path}: gate and up projection are of other sizes: {gate.sizes} and {up.sizes}")
    if gate.scaling == up.scaling and torch.equal(gate.lora_A, up.lora_A):
        return replace(gate, lora_B=torch.cat([gate.lora_B, up.lora_B], 1))
    up = at_scaling(up, gate.scaling)
    dtype = torch.promote_types(gate.lora_A.dtype, up.lora_A.dtype)
    gate_B, up_B = gate.lora_B.to(dtype), up.lora_B.to(dtype)
    top = torch.cat([gate_B, torch.zeros_like(gate_B)], 1)
    bottom = torch.cat([torch.zeros_like(up_B), up_B], 1)
    A, B = cat_ranks("experts", [(gate.lora_A.to(dtype), top), (up.lora_A.to(dtype), bottom)])
    return replace(gate, lora_A=A, lora_B=B)
