"""The kernels in C, where they were compiled: loops that torch would run as several passes over memory.

Each function here says what it computes in torch's words, and None or False where torch has to compute it.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h")))
LIBRARY = "kernels"
FEWEST = 64
"""Rows, columns and numbers of each from which on `multiply` is quicker than the BLAS."""

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there are none, or they are of another source than lies beside them."""
    paths = (SOURCES[0].with_name(f"{LIBRARY}{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((one for one in paths if one.exists()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.veneer_source.restype = ctypes.c_char_p
        compiled = library.veneer_source().decode()
    except (OSError, AttributeError):  # another processor's, or torch has no OpenMP to take threads from
        return None
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    return library if compiled == digest else None


def source() -> str | None:
    """Return the digest of the kernels that are used; None where torch computes all.

    Example:
        >>> source() is None or len(source()) == 64
        True
    """
    library = kernels()
    return None if library is None else library.veneer_source().decode()


def suits(first: Tensor, *others: Tensor) -> bool:
    """Tell whether kernels for training take some tensors: on the CPU, all float32 or all bfloat16, rows contiguous.

    Example:
        >>> suits(torch.ones(2, dtype=torch.float64)), suits(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
        (False, False)
    """
    if first.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling() or kernels() is None:
        return False
    alike = all(one.dtype == first.dtype for one in others)
    return alike and all(one.device.type == "cpu" and one.stride(-1) == 1 for one in (first, *others))


def run(name: str, like: Tensor, *given: Tensor | int | float) -> None:
    """Call a kernel for the dtype of a tensor; what is given must be what it takes, which nobody checks.

    Args:
        name: Of the kernel, without the dtype.
        like: A tensor of the dtype.
        given: Its arguments; of tensors it gets the addresses.
    """
    library = kernels()
    assert library is not None
    getattr(library, f"{name}_{_SHORT[like.dtype]}")(*(_argument(one) for one in given))


def _argument(one: Tensor | int | float) -> "ctypes._SimpleCData[Any]":
    if isinstance(one, Tensor):
        return ctypes.c_void_p(one.data_ptr())
    return ctypes.c_int64(one) if isinstance(one, int) else ctypes.c_double(one)


def has_tiles() -> bool:
    """Tell whether `multiply` is to be had: on processors with AMX and AVX-512 for bfloat16, under Linux.

    Example:
        >>> has_tiles() in (True, False)
        True
    """
    library = kernels()
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
    if min(*x_NI.shape, len(W_OI)) < FEWEST or not has_tiles() or None in (_laid(x_NI), _laid(W_OI)):
        return False
    given = [x_NI, W_OI, *(one for one in others if one is not None)]
    fits = all(one.dtype == torch.float32 and one.device.type == "cpu" for one in given)
    trains = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    return fits and not trains and all(one.stride(-1) == 1 for one in given[2:]) and not torch.compiler.is_compiling()


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
    sides = _laid(x_NI), _laid(W_OI)
    assert sides[0] is not None
    assert sides[1] is not None
    bias: Tensor | int = 0 if bias_O is None else bias_O
    sizes = (out_NO.stride(0), int(onto), len(x_NI), len(W_OI), x_NI.shape[1])
    given = (x_NI, *sides[0], W_OI, *sides[1], bias, out_NO, *sizes)
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
    laid = _laid(W_EOI[0])
    assert laid is not None
    bias: Tensor | int = 0 if bias_EO is None else bias_EO
    sizes = (len(W_EOI), W_EOI.shape[1], x_SI.shape[1])
    matrices = (W_EOI, W_EOI.stride(0), *laid)
    out = (out_SO, out_SO.stride(0), int(onto))
    on_tiles("multiply_each", out_SO, x_SI, x_SI.stride(0), *matrices, bias, *out, torch.tensor(counts), *sizes)
    return out_SO


def on_tiles(name: str, like: Tensor, *given: Tensor | int | float) -> None:
    """Call a kernel that uses matrix tiles, for the dtype of a tensor; what is given must be what it takes.

    Nobody checks that.

    Raises:
        MemoryError: If there was none for the parts of its numbers.
    """
    library = kernels()
    assert library is not None
    if not getattr(library, f"{name}_{_SHORT[like.dtype]}")(*(_argument(one) for one in given)):
        raise MemoryError(f"no memory to {name} in parts of bfloat16")


def _laid(matrix: Tensor) -> tuple[int, int] | None:
    """Return how far the rows of a matrix lie apart, or its columns where those are what lies together, and which."""
    rows, columns = matrix.stride()
    return (rows, 0) if columns == 1 else (columns, 1) if rows == 1 else None


def add_low_rank(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, out_OI: Tensor) -> bool:
    """Write a weight with its update, computed in float64 and rounded once; tell whether that was done.

    Equals, bit for bit but for the order of the sum over R, and is tested against:

        out.copy_(round_once(W.double() + scaling * (B @ A), out.dtype))

    Args:
        W_OI: The weight: bfloat16, float16 or float32, on the CPU, contiguous.
        A_RI: A factor, float64, contiguous.
        B_OR: The other.
        scaling: What the product is multiplied by.
        out_OI: What is written, other memory than the weight's: bfloat16 or float16, contiguous.

    Returns:
        False where there are no kernels, they do not take these tensors, or a sum leaves the range of the result or is
        not finite; `out_OI` holds anything then.

    Cost:
        2·O·I·R operations and one pass over both weights, by one thread (1.2 ns for an element of rank 16).

    Example:
        >>> out = torch.empty(1, 1, dtype=torch.bfloat16)
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> add_low_rank(out.fill_(1), one, one, 0.5, torch.empty_like(out)) in (True, False)
        True
    """
    every = (W_OI, A_RI, B_OR, out_OI)
    library, fits = kernels(), all(one.is_contiguous() and one.device.type == "cpu" for one in every)
    if library is None or not fits or W_OI.dtype not in _SHORT or out_OI.dtype not in _SHORT:
        return False
    if out_OI.dtype == torch.float32 or not (A_RI.dtype == B_OR.dtype == torch.float64):
        return False
    function = getattr(library, f"add_low_rank_{_SHORT[W_OI.dtype]}_{_SHORT[out_OI.dtype]}")
    given = (W_OI, A_RI, B_OR, float(scaling), out_OI, *out_OI.shape, A_RI.shape[0])
    return bool(function(*(_argument(one) for one in given)))
