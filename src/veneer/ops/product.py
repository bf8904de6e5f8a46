"""Matrix products in the form that runs fastest on the processor at hand.

Shapes: N rows, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import native, tiles
from veneer.ops.keeping import Keep, room


def _find_onednn(form: str) -> Callable[..., Tensor] | None:
    """Return oneDNN's linear, which torch's own compiler calls: as it is (`default`), or onto a tensor (`binary`)."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return getattr(torch.ops.mkldnn._linear_pointwise, form)
    except AttributeError:
        return None


def _blas_is_quicker() -> bool:
    """Tell whether the BLAS beats oneDNN in float32, by the processor's maker.

    The BLAS of torch's builds for x86 is Intel's. On Intel's processors it is 7 to 20 % quicker than oneDNN for large
    products and as quick for skinny ones; on AMD's it is 10 % slower for large ones and up to 10 times for skinny ones.
    """
    is_intel = str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("Intel")
    return is_intel and torch.backends.mkl.is_available()


BLAS_IS_QUICKER = _blas_is_quicker()
"""Whether the BLAS beats oneDNN in float32 here; torch's attention kernel is made of its products."""

_ONEDNN = None if BLAS_IS_QUICKER else _find_onednn("default")
_ONEDNN_ONTO = _find_onednn("binary")

IN_PASSING = 1.0
"""`share` of `merging_pays` where the weight is written anyway: decoded, or scaled."""

BY_ITSELF = 1.0 if _ONEDNN is not None else 2.5 if native.kernels() is not None else 4.0
"""`share` of `merging_pays` where a copy of the weight is made for it: dear where skinny products are not."""


def product(x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None = None, keep: Keep | None = None) -> Tensor:
    """Return `x Wᵀ + bias`, without a gradient of its own.

    Equals `F.linear(x, W, bias)` up to rounding. In float32 on a CPU it goes to the processor's matrix tiles where it
    has such, see `ops.tiles.multiply`, else to oneDNN where that is quicker than the BLAS, which its maker decides.
    Either side may be a transposed view, a small one best `laid_out`. A product that sums over rows, `dYᵀ Z`, is best
    given as `sum_product(Z, dY).T`.

    Args:
        x_NI: Left side.
        W_OI: Right side, rows of which are outputs.
        bias_O: Added to each row, or None.
        keep: Gives room for the result; oneDNN writes where it likes.

    Example:
        >>> product(torch.ones(2, 3), torch.ones(4, 3))[0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if tiles.multiplies(x_NI, W_OI, bias_O):
        return tiles.multiply(x_NI, W_OI, bias_O, room(keep, (x_NI.shape[0], W_OI.shape[0]), x_NI))
    on_cpu = x_NI.device.type == "cpu" and x_NI.dtype == W_OI.dtype == torch.float32
    if _ONEDNN is not None and on_cpu and 0 not in (x_NI.shape[0], *W_OI.shape):
        return _ONEDNN(x_NI, W_OI, bias_O, "none", [], "")
    if keep is None:
        return F.linear(x_NI, W_OI, bias_O)
    return product_into(room(keep, (x_NI.shape[0], W_OI.shape[0]), x_NI), x_NI, W_OI, bias_O)


def product_into(out_NO: Tensor, x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Write `x Wᵀ + bias` into a tensor and return it, without a gradient; never by oneDNN, which writes elsewhere.

    Example:
        >>> product_into(torch.empty(2, 4), torch.ones(2, 3), torch.ones(4, 3))[0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if tiles.multiplies(x_NI, W_OI, bias_O, out_NO):
        return tiles.multiply(x_NI, W_OI, bias_O, out_NO)
    if bias_O is None:
        return torch.mm(x_NI, W_OI.T, out=out_NO)
    return torch.addmm(bias_O, x_NI, W_OI.T, out=out_NO)


def product_onto(plus_NO: Tensor, x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + bias + plus`, summed before it is rounded, without a gradient of its own.

    In 16 bits `product(x, W) + plus` rounds the product first, and what is less than half a digit of it is lost: of an
    update that a training step gave an adapter, nine tenths (measured). Here, where the sum is that of the product, all
    of it counts on average. A bias in 16 bits is added afterwards on other devices than CPUs.

    Args:
        plus_NO: What the product is added to; it is written into, or not, and of no use afterwards.
        x_NI: Left side.
        W_OI: Right side, rows of which are outputs.
        bias_O: Added to each row, or None.

    Example:
        >>> product_onto(torch.full((1, 1), 2**-9).bfloat16(), torch.ones(1, 1).bfloat16(), torch.ones(1, 1).bfloat16())
        tensor([[1.]], dtype=torch.bfloat16)
        >>> x, W = torch.tensor([[1.0, 2**-8]]).bfloat16(), torch.ones(1, 2).bfloat16()
        >>> product_onto(torch.full((1, 1), 2**-8).bfloat16(), x, W), product(x, W) + 2**-8
        (tensor([[1.0078]], dtype=torch.bfloat16), tensor([[1.]], dtype=torch.bfloat16))
    """
    by_tiles = tiles.multiplies(x_NI, W_OI, bias_O, plus_NO)
    by_onednn = bias_O is not None or (_ONEDNN is not None and x_NI.dtype == torch.float32)
    on_cpu = x_NI.device.type == "cpu" and 0 not in (*x_NI.shape, *W_OI.shape)
    if not by_tiles and by_onednn and _ONEDNN_ONTO is not None and on_cpu:
        return _ONEDNN_ONTO(x_NI, plus_NO, W_OI, bias_O, "add")
    add_product(plus_NO, x_NI, W_OI)
    return plus_NO if bias_O is None else plus_NO.add_(bias_O)


