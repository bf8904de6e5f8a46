"""Causal attention of a bucket of sequences in blocks: the queries of some places against the keys before them.

Shapes: N key heads of all sequences of a bucket, M queries of theirs, L keys of a bucket or those that a block sees, E
head size; `ops.attention_layout` says how they are laid out.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.attention_layout import BLOCK, Bucket

SCORE_BYTES = 4 << 20
"""Scores that are worked on at a time: they stay in the caches."""

LONG = 256
"""So many keys are worth more calls for an even share of work."""

Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or the gradients of all."""


class Block(NamedTuple):
    """A run of places of a bucket: its queries, and the keys that they may see.

    Args:
        heads: Of so many of the N the sequence reaches it.
        queries: Of each.
        keys: Of each.
        mask_ML: Added to the scores of the last keys: minus infinity where a query may not look.
    """

    heads: int
    queries: slice
    keys: slice
    mask_ML: Tensor


def cuts_of(lengths: Sequence[int]) -> list[int]:
    """Return where to cut sequences, the longest first, into blocks: where one ends if that makes no small block.

    Example:
        >>> cuts_of((200, 80, 70, 10))
        [0, 80, 176, 200]
    """
    cuts = [0]
    while (start := cuts[-1]) < lengths[0]:
        ends = [length for length in lengths if start + BLOCK // 2 < length <= start + BLOCK]
        cuts.append(ends[0] if ends else min(start + BLOCK, lengths[0]))
    return cuts


def blocks_of(bucket: Bucket, q_NME: Tensor, window: int | None) -> list[Block]:
    """Return the blocks of a bucket; a mask covers the last of the keys, the others are seen by all queries."""
    lengths, before = bucket.lengths, bucket.before_length
    heads, group = q_NME.shape[0] // len(lengths), q_NME.shape[1] // lengths[0]
    place = torch.arange(BLOCK, device=q_NME.device)
    later = _mask(place > place[:, None], q_NME, group)  # of keys that lie in the block itself
    found = []
    for start, stop in pairwise(cuts_of(lengths)):
        reached = heads * sum(length > start for length in lengths)
        queries, size = slice(group * start, group * stop), stop - start
        if window is None or before + stop <= window:
            found.append(Block(reached, queries, slice(0, before + stop), later[: group * size, :size]))
            continue
        first = max(0, before + start - window + 1)
        back = (before + start + place[:size, None]) - torch.arange(first, before + stop, device=q_NME.device)
        mask = _mask((back < 0) | (back >= window), q_NME, group)
        found.append(Block(reached, queries, slice(first, before + stop), mask))
    return found


def _mask(hidden: Tensor, like: Tensor, group: int) -> Tensor:
    """Return what is added to scores: minus infinity where a key is hidden from the `group` queries of a place."""
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(group, dim=0)


def forward(given: Parts, out_NME: Tensor, scaling: float, blocks: Sequence[Block]) -> None:
    """Write the outputs of a bucket."""
    q_NME, k_NLE, v_NLE = given
    work = list(_work(blocks, q_NME))
    scores = _scores(work, q_NME)
    for some, block in work:
        p_NML = _probabilities(q_NME[some, block.queries], k_NLE[some, block.keys], scaling, block, scores)
        out_NME[some, block.queries] = torch.bmm(p_NML, v_NLE[some, block.keys])


def backward(given: Parts, dout_NME: Tensor, scaling: float, blocks: Sequence[Block]) -> Parts:
    """Return the gradients of queries, keys and values of a bucket; probabilities are computed again."""
    queries_NME, keys_NLE, values_NLE = given
    # The padding of a sequence is in no block that it does not reach.
    dq_NME, dkeys_NLE, dvalues_NLE = torch.empty_like(queries_NME), *(torch.zeros_like(part) for part in given[1:])
    work = list(_work(blocks, queries_NME))
    scores, dscores = _scores(work, queries_NME), _scores(work, queries_NME)
    for some, block in work:
        q_NME, do_NME = queries_NME[some, block.queries], dout_NME[some, block.queries]
        k_NLE, v_NLE = keys_NLE[some, block.keys], values_NLE[some, block.keys]
        p_NML = _probabilities(q_NME, k_NLE, scaling, block, scores)
        dvalues_NLE[some, block.keys].add_(torch.bmm(p_NML.mT, do_NME))
        dp_NML = _products(do_NME, v_NLE, dscores)
        da_NML = torch._softmax_backward_data(dp_NML, p_NML, -1, p_NML.dtype, grad_input=dp_NML)
        dkeys_NLE[some, block.keys].add_(torch.bmm(da_NML.mT, q_NME))
        dq_NME[some, block.queries] = torch.bmm(da_NML, k_NLE)
    return dq_NME.mul_(scaling), dkeys_NLE.mul_(scaling), dvalues_NLE


def _work(blocks: Sequence[Block], like: Tensor) -> Iterator[tuple[slice, Block]]:
    """Yield the blocks with key heads whose scores fit the caches, an even share for each thread.

    The BLAS gives each thread whole products of a batch: of three, two threads do two and one.
    """
    threads = torch.get_num_threads()
    for block in blocks:
        most = max(1, SCORE_BYTES // (_elements(block) * like.element_size()))
        size = -(-block.heads // -(-block.heads // most))  # alike, not a full one and a small rest
        if size > threads and block.keys.stop - block.keys.start >= LONG:
            size -= size % threads
        for start in range(0, block.heads, size):
            yield slice(start, min(start + size, block.heads)), block


def _elements(block: Block) -> int:
    """Return how many scores of a key head a block has."""
    return (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)


def _scores(work: Sequence[tuple[slice, Block]], like: Tensor) -> Tensor:
    """Return room for the scores of any of the work: the same memory for all stays in the caches."""
    return like.new_empty(max((some.stop - some.start) * _elements(block) for some, block in work))


def _probabilities(q_NME: Tensor, k_NLE: Tensor, scaling: float, block: Block, scores: Tensor) -> Tensor:
    a_NML = _products(q_NME, k_NLE, scores, scaling)
    a_NML[..., a_NML.shape[-1] - block.mask_ML.shape[1] :].add_(block.mask_ML)
    return torch.softmax(a_NML, -1, out=a_NML)


def _products(q_NME: Tensor, k_NLE: Tensor, scores: Tensor, scaling: float = 1.0) -> Tensor:
    """Return `scaling · q kᵀ` in a buffer."""
    shape = (len(q_NME), q_NME.shape[1], k_NLE.shape[1])
    return scores[: math.prod(shape)].view(shape).baddbmm_(q_NME, k_NLE.mT, beta=0, alpha=scaling)
