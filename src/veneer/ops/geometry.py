"""How the kernel of a convolution goes over its input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a kernel goes over its input, with a number for each axis of it; the padding is of zeros.

    Args:
        stride: Steps from place to place.
        padding: Zeros before and behind.
        dilation: Steps from one number of the kernel to the next.
        groups: Parts of the channels that are computed apart.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def places(self, sizes: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of an output.

        Example:
            >>> Geometry((2,), (1,), (1,), 1).places([8], [3])
            (4,)
        """
        axes = zip(sizes, taps, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * pad - gap * (tap - 1) - 1) // step + 1 for size, tap, step, pad, gap in axes)

    def turned(self, taps: Sequence[int]) -> "Geometry":
        """Return how a kernel goes over an output's gradient, turned round, to give that of the input; strides of one.

        Example:
            >>> Geometry((1,), (0,), (1,), 1).turned([3])
            Geometry(stride=(1,), padding=(2,), dilation=(1,), groups=1)
        """
        axes = zip(taps, self.padding, self.dilation, strict=True)
        return self._replace(padding=tuple(gap * (tap - 1) - pad for tap, pad, gap in axes))

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return torch's convolution."""
        stride, padding, dilation, groups = self
        return torch.convolution(x, kernel, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    def input_gradient(self, dy: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """Return the gradient of the input, as torch computes it."""
        return self._gradient(dy, x, kernel, 0)

    def kernel_gradient(self, dy: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """Return the gradient of the kernel, as torch computes it."""
        return self._gradient(dy, x, kernel, 1)

    def _gradient(self, dy: Tensor, x: Tensor, kernel: Tensor, place: int) -> Tensor:
        stride, padding, dilation, groups = self
        none, wanted = [0] * len(stride), [one == place for one in range(3)]
        found: Sequence[Tensor] = torch.ops.aten.convolution_backward(
            dy, x, kernel, None, stride, padding, dilation, False, none, groups, wanted
        )
        return found[place]
