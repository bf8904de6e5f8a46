"""Weights that are stored as they are: floating numbers in a Parameter."""

import torch
from torch import Tensor, nn

from veneer.storage.checks import check_finite, checked

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Narrower floats are left out: their scales live elsewhere, and without them the numbers mean nothing."""


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module holds its weight in a floating Parameter: Linear, Embedding, convolutions, norms, Conv1D.

    Example:
        >>> is_plain(nn.Linear(1, 1)), is_plain(nn.Conv2d(1, 1, 3)), is_plain(nn.GELU())
        (True, True, False)
    """
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in DTYPES


def parameter(module: nn.Module) -> nn.Parameter:
    """Return the weight of a module that has one."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def read_plain(module: nn.Module) -> Tensor:
    """Return the weight as a fresh float32 tensor; float64 stays float64."""
    weight = parameter(module).detach()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def write_plain(module: nn.Module, weight: Tensor) -> None:
    """Round a weight to the dtype of the Parameter, in place."""
    stored = parameter(module)
    what = f"a {type(module).__name__}"
    if stored.dtype == torch.float64 and weight.shape == stored.shape and weight.dtype == torch.float64:
        rounded = weight.detach()
    else:
        rounded = checked(weight, stored.shape, stored.device, what).to(stored.dtype)
    # Float16 ends at 65,504: what is finite before may not be so after.
    check_finite(rounded, f"the weight {tuple(stored.shape)} of {what}, as {stored.dtype},")
    stored.copy_(rounded)
