"""Products of float32 matrices on the processor's matrix tiles, which multiply bfloat16 (AMX).

Shapes: N rows, I in, O out, E matrices, S rows of all of them.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from veneer.ops import native

FEWEST = 64
"""Rows, columns and numbers of each from which on `multiply` is quicker than the BLAS."""


def has_tiles() -> bool:
    """Tell whether `multiply` is to be had: on processors with AMX and AVX-512 for bfloat16, under Linux.

    Example:
        >>> has_tiles() in (True, False)
        True
    """
    library = native.kernels()
    return library is not None and _asked_for_tiles(library)


@cache
def _asked_for_tiles(library: ctypes.CDLL) -> bool:
    return bool(library.veneer_has_tiles())


def multiplies(x_NI: Tensor, W_OI: Tensor, *others: Tensor | None) -> bool:
    """Tell whether `multiply` takes some tensors, and is quicker than the BLAS.

    It does in float32 on the CPU, where no gradient is asked, from 64 rows, outputs and inputs on, with rows or columns
    of both sides together in memory.

    Args:
        x_NI: Left side.
        W_OI: Right side.
        others: A bias, what is written; rows together in memory.

    Example:
        >>> one = torch.ones(64, 64)
        >>> multiplies(one, one[1:]), multiplies(one.double(), one.double())
        (False, False)
    """
    if min(*x_NI.shape, len(W_OI)) < FEWEST or x_NI.dtype != torch.float32 or not has_tiles():
        return False
    given = [x_NI, W_OI, *(one for one in others if one is not None)]
    trains = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    sides = (one if one.stride(1) == 1 else one.T for one in (x_NI, W_OI))
    return not trains and native.suits(*sides, *given[2:])


def multiply(x_NI: Tensor, W_OI: Tensor, bias_O: Tensor | None, out_NO: Tensor, *, onto: bool = False) -> Tensor:
    """Write `x Wᵀ + bias` in float32, computed on matrix tiles, or add the product to what is there; return `out`.

    Equals, as nearly as two products in float32 do, and is tested against:

        torch.addmm(bias, x, W.T, out=out)    # onto: out.addmm_(x, W.T)

    Each number is taken as the sum of three bfloat16, which it is to the last bit; six of the nine products of these
    are formed and summed in float32. A row of the result depends on its own inputs alone, to the last bit. Infinite
    numbers, and such as bfloat16 rounds to those, make it NaN; denormal ones count as zero.

    Args:
        x_NI: Left side.
        W_OI: Right side.
        bias_O: Added to each row, or None; not with `onto`.
        out_NO: What is written: no memory of the others.
        onto: Adds to what is in `out`.

    Raises:
        MemoryError: If there is none for the parts of the side with fewer rows.

    Cost:
        12·N·I·O operations in bfloat16, 1.4 to 1.6 times as quick as 2·N·I·O in float32. Beside the tensors 6 bytes for
        each number of 2,048 rows of one side, 1,024 columns of them at a time, and 1 MiB a thread.

    Example:
        >>> one = torch.ones(64, 64)
        >>> multiply(one, one, None, torch.empty(64, 64))[0, 0].item() if multiplies(one, one) else 64.0
        64.0

    Source:
        Henry, Tang, Heinecke 2019, arXiv:1904.06376, section II.
    """
    bias: Tensor | int = 0 if bias_O is None else bias_O
    sizes = (out_NO.stride(0), int(onto), len(x_NI), len(W_OI), x_NI.shape[1])
    given = (x_NI, *_laid(x_NI), W_OI, *_laid(W_OI), bias, out_NO, *sizes)
    on_tiles("multiply", out_NO, *given)
    return out_NO


def multiplies_each(x_SI: Tensor, W_EOI: Tensor, bias_EO: Tensor | None, out_SO: Tensor, counts: Sequence[int]) -> bool:
    """Tell whether `multiply_each` takes some tensors, and is quicker than a product for each: 64 rows on average.

    Example:
        >>> one = torch.ones(64, 64)
        >>> multiplies_each(one, one[None], None, one.clone(), [32, 32])
        False
    """
    used = sum(count > 0 for count in counts)
    rows_lie = x_SI.stride(1) == 1 and (bias_EO is None or bias_EO.is_contiguous())
    return rows_lie and len(x_SI) >= FEWEST * used > 0 and multiplies(x_SI, W_EOI[0], bias_EO, out_SO)


def multiply_each(
    x_SI: Tensor, W_EOI: Tensor, bias_EO: Tensor | None, out_SO: Tensor, counts: Sequence[int], *, onto: bool = False
) -> Tensor:
    """Do what `multiply` does for the rows of each of some matrices, in one go; return `out`.

    Equals, bit for bit:

        for rows, W, bias in zip(rows_of_each(counts), W_EOI, bias_EO):
            multiply(x[rows], W, bias, out[rows], onto=onto)

    Args:
        x_SI: Rows for the first matrix, then for the second, and so on.
        W_EOI: The matrices; a transposed view will do.
        bias_EO: A bias for each, or None.
        out_SO: What is written.
        counts: How many rows each has.
        onto: Adds to what is in `out`.

    Raises:
        MemoryError: If there is none for the parts of 2,048 rows.

    Cost:
        That of `multiply`, without threads that wait for each other between matrices.

    Example:
        >>> one = torch.ones(64, 64)
        >>> taken = multiplies_each(one, one[None], None, one.clone(), [64])
        >>> multiply_each(one, one[None], None, one.clone(), [64])[0, 0].item() if taken else 64.0
        64.0
    """
    bias: Tensor | int = 0 if bias_EO is None else bias_EO
    sizes = (len(W_EOI), W_EOI.shape[1], x_SI.shape[1])
    matrices = (W_EOI, W_EOI.stride(0), *_laid(W_EOI[0]))
    out = (out_SO, out_SO.stride(0), int(onto))
    on_tiles("multiply_each", out_SO, x_SI, x_SI.stride(0), *matrices, bias, *out, torch.tensor(counts), *sizes)
    return out_SO


def on_tiles(name: str, like: Tensor, *given: Tensor | int | float) -> None:
    """Call a kernel that uses matrix tiles, for the dtype of a tensor; what is given must be what it takes.

    Nobody checks that.

    Raises:
        MemoryError: If there was none for the parts of its numbers.
    """
    if not native.run(name, like, *given):
        raise MemoryError(f"no memory to {name} in parts of bfloat16")


def _laid(matrix: Tensor) -> tuple[int, int]:
    """Return how far the rows of a matrix lie apart, or its columns where those are what lies together, and which."""
    rows, columns = matrix.stride()
    return (rows, 0) if columns == 1 else (columns, 1)
