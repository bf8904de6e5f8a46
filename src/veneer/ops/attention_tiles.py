"""Causal attention in float32 on the processor's matrix tiles: scores never leave the caches.

Shapes: T tokens of all sequences, H query heads, K key heads, E head size.
"""

import heapq
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from veneer.ops import native
from veneer.ops.attention_blocks import Parts
from veneer.ops.attention_layout import Span

MOST_UNEVEN = 1.5
"""The slowest thread may take so many times its even share: a sequence and a key head are one thread's."""


def chosen(spans: Sequence[Span], given: Parts, window: int | None) -> list[Span]:
    """Return the sequences that are computed here, the longest first: all that continue none and see all before them.

    None where there are no tiles, for other dtypes than float32, and where threads would wait for one of them.

    Example:
        >>> one = torch.ones(2, 1, 8, dtype=torch.float64)
        >>> chosen([Span(slice(0, 2))], (one, one, one), None)
        []
    """
    fits = all(one.dtype == torch.float32 and one.device.type == "cpu" and one.stride(-1) == 1 for one in given)
    if not fits or not native.has_tiles():
        return []
    own = [span for span in spans if span.before is None and (window is None or window >= span.length)]
    own.sort(key=lambda span: -span.length)
    key_heads = given[1].shape[1]
    return own if _evenly(tuple(span.length for span in own), key_heads, torch.get_num_threads()) else []


@lru_cache(maxsize=256)
def _evenly(lengths: tuple[int, ...], heads: int, threads: int) -> bool:
    """Tell whether threads that take what comes next, the longest first, end nearly together."""
    busy = [0.0] * threads
    for length in lengths:
        for _ in range(heads):
            heapq.heapreplace(busy, busy[0] + length * length)
    return threads * max(busy) <= MOST_UNEVEN * sum(busy)


def forward(given: Parts, out_THE: Tensor, spans: Sequence[Span], scaling: float) -> None:
    """Write the outputs of some sequences, the longest first."""
    if spans:
        _call("attend", (*given, out_THE), spans, given, scaling)


def backward(given: Parts, dout_THE: Tensor, wanted: Parts, spans: Sequence[Span], scaling: float) -> None:
    """Write the gradients of queries, keys and values of some sequences; scores are computed again."""
    if spans:
        dout_THE = dout_THE if dout_THE.stride(-1) == 1 else dout_THE.contiguous()
        _call("attend_gradient", (*given, dout_THE, *wanted), spans, given, scaling)


def _call(name: str, tensors: Sequence[Tensor], spans: Sequence[Span], given: Parts, scaling: float) -> None:
    rows = [part for one in tensors for part in (one, one.stride(0), one.stride(1))]
    starts, lengths = torch.tensor([[span.rows.start for span in spans], [span.length for span in spans]])
    (_, heads, size), group = given[0].shape, given[0].shape[1] // given[1].shape[1]
    sizes = (len(spans), heads, group, size, float(scaling), torch.get_num_threads())
    native.on_tiles(name, *rows, starts, lengths, *sizes)
