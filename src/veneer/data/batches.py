"""Which rows a step trains on: a pure function of the lengths, the seed and the epoch; no loader has any state."""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from veneer.base.ragged import RaggedBatch
from veneer.data.encode import EncodedRow

Step = list[list[int]]
"""The micro-batches of an optimiser step, each a list of row numbers."""


def row_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the rows in an epoch: a permutation that depends on nothing else.

    Example:
        >>> sorted(row_order(5, seed=0, epoch=1)), row_order(5, 0, 1) == row_order(5, 0, 1)
        ([0, 1, 2, 3, 4], True)
    """
    key = hashlib.sha256(f"order\0{seed}\0{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randperm(num_rows, generator=generator).tolist()


def epoch_steps(
    lengths: Sequence[int], *, seed: int, epoch: int, tokens_per_step: int, tokens_per_micro_batch: int
) -> list[Step]:
    """Return the optimiser steps of an epoch; each row stands in exactly one micro-batch.

    The steps share the rows out evenly: there are `ceil(tokens / tokens_per_step)` of them, none a small rest. Within
    a step, rows are packed so that no micro-batch passes its budget, unless a single row does.

    Example:
        >>> steps = epoch_steps([4] * 6, seed=0, epoch=0, tokens_per_step=12, tokens_per_micro_batch=8)
        >>> [[len(micro) for micro in step] for step in steps]
        [[2, 1], [2, 1]]
    """
    order = row_order(len(lengths), seed, epoch)
    total = sum(lengths)
    num_steps = -(-total // tokens_per_step)
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    before = 0
    for row in order:
        middle = before + lengths[row] / 2
        steps[int(middle * num_steps / total)].append(row)
        before += lengths[row]
    return [pack(rows, lengths, tokens_per_micro_batch) for rows in steps if rows]


def pack(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share rows out to as few micro-batches within a token budget as best-fit decreasing finds.

    Rows in a micro-batch are ordered by length, so that attention meets runs of equal lengths.

    Example:
        >>> pack([0, 1, 2, 3], [5, 3, 3, 2], budget=8)
        [[0, 1], [2, 3]]

    Source:
        Johnson 1973, best-fit decreasing: at most 11/9 of the optimum, and one more.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each bin, and its number; sorted
    for row in sorted(rows, key=lambda one: (-lengths[one], one)):
        place = bisect_left(room, (lengths[row], 0))
        if place < len(room):
            left, index = room.pop(place)
            bins[index].append(row)
        else:
            left, index = budget, len(bins)
            bins.append([row])
        insort(room, (left - lengths[row], index))
    return bins


def make_batch(rows: Sequence[EncodedRow]) -> RaggedBatch:
    """Put rows one after another into a ragged batch.

    Example:
        >>> row = EncodedRow("a:1", torch.tensor([1, 2], dtype=torch.int32), torch.tensor([False, True]))
        >>> make_batch([row, row]).lengths
        (2, 2)
    """
    return RaggedBatch(
        token_ids=torch.cat([row.token_ids for row in rows]).long(),
        supervised=torch.cat([row.supervised for row in rows]),
        lengths=tuple(len(row.token_ids) for row in rows),
    )
