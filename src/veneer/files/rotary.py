"""Rows of query and key projections in the two orders that rotary embeddings are written in.

Rotation turns pairs of a head's values. transformers pairs value j with value j + d/2 of a head of size d (`halves`);
Meta's code, torchtune and llama.cpp pair value 2j with 2j + 1 (`pairs`). Both compute the same, if the rows of the
projections are put in the other order; lora_B and a magnitude have those rows too, and bring the same permutation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from veneer.adapter import LowRank
from veneer.errors import AdapterError


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Args:
        queries: How many heads ask.
        keys: How many heads of keys and values there are.
        size: Values in a head.
    """

    queries: int
    keys: int
    size: int


def heads_of(config: Mapping[str, Any], where: str) -> Heads:
    """Return the heads that a base's configuration says.

    Raises:
        AdapterError: If it does not.

    Example:
        >>> heads_of({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}, "config.json")
        Heads(queries=4, keys=2, size=8)
    """
    queries, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    keys = config.get("num_key_value_heads") or queries
    size = config.get("head_dim")
    if size is None and type(hidden) is int and type(queries) is int and queries > 0:
        size = hidden // queries
    if any(type(one) is not int or one < 1 for one in (queries, keys, size)) or size % 2:  # type: ignore[operator]
        raise AdapterError(
            f"{where}: the order of rotary rows needs num_attention_heads, num_key_value_heads and head_dim or"
            f" hidden_size, got {queries!r}, {keys!r} and {size!r}"
        )
    return Heads(queries, keys, size)  # type: ignore[arg-type]


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return rows in the order of halves in the order of pairs: row 2j of a head is what row j was.

    Example:
        >>> import torch
        >>> to_pairs(torch.arange(8), 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Return rows in the order of pairs in the order of halves: the inverse of `to_pairs`.

    Example:
        >>> import torch
        >>> to_halves(to_pairs(torch.arange(8), 2), 2).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def reordered(path: str, pair: LowRank, heads: Heads, *, pairs: bool) -> LowRank:
    """Return the factors of a query or key projection with its rows in another order, others as they are.

    Args:
        path: The module's path in transformers' words: it ends in `q_proj` or `k_proj` where rows are rotated.
        pair: The factors.
        heads: The heads.
        pairs: To the order of pairs; else to that of halves.

    Raises:
        AdapterError: If it has not the outputs of its heads.

    Example:
        >>> import torch
        >>> pair = LowRank(torch.ones(1, 3), torch.arange(4.0)[:, None], 1.0)
        >>> reordered("attn.k_proj", pair, Heads(2, 1, 4), pairs=True).lora_B.flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    count = {"q_proj": heads.queries, "k_proj": heads.keys}.get(path.rpartition(".")[2])
    if count is None:
        return pair
    if pair.sizes[0] != count * heads.size:
        raise AdapterError(f"{path}: expected {count} heads of {heads.size} outputs, got {pair.sizes[0]} outputs")
    turn = to_pairs if pairs else to_halves
    magnitude = None if pair.magnitude is None else turn(pair.magnitude, count)
    return replace(pair, lora_B=turn(pair.lora_B, count), magnitude=magnitude)


def is_rotated(path: str) -> bool:
    """Tell whether the outputs of a module are rotated: those of queries and keys.

    Example:
        >>> is_rotated("layers.0.self_attn.k_proj"), is_rotated("layers.0.self_attn.v_proj")
        (True, False)
    """
    return path.rpartition(".")[2] in ("q_proj", "k_proj")
