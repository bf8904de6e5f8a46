"""LoRA on convolutions of one to three dimensions, and on transposed ones.

Shapes: N a batch, I and O channels, g groups, R rank, k… a kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.factors import FORMS
from veneer.nn.layer import LoRALayer, has_hooks
from veneer.nn.slots import Slot
from veneer.ops.dora import magnitude_ratio

_CONVOLVE: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_OWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLVE_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class LoRAConv(LoRALayer):
    """A frozen convolution with a bank of low-rank updates.

    For the samples of each segment of the routing, `conv` with the base's stride, padding, dilation and groups:

        out = base(x) + scaling * conv1x1(conv(x, lora_A), lora_B)

    which equals `conv(x, W + delta)`, and is computed so where that is quicker, with delta the grouped product of the
    factors, (O, I/g, k…): each group has its own ranks, R/g of them. (Ranks of PEFT's that look across groups are
    computed, and have no such delta.) With a magnitude (DoRA) each output channel is scaled by
    `magnitude / ‖W + delta‖`.

    Args:
        base: The convolution that was there before; called as it is.
        routing: Which samples go through which slot.

    Source:
        microsoft/LoRA `loralib/layers.py`, ConvLoRA, and PEFT's Conv layers. Differs: dilation, every padding mode and
        groups are the base's in both branches, so that the merged layer computes the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, segment by segment, the updates; x has shape (N, I, …), or (I, …) for one sample."""
        batch = x if x.ndim == self.weight.ndim else x[None]
        out = self.by_segment(batch, self._segment)
        return out if x.ndim == self.weight.ndim else out[0]

    def _segment(self, x: Tensor, slot_index: int | None) -> Tensor:
        base: Any = self.base
        if slot_index is None:
            return base(x)
        slot = self.slot(slot_index)
        A, B = slot.factors(x.dtype)
        if slot.form == "conv" and _is_own(base) and not self.dropping(slot) and _sums_kernels(base, A, B):
            updated = base.weight + slot.scaling * FORMS["conv"].delta(A, B).to(base.weight.dtype)
            out = base._conv_forward(x, updated, base.bias)
        else:
            out = _added(base(x), self._branch(self.drop(x, slot), slot, A, slot.scaling * B), base)
        return out if slot.magnitude is None else _scaled(self, out, slot, A, B)

    def _branch(self, x: Tensor, slot: Slot, A: Tensor, B: Tensor) -> Tensor:
        base: Any = self.base
        padding = base.padding
        if base.padding_mode != "zeros":
            # As torch's own convolutions do it: pad first, by the amounts that they keep for it.
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        convolve = _CONVOLVE[x.ndim - 2]
        groups = 1 if slot.form == "conv_across" else base.groups
        return convolve(convolve(x, A, None, base.stride, padding, base.dilation, groups), B, groups=base.groups)


class LoRAConvTranspose(LoRALayer):
    """A frozen transposed convolution with a bank of low-rank updates.

        out = base(x) + scaling * conv1x1(conv_transpose(x, lora_A), lora_B)

    which equals `conv_transpose(x, W + delta)`, delta of shape (I, O/g, k…).

    Args:
        base: The transposed convolution that was there before; called as it is.
        routing: Which samples go through which slot.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the base and, segment by segment, the updates; x has shape (N, I, …), or (I, …) for one sample."""
        batch = x if x.ndim == self.weight.ndim else x[None]
        out = self.by_segment(batch, lambda part, slot: self._segment(part, slot, output_size))
        return out if x.ndim == self.weight.ndim else out[0]

    def _segment(self, x: Tensor, slot_index: int | None, output_size: list[int] | None) -> Tensor:
        base: Any = self.base
        out = base(x, output_size)
        if slot_index is None:
            return out
        slot = self.slot(slot_index)
        A, B = slot.factors(x.dtype)
        extra = base._output_padding(
            x, output_size, base.stride, base.padding, base.kernel_size, x.ndim - 2, base.dilation
        )
        # (R, I/g, k…) with the ranks of a group together, to the (I, R/g, k…) of a transposed kernel.
        kernel = A.unflatten(0, (base.groups, -1)).transpose(1, 2).flatten(0, 1)
        down = _CONVOLVE_TRANSPOSED[x.ndim - 2](
            self.drop(x, slot), kernel, None, base.stride, base.padding, extra, base.groups, base.dilation
        )
        out = _added(out, _CONVOLVE[x.ndim - 2](down, slot.scaling * B, groups=base.groups), base)
        return out if slot.magnitude is None else _scaled(self, out, slot, A, B)


def _sums_kernels(base: nn.Conv1d | nn.Conv2d | nn.Conv3d, A: Tensor, B: Tensor) -> bool:
    """Tell whether one convolution with the summed kernel is quicker than three with the factors apart.

    The sum costs the gradient of a whole kernel, I·k·O operations a position; the factors 3·R·(I·k + O). Grouped
    kernels of a few ranks are slow whatever their number of operations (docs/log.md).
    """
    inputs, outputs, rank = A[0].numel(), B.shape[0], A.shape[0]
    return base.groups > 1 or inputs * outputs <= 3 * rank * (inputs + outputs)


def _added(out: Tensor, update: Tensor, base: nn.Module) -> Tensor:
    """Return the sum, in the place of the base's output where nobody else can have a hold of that."""
    return out.add_(update) if _is_own(base) and out.dtype == update.dtype else out + update


def _is_own(base: nn.Module) -> bool:
    """Tell whether a layer is torch's own convolution and nobody watches it."""
    return type(base) in _OWN and not has_hooks(base)


def _scaled(layer: LoRALayer, out: Tensor, slot: Slot, A: Tensor, B: Tensor) -> Tensor:
    """Multiply an output by `magnitude / ‖W + delta‖` of its channel; the bias is left as it is."""
    axis = (-1, *(1,) * (out.ndim - 2))
    with torch.no_grad():
        # Kernels are small, and in a transposed one outputs stand behind inputs: the plain norm is the clear way.
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        updated = layer.weight.to(wide) + slot.scaling * FORMS[slot.form].delta(A.to(wide), B.to(wide))
        if slot.form == "conv_transpose":
            updated = outputs_first(updated, layer.base.groups)  # type: ignore[arg-type]
        norm_O = torch.linalg.vector_norm(updated.flatten(1), dim=1)
    ratio = magnitude_ratio(cast(Tensor, slot.magnitude), norm_O).to(out.dtype).view(axis)
    if layer.bias is None:
        return ratio * out
    bias = layer.bias.to(out.dtype).view(axis)
    return ratio * (out - bias) + bias


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a transposed convolution, (I, O/g, k…), as (O, I/g, k…).

    Example:
        >>> outputs_first(torch.zeros(4, 3, 5), groups=2).shape
        torch.Size([6, 2, 5])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def conv_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (out, inputs of one output): channels of a group times the kernel's size."""
    conv: Any = module
    kernel = 1
    for size in conv.kernel_size:
        kernel *= size
    return conv.out_channels, conv.in_channels // conv.groups * kernel
