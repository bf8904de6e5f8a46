"""Which rows a step trains on: a pure function of the lengths, the seed and the epoch; no loader has any state."""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from veneer.base.ragged import RaggedBatch
from veneer.data.encode import EncodedRow

Lengths = Sequence[int] | NDArray[np.int64]
"""Tokens of each row."""

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
    lengths: Lengths, *, seed: int, epoch: int, tokens_per_step: int, tokens_per_micro_batch: int
) -> list[Step]:
    """Return the optimiser steps of an epoch; each row stands in exactly one micro-batch.

    The steps share the rows out evenly: there are `ceil(tokens / tokens_per_step)` of them, none a small rest. Within
    a step, rows are packed so that no micro-batch passes its budget, unless a single row does.

    Example:
        >>> steps = epoch_steps([4] * 6, seed=0, epoch=0, tokens_per_step=12, tokens_per_micro_batch=8)
        >>> [[len(micro) for micro in step] for step in steps]
        [[2, 1], [2, 1]]
    """
    order_N = np.array(row_order(len(lengths), seed, epoch))
    lengths_N = np.asarray(lengths, np.int64)[order_N]
    total = int(lengths_N.sum())
    num_steps = -(-total // tokens_per_step)
    middle_N = lengths_N.cumsum() - lengths_N + lengths_N / 2
    step_N = (middle_N * num_steps / total).astype(np.int64)  # never falls, so that each step is a run of the order
    bounds = np.flatnonzero(np.diff(step_N)) + 1
    known = np.asarray(lengths).tolist()  # plain numbers compare faster than those of an array
    return [pack(rows.tolist(), known, tokens_per_micro_batch) for rows in np.split(order_N, bounds)]


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
