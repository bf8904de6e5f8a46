"""Weights that torchao stores: tensor subclasses that say by `dequantize()` what they stand for.

The package is not needed: its tensors are known by the names of their classes' modules (torchao 0.18). The tests use
a stand-in of the same layout, and the package itself where installed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.storage.checks import checked
from veneer.storage.rounding import exact_scale


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def is_torchao(module: nn.Module) -> bool:
    """Tell whether a module's weight is a tensor of torchao.

    Example:
        >>> is_torchao(nn.Linear(1, 1))
        False
    """
    classes = type(module._parameters.get("weight")).__mro__
    return any(one.__module__.partition(".")[0] == "torchao" for one in classes)


def _writable(weight: Any) -> bool:
    """Tell whether it is int8 codes times a scale for each row, and nothing else."""
    return (
        type(weight).__name__ == "Int8Tensor"
        and weight.ndim == 2
        and list(weight.block_size) == [1, weight.shape[1]]
        and not weight.reduce_range
        and weight.act_pre_scale is None
        and (weight.zero_point is None or not weight.zero_point.any())
    )


def read_torchao(module: nn.Module) -> Tensor:
    """Return the weight as a fresh float32 tensor.

    Raises:
        ConfigError: If this kind of tensor does not say what it stands for.
    """
    weight = _weight(module)
    with torch.no_grad():
        if _writable(weight):
            # `dequantize()` rounds to the dtype of the model, which adding to the weight should not.
            return weight.qdata.to(torch.float32) * weight.scale.to(torch.float32)
        try:
            return weight.dequantize().to(torch.float32, copy=True)
        except (NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"torchao cannot dequantise a {type(weight).__name__} ({error}): load the base model unquantised"
            ) from error


def write_torchao(module: nn.Module, weight: Tensor) -> None:
    """Round a weight (O, I) into the codes and scales of an `Int8Tensor`, in place.

    Raises:
        ConfigError: If it is another kind of tensor, which only the configuration that made it can make.
    """
    stored = _weight(module)
    if not _writable(stored):
        raise ConfigError(
            f"a torchao {type(stored).__name__} cannot be written: only int8 weights with one scale for each row can "
            "(Int8WeightOnlyConfig); merge into the unquantised base model and quantise that"
        )
    values_OI = checked(weight, stored.shape, stored.qdata.device, "a torchao Int8Tensor").to(torch.float32)
    with torch.no_grad():
        # Torchao itself divides by absmax / 127.5 and clips; ours is coded again without a change once it was written.
        stored.scale.copy_(exact_scale(values_OI.abs().amax(1, keepdim=True)))
        stored.qdata.copy_(values_OI.div(stored.scale.to(torch.float32)).round_().clamp_(-127, 127))