def add_product(sums_NO: Tensor, x_NI: Tensor, W_OI: Tensor) -> Tensor:
    """Add `x Wᵀ` to a tensor and return it, without a gradient; never by oneDNN.

    Example:
        >>> add_product(torch.ones(2, 4), torch.ones(2, 3), torch.ones(4, 3))[0].tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    if tiles.multiplies(x_NI, W_OI, sums_NO):
        return tiles.multiply(x_NI, W_OI, None, sums_NO, onto=True)
    return sums_NO.addmm_(x_NI, W_OI.T)


def laid_out(view: Tensor) -> Tensor:
    """Return a transposed view as products want it: oneDNN with rows side by side in memory, the BLAS as it is."""
    return view if _ONEDNN is None else view.contiguous()


def sum_product(z_NR: Tensor, y_NO: Tensor) -> Tensor:
    """Return `zᵀ y`, shape (R, O): the gradient of a factor.

    Example:
        >>> sum_product(torch.ones(5, 2), torch.ones(5, 3)).tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    return product(laid_out(z_NR.T), y_NO.T)


def merging_pays(num_rows: int, shape: Sequence[int], dtype: torch.dtype, share: float = BY_ITSELF) -> bool:
    """Tell whether `x (W + s B A)ᵀ` is cheaper than `x Wᵀ + s (x Aᵀ) Bᵀ`, forward and backward.

        N (I + O) >= share · I · O

    Merging costs 2·R·I·O operations each way, the factored form 2·N·R·(I + O): the rank drops out. What is left is
    how much dearer it is to pass over the weight than over inputs and outputs, which was measured. In 16 bits nothing
    is ever merged: the update would be rounded away.

    Args:
        num_rows: N.
        shape: (O, I).
        dtype: What is computed in.
        share: `BY_ITSELF` or `IN_PASSING`.

    Example:
        >>> [merging_pays(rows, (512, 512), torch.float32, IN_PASSING) for rows in (255, 256)]
        [False, True]

    Source:
        Cherniuk et al. 2023, RunLoRA, arXiv:2312.03415, forward2 and backward4.
    """
    out_features, in_features = shape
    return dtype.itemsize >= 4 and num_rows * (in_features + out_features) >= share * in_features * out_features
