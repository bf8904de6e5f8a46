"""Layers that trained apart and are stored as one: lora_B is zero but for a block of each."""

from itertools import pairwise

from veneer.adapter import LowRank

_MOST_PARTS = 8


def fused_parts(pair: LowRank) -> int:
    """Return how many blocks a lora_B of fused layers has: each part of the ranks writes its own rows; 0 for none.

    Example:
        >>> import torch
        >>> B = torch.block_diag(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2))
        >>> fused_parts(LowRank(torch.ones(6, 4), B, 1.0))
        3
    """
    if pair.form != "linear":
        return 0
    written = pair.lora_B != 0
    for count in range(min(_MOST_PARTS, pair.rank), 1, -1):
        if pair.rank % count:
            continue
        rows = [block.any(1).nonzero().flatten() for block in written.chunk(count, 1)]
        if all(len(one) for one in rows) and all(
            int(before.max()) < int(after.min()) for before, after in pairwise(rows)
        ):
            return count
    return 0
