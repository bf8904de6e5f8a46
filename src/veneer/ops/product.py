"""Matrix products in the form that runs fastest on the processor at hand.

Shapes: N rows, I in, O out, R rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MERGE_SHARE = 1.0
"""Merging a weight with its update pays from `N (I + O) >= MERGE_SHARE · I · O` on, see `merging_pays`."""


def _find_onednn() -> Callable[..., Tensor] | None:
    """Return oneDNN's linear, which torch's own compiler calls, where this build of torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_ONEDNN = _find_onednn()


def product(x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + bias`, without a gradient of its own.

    Equals `F.linear(x, W, bias)` up to rounding. In float32 on a CPU it goes to oneDNN instead of the BLAS: 10 %
    faster for large products, and up to 10 times for those with a rank for one of their sizes. Either side may be a
    transposed view. A product that sums over rows, `dYᵀ Z`, is best given as `product(Z.T.contiguous(), dY.T)`.

    Args:
        x_NI: Left side.
        W_OI: Right side, rows of which are outputs.
        bias_O: Added to each row, or None.

    Example:
        >>> product(torch.ones(2, 3), torch.ones(4, 3))[0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    on_cpu = x_NI.device.type == "cpu" and x_NI.dtype == W_OI.dtype == torch.float32
    if _ONEDNN is None or not on_cpu or 0 in (x_NI.shape[0], *W_OI.shape):
        return F.linear(x_NI, W_OI, bias_O)
    return _ONEDNN(x_NI, W_OI, bias_O, "none", [], "")


def sum_product(z_NR: Tensor, y_NO: Tensor) -> Tensor:
    """Return `zᵀ y`, shape (R, O): the gradient of a factor.

    Example:
        >>> sum_product(torch.ones(5, 2), torch.ones(5, 3)).tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    return product(z_NR.T.contiguous(), y_NO.T)


def merging_pays(num_rows: int, W_OI: Tensor | tuple[int, ...], dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether `x (W + s B A)ᵀ` is cheaper than `x Wᵀ + s (x Aᵀ) Bᵀ`, forward and backward.

    Merging costs 2·R·I·O operations each way, the factored form 2·N·R·(I + O): the rank drops out. In 16 bits nothing
    is ever merged: the update would be rounded away.

    Args:
        num_rows: N.
        W_OI: The weight, or its shape where it is stored in fewer bits.
        dtype: What is computed in, where only a shape is given.

    Example:
        >>> [merging_pays(rows, torch.ones(512, 512)) for rows in (255, 256)]
        [False, True]

    Source:
        Cherniuk et al. 2023, RunLoRA, arXiv:2312.03415, forward2 and backward4.
    """
    shape, dtype = (W_OI.shape, W_OI.dtype) if isinstance(W_OI, Tensor) else (W_OI, dtype)
    out_features, in_features = shape
    return dtype.itemsize >= 4 and num_rows * (in_features + out_features) >= MERGE_SHARE * in_features * out_features
