"""Which sequences of a row attention computes together, and how their rows are laid out for it.

Shapes: T tokens of all sequences, G sequences of a bucket, S tokens of its longest, H query heads, K key heads,
Q = H / K query heads that share a key head, N = G·K, M = S·Q queries, P tokens of a prefix that sequences continue,
L = P + S keys, E head size.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 96
"""Places of a block of queries, at most."""

PADDING = 0.5
"""A bucket's shortest sequence has at least this share of its longest's length, or is a block shorter at most."""


class Span(NamedTuple):
    """Where a sequence stands.

    Args:
        rows: Its rows.
        before: Rows of the sequence that it continues, or None.
    """

    rows: slice
    before: slice | None = None

    @property
    def length(self) -> int:
        """Its own tokens."""
        return _size(self.rows)

    @property
    def before_length(self) -> int:
        """Tokens of the one that it continues."""
        return _size(self.before)


class Bucket(NamedTuple):
    """Sequences that are computed together, padded on the right: a query never sees what comes after it.

    Args:
        rows: Rows of each sequence, the longest first.
        before: Rows of the one sequence that all of these continue, or None.
    """

    rows: tuple[slice, ...]
    before: slice | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [_size(rows) for rows in self.rows]

    @property
    def before_length(self) -> int:
        """Tokens of the one that all continue."""
        return _size(self.before)

    @property
    def extent(self) -> slice:
        """From the first row of its first sequence to the last of its last."""
        return slice(self.rows[0].start, self.rows[-1].stop)

    @property
    def run(self) -> slice | None:
        """The rows of all where they follow each other and are of one length: nothing is padded then."""
        follow = all(one.stop == other.start for one, other in pairwise(self.rows))
        return self.extent if follow and len(set(self.lengths)) == 1 else None


def spans_of(lengths: Sequence[int], prefixes: Sequence[int | None] | None = None) -> list[Span]:
    """Return where sequences stand in a row, and those that they continue.

    Example:
        >>> spans_of((2, 1), (None, 0))
        [Span(rows=slice(0, 2, None), before=None), Span(rows=slice(2, 3, None), before=slice(0, 2, None))]
    """
    rows = [slice(stop - length, stop) for stop, length in zip(accumulate(lengths), lengths, strict=True)]
    parents = [None] * len(rows) if prefixes is None else prefixes
    return [Span(own, None if it is None else rows[it]) for own, it in zip(rows, parents, strict=True)]


def buckets_of(spans: Iterable[Span]) -> list[Bucket]:
    """Return sequences of like lengths together.

    Example:
        >>> [bucket.rows for bucket in buckets_of(spans_of((1, 2)))]
        [(slice(1, 3, None), slice(0, 1, None))]
        >>> [bucket.lengths for bucket in buckets_of(spans_of((100, 500, 450, 101)))]
        [[500, 450], [101, 100]]
    """
    longest_first = sorted(spans, key=lambda one: (_start(one.before), -one.length, one.rows.start))
    return _neighbours(
        longest_first,
        lambda group, span: span.length >= min(PADDING * group[0].length, group[0].length - BLOCK),
    )


def runs_of(spans: Iterable[Span]) -> list[Bucket]:
    """Return sequences of one length that follow each other together: buckets without padding.

    Example:
        >>> [bucket.rows for bucket in runs_of(spans_of((2, 2, 1)))]
        [(slice(0, 2, None), slice(2, 4, None)), (slice(4, 5, None),)]
    """
    return _neighbours(
        spans, lambda group, span: (span.length, span.rows.start) == (group[-1].length, group[-1].rows.stop)
    )


def _neighbours(spans: Iterable[Span], belongs: Callable[[list[Span], Span], bool]) -> list[Bucket]:
    """Return buckets of neighbours that continue the same and of which each belongs to those before it."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and groups[-1][0].before == span.before and belongs(groups[-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return [Bucket(tuple(one.rows for one in group), group[0].before) for group in groups]


def _size(rows: slice | None) -> int:
    return 0 if rows is None else rows.stop - rows.start


def _start(rows: slice | None) -> int:
    return -1 if rows is None else rows.start


def grouped(x_THE: Tensor, bucket: Bucket, heads: int, *, behind_prefix: bool = False) -> Tensor:
    """Return a bucket's rows, shape (N, M, E) for `heads` = K: place by place, Q of them each; 16 bits widened.

    Padding is zeros. Behind a prefix, those of the prefix come first, shape (N, L, E).
    """
    size, before = bucket.lengths[0], bucket.before_length if behind_prefix else 0
    shape = (len(bucket.rows), heads, before + size, x_THE.shape[1] // heads, x_THE.shape[2])
    wide = torch.promote_types(x_THE.dtype, torch.float32)
    out_GKLQE = torch.empty(shape, dtype=wide, device=x_THE.device)
    x_KTQE = x_THE.unflatten(1, (heads, -1)).transpose(0, 1)
    if before:
        out_GKLQE[:, :, :before] = x_KTQE[:, bucket.before]
    if (run := bucket.run) is not None:
        out_GKLQE[:, :, before:] = x_KTQE[:, run].unflatten(1, (-1, size)).transpose(0, 1)
        return out_GKLQE.flatten(2, 3).flatten(0, 1)
    for out_KLQE, rows in zip(out_GKLQE.unbind(), bucket.rows, strict=True):
        end = before + _size(rows)
        out_KLQE[:, before:end] = x_KTQE[:, rows]
        out_KLQE[:, end:].zero_()
    return out_GKLQE.flatten(2, 3).flatten(0, 1)


def scatter(out_THE: Tensor, part_GKME: Tensor, bucket: Bucket) -> None:
    """Put a bucket's rows where they belong, all but the padding: what `grouped` did, undone."""
    part_GSKQE = part_GKME.unflatten(2, (bucket.lengths[0], -1)).transpose(1, 2)
    out_TKQE = out_THE.unflatten(1, part_GSKQE.shape[2:4])
    if (run := bucket.run) is not None:
        out_TKQE[run].unflatten(0, part_GSKQE.shape[:2]).copy_(part_GSKQE)
        return
    for rows, part_SKQE in zip(bucket.rows, part_GSKQE.unbind(), strict=True):
        out_TKQE[rows] = part_SKQE[: _size(rows)]


def scatter_keys(out_TKE: Tensor, part_GKLE: Tensor, bucket: Bucket) -> None:
    """Put gradients of keys or values where they belong: a prefix, whose own are there, gets the sum over sequences."""
    before = bucket.before_length
    if bucket.before is not None:
        out_TKE[bucket.before] += part_GKLE[:, :, :before].sum(0).transpose(0, 1)
    scatter(out_TKE, part_GKLE[:, :, before:], bucket)
