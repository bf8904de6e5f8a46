"""Convolutions of float32 on the processor's matrix tiles, which multiply bfloat16 (AMX).

Shapes: N a batch, I and O channels, k… a kernel.
"""

import math

import torch
from torch import Tensor

from veneer.ops import native, tiles
from veneer.ops.geometry import Geometry

FEWEST_PLACES = 256
"""Places of the output, of all samples, from which on splitting the kernel into parts of bfloat16 pays."""
LEAST_FILLED = 0.65
"""The share of a tile's numbers that must be ones of the tensors for `convolve` to be quicker than torch."""
_AXES = 3


def convolves(x: Tensor, kernel: Tensor, geometry: Geometry, *, turned: bool = False) -> bool:
    """Tell whether `convolve` takes some tensors, and is quicker than torch.

    It does in float32 on the CPU, without groups, where no gradient is asked: for many places, in lines of nearly a
    multiple of 16, and channels of nearly a multiple of 32, a turned kernel with strides of one.

    Example:
        >>> once = Geometry((1,), (0,), (1,), 1)
        >>> convolves(torch.ones(8, 4, 64), torch.ones(64, 4, 1), once)
        False
    """
    if x.dtype != torch.float32 or geometry.groups > 1 or not native.suits(x, kernel) or not tiles.has_tiles():
        return False
    if (torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)) or not (
        x.is_contiguous() and kernel.is_contiguous()
    ):
        return False
    if turned and max(geometry.stride) > 1:
        return False
    taps, outputs = kernel.shape[2:], kernel.shape[1 if turned else 0]
    places = (geometry.turned(taps) if turned else geometry).places(x.shape[2:], taps)
    filled = _filled(x.shape[1], 32) * _filled(outputs, 32) * _filled(places[-1], 16)
    return len(x) * math.prod(places) >= FEWEST_PLACES and min(places) > 0 and filled >= LEAST_FILLED


def _filled(size: int, side: int) -> float:
    """Return the share of whole tiles that some numbers fill."""
    return size / max(1, -(-size // side) * side)


def convolve(x: Tensor, kernel: Tensor, bias_O: Tensor | None, geometry: Geometry, *, turned: bool = False) -> Tensor:
    """Apply a convolution in float32, computed on matrix tiles.

    Equals, as nearly as two convolutions in float32 do, and is tested against:

        geometry.convolve(x, kernel, bias)
        torch.nn.grad.conv2d_input(sizes, kernel, x, *geometry)  # turned: x is an output's gradient

    As `ops.tiles.multiply` says: each number is taken as the sum of three bfloat16, and a sample of the result depends
    on its own numbers alone, to the last bit.

    Args:
        x: Input, shape (N, I, …) of one to three axes, contiguous; the gradient of an output, (N, O, …), if `turned`.
        kernel: (O, I, k…), contiguous.
        bias_O: Added to each channel, or None.
        geometry: How the kernel goes over the input; of the forward, if `turned`.
        turned: Computes the gradient of the input.

    Returns:
        Tensor (N, O, …), or (N, I, …) if `turned`.

    Raises:
        MemoryError: If there is none for the parts.

    Cost:
        12·N·P·I·O·k operations in bfloat16 for P places, half of the time of torch's where tiles are filled. Beside the
        tensors 6 bytes for each number of the kernel, no more than 16 MiB at a time, and 1 MiB a thread.

    Example:
        >>> once, x, kernel = Geometry((1,), (0,), (1,), 1), torch.ones(8, 64, 64), torch.ones(64, 64, 1)
        >>> convolve(x, kernel, None, once)[0, 0, 0].item() if convolves(x, kernel, once) else 64.0
        64.0

    Source:
        Henry, Tang, Heinecke 2019, arXiv:1904.06376, section II, for the parts.
    """
    taps, outputs = kernel.shape[2:], kernel.shape[1 if turned else 0]
    used = geometry.turned(taps) if turned else geometry
    places = used.places(x.shape[2:], taps)
    out = x.new_empty(len(x), outputs, *places)
    axes = ((x.shape[2:], 1), (taps, 1), (places, 1), (used.stride, 1), (used.padding, 0), (used.dilation, 1))
    filled_up = [number for given, other in axes for number in ((other,) * (_AXES - len(given)) + tuple(given))]
    sizes = torch.tensor([len(x), x.shape[1], outputs, int(turned), *filled_up])
    tiles.on_tiles("convolve", out, x, kernel, 0 if bias_O is None else bias_O, out, sizes)
    return out
