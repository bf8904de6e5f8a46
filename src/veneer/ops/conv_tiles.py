"""Convolutions of float32 on the processor's matrix tiles, as products that read shifted inputs in place.

Shapes: N a batch, I and O channels, k… a kernel, K = I · k…, P places of the padded input that make outputs.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import tiles

MOST_WASTE = 1.25
"""Products are formed for so many times the places of the output: those between its rows, which are left out, too."""


class _Sizes(NamedTuple):
    """What follows from the shapes: those of the output, strides and size of a padded channel, and number of places."""

    out: tuple[int, ...]
    strides: tuple[int, ...]
    channel: int
    places: int

    @property
    def waste(self) -> float:
        return self.places / math.prod(self.out)


def _sizes(x: Tensor, kernel: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> _Sizes:
    padded = [size + 2 * more for size, more in zip(x.shape[2:], padding, strict=True)]
    reach = [apart * (size - 1) for size, apart in zip(kernel.shape[2:], dilation, strict=True)]
    out = tuple(size - less for size, less in zip(padded, reach, strict=True))
    strides = tuple(math.prod(padded[axis + 1 :]) for axis in range(len(padded)))
    places = 1 + sum((size - 1) * stride for size, stride in zip(out, strides, strict=True))
    return _Sizes(out, strides, math.prod(padded), places)


@lru_cache(maxsize=256)
def _starts(kernel: tuple[int, ...], strides: tuple[int, ...], channel: int, dilation: tuple[int, ...]) -> Tensor:
    """Return how far behind the first of an output's inputs each of them stands, (K,)."""
    steps = (channel, *(stride * apart for stride, apart in zip(strides, dilation, strict=True)))
    found = torch.zeros(1, dtype=torch.int64)
    for size, step in zip(kernel, steps, strict=True):
        found = (found[:, None] + torch.arange(size) * step).flatten()
    return found


def convolves(x: Tensor, kernel: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Tell whether `convolve` takes a convolution of stride one, without groups, and is quicker than torch's.

    Example:
        >>> convolves(torch.ones(1, 64, 8).double(), torch.ones(64, 64, 1).double(), (0,), (1,))
        False
    """
    if x.ndim < 3 or not tiles.has_tiles() or min(padding) < 0:
        return False
    sizes = _sizes(x, kernel, padding, dilation)
    if min(sizes.out) < 1:
        return False
    small = min(len(kernel), kernel[0].numel(), sizes.places) < tiles.FEWEST
    trains = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    fits = all(one.dtype == torch.float32 and one.device.type == "cpu" for one in (x, kernel))
    return fits and not (small or trains or torch.compiler.is_compiling()) and sizes.waste <= MOST_WASTE


def convolve(x: Tensor, kernel: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return a convolution of stride one, without a gradient; rows of the output lie as far apart as padded ones do.

    Equals, as nearly as two products in float32 do, and is tested against:

        torch.convolution(x, kernel, None, 1, padding, dilation, transposed=False, output_padding=0, groups=1)

    Every place of the padded input, row after row, is taken for the first of an output's inputs, the others of which
    stand at the same distances behind it, so that nothing is copied out; what comes from the end of a row is left out.

    Args:
        x: Input, (N, I, …).
        kernel: (O, I, k…).
        padding: Zeros on either side of each axis.
        dilation: How far a kernel's numbers lie apart.

    Returns:
        Tensor (N, O, …), a view of (N, O, P).

    Cost:
        2·N·O·K·P operations as `ops.tiles.multiply` computes them; a padded copy of the input.

    Example:
        >>> x, kernel = torch.ones(1, 64, 9, 9), torch.ones(64, 64, 3, 3)
        >>> fits = convolves(x, kernel, (1, 1), (1, 1))
        >>> convolve(x, kernel, (1, 1), (1, 1))[0, 0, 4, 4].item() if fits else 576.0
        576.0
    """
    sizes = _sizes(x, kernel, padding, dilation)
    padded = F.pad(x, [side for one in reversed(padding) for side in (one, one)]).contiguous()
    starts_K = _starts(tuple(kernel.shape[1:]), sizes.strides, sizes.channel, tuple(dilation))
    samples, outputs = len(x), len(kernel)
    out_NOP = x.new_empty(samples * outputs * sizes.places)
    given = (
        kernel.contiguous(),
        padded,
        padded.stride(0),
        starts_K,
        out_NOP,
        samples,
        outputs,
        sizes.places,
        len(starts_K),
    )
    tiles.on_tiles("multiply_shifted", x, *given)
    strides = (outputs * sizes.places, sizes.places, *sizes.strides)
    return out_NOP.as_strided((samples, outputs, *sizes.out), strides)
