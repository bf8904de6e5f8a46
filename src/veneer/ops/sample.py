"""A sample of a weight's values, by which it is known again."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SAMPLES = 1024


def sample_values(weight: Tensor) -> Tensor:
    """Return up to 1,024 evenly spread values of a tensor, in float32, on the CPU.

    Of a tensor that only wraps others (torchao's codes and scales) it is as many of each: few of them can be reshaped.

    Example:
        >>> sample_values(torch.arange(4096)).shape
        torch.Size([1024])
    """
    wrapped: Any = weight.detach()
    if is_traceable_wrapper_subclass(wrapped):
        names, _ = wrapped.__tensor_flatten__()
        return torch.cat([sample_values(vars(wrapped)[name]) for name in names])
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLES)
    return flat[::stride][:SAMPLES].to("cpu", torch.float32).contiguous()


def sample_digest(weight: Tensor) -> str:
    """Return a digest of a tensor's shape and of a sample of its values; it does not depend on the dtype.

    Example:
        >>> a = torch.ones(2, 2)
        >>> sample_digest(a) == sample_digest(a.bfloat16()), sample_digest(a) == sample_digest(2 * a)
        (True, False)
    """
    sha = hashlib.sha256(f"{tuple(weight.shape)}\0".encode())
    sha.update(sample_values(weight).numpy().data)
    return sha.hexdigest()
