"""Int8 codes with a scale for each row, made so that decoding them is exact.

Shapes: R rows, C columns.
"""

import torch
from torch import Tensor

CHUNK = 1 << 21
"""How many weights are rounded at a time: the temporaries of a large layer stay at 8 MiB."""

_SMALLEST_SCALE = 2.0**-120
_LARGEST_SCALE = 132_104 * 2.0**104
"""The largest scale of 17 significant bits whose 127-fold is a finite float32."""


def exact_scale(absmax_R: Tensor) -> Tensor:
    """Return the scale that brings a largest magnitude to 127 or just below, with 17 significant bits.

    Equals `absmax / 127` rounded up to 17 bits. A code of 7 bits times 17 bits is a float32 without rounding: decoding
    is exact, and coding what was decoded gives the same codes and the same scale.

    Args:
        absmax_R: Float32, finite, not negative.

    Returns:
        Float32, at most 2**-16 above absmax / 127 but never below 2**-120, so that a row of zeros divides by no zero.

    Example:
        >>> exact_scale(torch.tensor([127.0, 0.0, 1.0])).tolist()
        [1.0, 7.52316384526264e-37, 0.007874131202697754]
    """
    bits_R = absmax_R.div(127).view(torch.int32)
    up_R = ((bits_R + 0x7F) & ~0x7F).view(torch.float32)
    return up_R.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)


def to_int8(values_RC: Tensor, codes_RC: Tensor, scale_R: Tensor) -> None:
    """Write the int8 codes of each row, and its scale, so that `codes * scale` is nearest to the values.

    The error is at most half a scale for each value.

    Args:
        values_RC: Floating, finite.
        codes_RC: Int8; written.
        scale_R: Float32; written.

    Example:
        >>> codes, scale = torch.empty(1, 3, dtype=torch.int8), torch.empty(1)
        >>> to_int8(torch.tensor([[254.0, -3.0, 0.9]]), codes, scale)
        >>> codes.tolist(), scale.tolist()
        ([[127, -2, 0]], [2.0])
    """
    step = max(1, CHUNK // max(1, values_RC.shape[1]))
    for start in range(0, values_RC.shape[0], step):
        chunk = values_RC[start : start + step].to(torch.float32)
        scale = exact_scale(chunk.abs().amax(1))
        scale_R[start : start + step] = scale
        codes_RC[start : start + step] = chunk.div(scale[:, None]).round_().clamp_(-127, 127)
