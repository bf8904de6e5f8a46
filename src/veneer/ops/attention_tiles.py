"""Causal attention on the processor's matrix tiles: scores never leave the caches.

Shapes: T tokens of all sequences, H query heads, K key heads, E head size, A tokens of all prefixes, each counted for
every sequence that continues it.
"""

import heapq
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from veneer.ops import native, tiles
from veneer.ops.attention_blocks import Parts
from veneer.ops.attention_layout import Span

MOST_UNEVEN = 1.5
"""The slowest thread may take so many times its even share: a sequence and a key head are one thread's."""


def chosen(spans: Sequence[Span], given: Parts, window: int | None) -> list[Span]:
    """Return the sequences that are computed here, those with most to do first: all that see all before them.

    None where there are no tiles, for other dtypes than float32 and bfloat16, and where threads would wait for one of
    them.

    Example:
        >>> one = torch.ones(2, 1, 8, dtype=torch.float64)
        >>> chosen([Span(slice(0, 2))], (one, one, one), None)
        []
    """
    if not native.suits(*given) or not tiles.has_tiles():
        return []
    own = [span for span in spans if window is None or window >= span.before_length + span.length]
    own.sort(key=lambda span: -_scores(span))
    scores = tuple(_scores(span) for span in own)
    return own if _unevenness(scores, given[1].shape[1], torch.get_num_threads()) <= MOST_UNEVEN else []


def _scores(span: Span) -> int:
    """Return twice the number of scores of a sequence."""
    return span.length * (2 * span.before_length + span.length)


@lru_cache(maxsize=256)
def _unevenness(scores: tuple[int, ...], heads: int, threads: int) -> float:
    """Return how many times its even share the slowest has, of threads that take what comes next, the most first."""
    busy = [0] * threads
    for count in scores:
        for _ in range(heads):
            heapq.heapreplace(busy, busy[0] + count)
    return threads * max(busy) / max(1, sum(busy))


def forward(given: Parts, out_THE: Tensor, spans: Sequence[Span], scaling: float) -> None:
    """Write the outputs of some sequences."""
    if spans:
        tiles.on_tiles("attend", out_THE, *_rows(*given, out_THE), *_sizes(given, spans, scaling))


def backward(given: Parts, dout_THE: Tensor, wanted: Parts, spans: Sequence[Span], scaling: float) -> None:
    """Write the gradients of queries, keys and values of some sequences; scores are computed again.

    A prefix that is among them has its own gradient before those who continue it add to it.
    """
    if not spans:
        return
    dout_THE = dout_THE if dout_THE.stride(-1) == 1 else dout_THE.contiguous()
    before = sum(span.before_length for span in spans)
    dk_AKE, dv_AKE = aside = [torch.empty(before, *given[1].shape[1:]) for _ in range(2)]
    sizes = _sizes(given, spans, scaling)
    tiles.on_tiles("attend_gradient", dout_THE, *_rows(*given, dout_THE, *wanted), dk_AKE, dv_AKE, *sizes)
    for whole_TKE, part_AKE in zip(wanted[1:], aside, strict=True):
        _add_prefixes(whole_TKE, part_AKE, spans)


def _add_prefixes(whole_TKE: Tensor, part_AKE: Tensor, spans: Sequence[Span]) -> None:
    """Add to the gradient of each prefix what came aside for it, in float32, rounded once."""
    found: dict[tuple[int, int], Tensor] = {}
    at = 0
    for span in spans:
        if span.before is not None:
            part_PKE, key = part_AKE[at : at + span.before_length], (span.before.start, span.before.stop)
            found[key] = found[key] + part_PKE if key in found else part_PKE
            at += span.before_length
    for (start, stop), sum_PKE in found.items():
        whole_TKE[start:stop] += sum_PKE


def _rows(*tensors: Tensor) -> list[Tensor | int]:
    return [part for one in tensors for part in (one, one.stride(0), one.stride(1))]


def _sizes(given: Parts, spans: Sequence[Span], scaling: float) -> tuple[Tensor | int | float, ...]:
    """Return where sequences and their prefixes stand, and what all have in common."""
    places, aside = [], 0
    for span in spans:
        before = 0 if span.before is None else span.before.start
        places.append((span.rows.start, span.length, before, span.before_length, aside))
        aside += span.before_length
    (_, heads, size), group = given[0].shape, given[0].shape[1] // given[1].shape[1]
    return torch.tensor(places), len(spans), heads, group, size, float(scaling)
