"""Weights that bitsandbytes stores: Linear8bitLt and Linear4bit.

The package is not needed: its layout (bitsandbytes 0.50, `nn/modules.py` and `functional.QuantState`) is read and
written here, and its layers are known by the names of their classes. Writing in place keeps the Parameter, where the
package's own way is a new one. The tests use stand-ins of the same layout, and the package itself where installed.

Shapes: I in, O out, K blocks of S weights, L values of a code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.storage.checks import checked
from veneer.storage.plain import parameter


def _is(module: nn.Module, name: str) -> bool:
    return any(
        one.__name__ == name and one.__module__.partition(".")[0] == "bitsandbytes" for one in type(module).__mro__
    )


def is_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether a module is a quantised layer of bitsandbytes; before it has been moved to a device it is plain.

    Example:
        >>> is_bitsandbytes(nn.Linear(1, 1))
        False
    """
    if _is(module, "Linear8bitLt"):
        return parameter(module).dtype == torch.int8
    return _is(module, "Linear4bit") and _documented(module).quant_state is not None


def _documented(module: nn.Module) -> Any:
    """The weight with the attributes that bitsandbytes documents, which torch's types do not know."""
    return parameter(module)


def read_bitsandbytes(module: nn.Module) -> Tensor:
    """Return the weight as a fresh float32 tensor (O, I), before the package rounds it to a compute dtype.

    Raises:
        ConfigError: If the layer was repacked for a CPU's own kernel.
    """
    return _read_8bit(module) if _is(module, "Linear8bitLt") else _read_4bit(module)


def write_bitsandbytes(module: nn.Module, weight: Tensor) -> None:
    """Round a weight (O, I) into the codes and scales of a layer, in place.

    Raises:
        ConfigError: If the layer was repacked for a CPU's own kernel.
    """
    with torch.no_grad():
        (_write_8bit if _is(module, "Linear8bitLt") else _write_4bit)(module, weight)


def _row_absmax(module: nn.Module) -> Tensor:
    """The magnitudes that code 127 stands for; the first forward moves them from the weight to the state."""
    on_weight = _documented(module).SCB
    return on_weight if on_weight is not None else module.state.SCB  # type: ignore[union-attr,return-value]


def _read_8bit(module: nn.Module) -> Tensor:
    return parameter(module).detach().to(torch.float32) * (_row_absmax(module).to(torch.float32)[:, None] / 127)


def _write_8bit(module: nn.Module, weight_OI: Tensor) -> None:
    stored = parameter(module)
    weight_OI = checked(weight_OI, stored.shape, stored.device, "a Linear8bitLt").to(torch.float32)
    absmax_O = weight_OI.abs().amax(1)
    step_O1 = absmax_O.div(127).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    _row_absmax(module).copy_(absmax_O)
    stored.copy_(weight_OI.div(step_O1).round_().clamp_(-127, 127))


def _state(module: nn.Module) -> Any:
    state = _documented(module).quant_state
    if vars(state).get("packing_format_for_cpu", False):
        raise ConfigError(
            f"a {type(module).__name__} was repacked by bitsandbytes for this CPU, a layout that is not read here: "
            "read or merge before the first forward in eval mode, or load the model again"
        )
    return state


def _per_block(values: Tensor, size: int) -> Tensor:
    """Values in blocks (K, S), the last one filled up with zeros."""
    flat = values.reshape(-1).to(torch.float32)
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _absmax(state: Any) -> Tensor:
    """The magnitudes (K) that a code of 1 stands for, in each block."""
    if state.state2 is None:
        return state.absmax.to(torch.float32)
    nested = state.state2
    values_L = nested.code.to(torch.float32)[state.absmax.to(torch.int32)]
    blocks = _per_block(values_L, nested.blocksize) * nested.absmax.to(torch.float32)[:, None]
    return blocks.view(-1)[: state.absmax.numel()] + state.offset


def _nearest(values: Tensor, code_L: Tensor) -> Tensor:
    """The positions of the code's values nearest to some values; FP4 and the dynamic map are not sorted."""
    sorted_L, order_L = code_L.to(torch.float32).sort(stable=True)
    return order_L[torch.bucketize(values, (sorted_L[1:] + sorted_L[:-1]) / 2)]


def _read_4bit(module: nn.Module) -> Tensor:
    state = _state(module)
    bytes_Y = parameter(module).detach().reshape(-1).view(torch.uint8)
    codes = torch.stack([bytes_Y >> 4, bytes_Y & 15], dim=1).view(-1)[: state.shape.numel()]
    values = _per_block(state.code.to(torch.float32)[codes.to(torch.int32)], state.blocksize)
    return (values * _absmax(state)[:, None]).view(-1)[: state.shape.numel()].view(state.shape)


def _write_4bit(module: nn.Module, weight_OI: Tensor) -> None:
    state = _state(module)
    stored = parameter(module)
    blocks_KS = _per_block(checked(weight_OI, state.shape, stored.device, "a Linear4bit"), state.blocksize)
    _write_absmax(state, blocks_KS.abs().amax(1))
    divisor_K1 = _absmax(state).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = _nearest(blocks_KS / divisor_K1, state.code).to(torch.uint8).view(-1)
    zero = _nearest(codes.new_zeros(1, dtype=torch.float32), state.code).to(torch.uint8)
    bytes_Y = stored.view(-1).view(torch.uint8)
    # An odd number of weights leaves half a byte, and the filling of the last block lies behind it.
    pairs = torch.cat([codes[: state.shape.numel()], zero.expand(-state.shape.numel() % 2)]).view(-1, 2)
    bytes_Y[: pairs.shape[0]] = pairs[:, 0] << 4 | pairs[:, 1]


def _write_absmax(state: Any, absmax_K: Tensor) -> None:
    if state.state2 is None:
        state.absmax.copy_(absmax_K)
        return
    nested = state.state2
    state.offset.copy_(absmax_K.mean())
    spread = _per_block(absmax_K - state.offset, nested.blocksize)
    nested.absmax.copy_(spread.abs().amax(1))
    divisor = nested.absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    state.absmax.copy_(_nearest(spread / divisor, nested.code).view(-1)[: absmax_K.numel()])
