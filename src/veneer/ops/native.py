"""The kernels in C, where they were compiled: loops that torch would run as several passes over memory.

Each function here says what it computes in torch's words, and None or False where torch has to compute it.
"""

import ctypes
import hashlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h")))
"""What the library is compiled from."""

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there are none, or they are of another source than lies beside them."""
    folder = SOURCES[0].parent if SOURCES else Path(__file__).parent
    paths = (folder / f"kernels{suffix}" for suffix in EXTENSION_SUFFIXES)
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


def run(name: str, like: Tensor, *given: Tensor | int | float) -> int:
    """Call a kernel for the dtype of a tensor; what is given must be what it takes, which nobody checks.

    Args:
        name: Of the kernel, without the dtype.
        like: A tensor of the dtype.
        given: Its arguments; of tensors it gets the addresses.

    Returns:
        What it tells; anything where it tells nothing.
    """
    library = kernels()
    assert library is not None
    found: int = getattr(library, f"{name}_{_SHORT[like.dtype]}")(*(_argument(one) for one in given))
    return found


def _argument(one: Tensor | int | float) -> "ctypes._SimpleCData[Any]":
    if isinstance(one, Tensor):
        return ctypes.c_void_p(one.data_ptr())
    return ctypes.c_int64(one) if isinstance(one, int) else ctypes.c_double(one)


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
    fits = all(one.is_contiguous() and one.device.type == "cpu" for one in every)
    if kernels() is None or not fits or W_OI.dtype not in _SHORT or out_OI.dtype not in _SHORT:
        return False
    if out_OI.dtype == torch.float32 or not (A_RI.dtype == B_OR.dtype == torch.float64):
        return False
    given = (W_OI, A_RI, B_OR, float(scaling), out_OI, *out_OI.shape, A_RI.shape[0])
    return bool(run(f"add_low_rank_{_SHORT[W_OI.dtype]}", out_OI, *given))
