"""Rows that begin alike: what they share stands in a batch once, and each continues it with its own rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from veneer.base.ragged import RaggedBatch
from veneer.data.batches import Step, make_batch, pack
from veneer.data.encode import EncodedRow

GROUP_COST = 32
"""Tokens that a group must save before it saves anything: its attention takes more and smaller calls."""


@dataclass(frozen=True)
class Group:
    """Rows that share their first tokens.

    Args:
        rows: Places of two or more rows.
        length: How many tokens they share.
    """

    rows: tuple[int, ...]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return (len(self.rows) - 1) * self.length


def shared_groups(rows: Sequence[EncodedRow]) -> list[Group]:
    """Return the rows that share a beginning where that pays, each in one group at most.

    What is shared ends before the token that predicts a row's first supervised one, for what it predicts may differ
    from row to row; and before a row's last token. It pays where a group saves more than `GROUP_COST` tokens. Nothing
    else is to be weighed: the scores of a row's own tokens are the same ones, and no more keys are kept than for whole
    rows. Of the ways to cut the sorted rows into groups, the one that saves most is taken.

    Cost:
        Sorting, and (number of rows)² / 2 elements of numpy's arithmetic.

    Example:
        >>> import torch
        >>> marks = torch.tensor([False] * 40 + [True])
        >>> row = EncodedRow("a:1", torch.arange(41, dtype=torch.int32), marks)
        >>> shared_groups([row, row])
        [Group(rows=(0, 1), length=39)]
    """
    heads = [_shareable(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (heads[place].tobytes(), place))
    common = [_common(heads[one], heads[other]) for one, other in pairwise(order)]
    return [Group(tuple(order[start:stop]), min(common[start : stop - 1])) for start, stop in _best_runs(common)]


def make_shared_batch(rows: Sequence[EncodedRow]) -> RaggedBatch:
    """Put rows into a ragged batch, what they share once; those that share nothing in their order at the end.

    Where nothing is shared it is `make_batch(rows)`. Its `expanded()` has the same rows, perhaps in another order.

    Example:
        >>> import torch
        >>> row = EncodedRow("a:1", torch.arange(41, dtype=torch.int32), torch.tensor([False] * 40 + [True]))
        >>> batch = make_shared_batch([row, row])
        >>> batch.lengths, batch.prefixes
        ((39, 2, 2), (None, 0, 0))
    """
    groups = shared_groups(rows)
    if not groups:
        return make_batch(rows)
    parts: list[EncodedRow] = []
    prefixes: list[int | None] = []
    for group in groups:
        first = rows[group.rows[0]]
        prefix = len(parts)
        parts.append(EncodedRow(first.source, *(part[: group.length] for part in (first.token_ids, first.supervised))))
        longest_first = sorted(group.rows, key=lambda place: (-len(rows[place].token_ids), place))
        for row in (rows[place] for place in longest_first):
            parts.append(EncodedRow(row.source, *(part[group.length :] for part in (row.token_ids, row.supervised))))
        prefixes += [None, *[prefix] * len(group.rows)]
    alone = sorted(set(range(len(rows))) - {place for group in groups for place in group.rows})
    parts += [rows[place] for place in alone]
    whole = make_batch(parts)
    return RaggedBatch(whole.token_ids, whole.supervised, whole.lengths, None, (*prefixes, *[None] * len(alone)))


def gather_sharers(step: Step, rows: Sequence[EncodedRow]) -> Step:
    """Return a step's rows in micro-batches in which those that share a beginning meet, where that saves more.

    A pure function of the rows. There are as many micro-batches as before or fewer, and none has more tokens than the
    largest had (of those of more than one row), counted as if nothing were shared: what attention keeps of a row has
    its whole length.

    Args:
        step: Row numbers of each micro-batch.
        rows: All rows.
    """
    numbers = [number for micro in step for number in micro]
    lengths = {number: len(rows[number].token_ids) for number in numbers}
    budget = max((sum(lengths[number] for number in micro) for micro in step if len(micro) > 1), default=0)
    if len(step) < 2 or not budget:
        return step
    groups = [[numbers[place] for place in one.rows] for one in shared_groups([rows[number] for number in numbers])]
    pieces = [piece for group in groups for piece in _cut(group, lengths, budget)]
    together = {number for piece in pieces for number in piece}
    pieces += [[number] for number in numbers if number not in together]
    sizes = [sum(lengths[number] for number in piece) for piece in pieces]
    found = [[number for place in one for number in pieces[place]] for one in pack(range(len(pieces)), sizes, budget)]
    found = [sorted(micro, key=lambda number: (-lengths[number], number)) for micro in found]
    return found if len(found) <= len(step) and saved_tokens(found, rows) > saved_tokens(step, rows) else step


def saved_tokens(step: Step, rows: Sequence[EncodedRow]) -> int:
    """Return how many tokens of a step are not computed because rows of a micro-batch share them."""
    return sum(group.saved for micro in step for group in shared_groups([rows[number] for number in micro]))


def _shareable(row: EncodedRow) -> NDArray[np.int32]:
    """Return the tokens of a row that may be shared, as big-endian numbers, whose bytes sort as they do."""
    supervised = row.supervised.numpy()
    first = int(supervised.argmax()) if supervised.any() else len(supervised)
    return row.token_ids[: max(0, first - 1)].numpy().astype(">i4")


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Return how many numbers two arrays begin with alike."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size


def _best_runs(common: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of sorted rows, two or more each, that save most; `common` says what neighbours share."""
    count = len(common) + 1
    best = np.zeros(count + 1, np.int64)  # saved among the first so many rows
    begin = [0, *range(count)]  # where the last run of these begins, perhaps of one row
    least = np.zeros(count, np.int64)  # what all rows from each one on share
    for row in range(1, count):
        least[row - 1] = common[row - 1]
        np.minimum(least[:row], common[row - 1], out=least[:row])
        saved = (row - np.arange(row)) * least[:row] - GROUP_COST
        start = int((best[:row] + saved).argmax())
        best[row + 1], begin[row + 1] = best[row], row
        if saved[start] > 0 and best[start] + saved[start] > best[row]:
            best[row + 1], begin[row + 1] = best[start] + saved[start], start
    runs, stop = [], count
    while stop > 0:
        if stop - begin[stop] > 1:
            runs.append((begin[stop], stop))
        stop = begin[stop]
    return runs[::-1]


def _cut(group: list[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Return the rows of a group in pieces of at most so many tokens, or of one row."""
    pieces: list[list[int]] = []
    room = 0
    for number in group:
        if not pieces or lengths[number] > room:
            pieces.append([])
            room = budget
        pieces[-1].append(number)
        room -= lengths[number]
    return pieces
