"""Activations of one forward side by side in memory of their own, so that the heap is left to what comes and goes.

torch asks glibc for aligned blocks, and glibc never gives such a request a hole of exactly its size: where tensors that
stay for backward lie between those that do not, a training step holds half as much again as it uses.
"""

import math
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes, as torch's own do."""


class ActivationStack:
    """Memory that is taken from one end and given back as a whole.

    Args:
        num_bytes: The most that is taken; None for half of the machine's memory. It is reserved, not used: a page
            counts once something is written there. What does not fit, or cannot be reserved, goes to the heap.

    Cost:
        A tensor takes 5 µs. Pages stay with the process until the stack and the last of its tensors are gone.

    Example:
        >>> stack = ActivationStack(1 << 20)
        >>> first = stack.empty((2, 3), torch.float32).fill_(1.0)
        >>> stack.reset()  # `first` is in use: what comes now lies elsewhere
        >>> _ = stack.empty((2, 3), torch.float32).fill_(2.0)
        >>> first.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        self._size = _half_of_memory() if num_bytes is None else num_bytes
        self._region: mmap.mmap | None = None
        self._users: weakref.ref[memoryview] | None = None
        self._storage: torch.UntypedStorage | None = None
        self._taken = 0

    def reset(self) -> None:
        """Begin anew at the bottom; where a tensor of before is still in use, in other memory, and that one stays."""
        self._storage, self._taken = None, 0
        if self._users is not None and self._users() is not None:
            self._region = None  # its last tensor lets go of it
        self._users = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor that is not filled, side by side with the one before."""
        count = math.prod(shape)
        start = -(-self._taken // ALIGNMENT) * ALIGNMENT
        stop = start + count * dtype.itemsize
        storage = self._begun() if count and stop <= self._size else None
        if storage is None:
            return torch.empty(shape, dtype=dtype)
        self._taken = stop
        # Not a view: autograd takes views of one tensor for parts of it.
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape, strides)

    def _begun(self) -> torch.UntypedStorage | None:
        """Return the memory as a storage that has no tensor from before the last reset; None where there is none."""
        if self._storage is None and self._size:
            try:
                self._region = self._region or _reserved(self._size)
            except (OSError, ValueError, OverflowError):
                self._size = 0
                return None
            # A storage holds on to the buffer it was made from for as long as it has tensors.
            users = memoryview(self._region)
            self._users, self._storage = (
                weakref.ref(users),
                torch.frombuffer(users, dtype=torch.uint8).untyped_storage(),
            )
        return self._storage


def _reserved(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _half_of_memory() -> int:
    """Return half of the bytes of this machine's memory, zero where the system does not say, or maps in another way."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if os.name == "posix" else 0
    except (OSError, ValueError):
        return 0
