"""Where what a backward needs is written: on the heap, or wherever a caller says."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Keep = Callable[[Sequence[int], torch.dtype], Tensor]
"""Returns a tensor of a shape and dtype, not filled, for what stays until backward; None stands for the heap."""


def room(keep: Keep | None, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor, not filled, where a caller keeps such, else beside another one.

    Example:
        >>> room(None, (2, 3), torch.ones(1)).shape
        torch.Size([2, 3])
    """
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device) if keep is None else keep(shape, dtype)


def same_room(device: torch.device) -> Keep:
    """Return what gives the same memory each time, for what is done with by then; more where that does not suffice.

    Example:
        >>> keep = same_room(torch.device("cpu"))
        >>> keep((2, 3), torch.float32).data_ptr() == keep((1, 3), torch.float32).data_ptr()
        True
    """
    memory = torch.empty(0, dtype=torch.uint8, device=device)

    def keep(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nonlocal memory
        size = math.prod(shape) * dtype.itemsize
        if len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory[:size].view(dtype).view(shape)

    return keep


class _Sum(torch.autograd.Function):
    """See `kept_sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, keep: Keep) -> Tensor:  # noqa: ARG004 (torch names them)
        return torch.add(x, y, out=keep(x.shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ARG004 (torch names them)
        return d, d, None


def kept_sum(x: Tensor, y: Tensor, keep: Keep | None) -> Tensor:
    """Return `x + y` of like shapes and dtypes where a caller keeps such.

    Example:
        >>> kept_sum(torch.ones(2), torch.ones(2), lambda shape, dtype: torch.empty(shape, dtype=dtype))
        tensor([2., 2.])
    """
    return x + y if keep is None or x.dtype != y.dtype else _Sum.apply(x, y, keep)


class _Moved(torch.autograd.Function):
    """See `moved`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Keep) -> Tensor:  # noqa: ARG004 (torch names them)
        return keep(x.shape, x.dtype).copy_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 (torch names them)
        return d, None


def moved(x: Tensor, keep: Keep | None) -> Tensor:
    """Return `x` where a caller keeps such: what stays is not left between what comes and goes on the heap.

    Example:
        >>> moved(torch.ones(2), lambda shape, dtype: torch.empty(shape, dtype=dtype))
        tensor([1., 1.])
    """
    return x if keep is None else _Moved.apply(x, keep)
