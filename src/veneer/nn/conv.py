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
from veneer.ops.conv import lora_conv
from veneer.ops.dora import magnitude_ratio
from veneer.ops.geometry import Geometry
from veneer.ops.lora import autocasting
from veneer.ops.product import IN_PASSING, merging_pays

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
        ratio_O = None if slot.magnitude is None else _ratio(self, slot, A, B)
        if slot.form == "conv" and not self.dropping(slot) and _folds(base, x):
            x, geometry = _padded(base, x)
            return lora_conv(x, base.weight, base.bias, A, B, slot.scaling, ratio_O, geometry)
        out = _added(base(x), self._branch(self.drop(x, slot), slot, A, slot.scaling * B), base)
        return out if ratio_O is None else _scaled(out, ratio_O, base.bias)

    def _branch(self, x: Tensor, slot: Slot, A: Tensor, B: Tensor) -> Tensor:
        x, geometry = _padded(self.base, x)
        if slot.form == "conv_across":
            geometry = geometry._replace(groups=1)
        return _CONVOLVE[x.ndim - 2](geometry.convolve(x, A), B, groups=self.base.groups)


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
        return out if slot.magnitude is None else _scaled(out, _ratio(self, slot, A, B), base.bias)


def _folds(base: nn.Module, x: Tensor) -> bool:
    """Tell whether one convolution with the sum of the kernels takes the place of three: not for few positions.

    A sum in 16 bits would round the update away, and autocast casts each convolution by itself.
    """
    conv: Any = base
    if not _is_own(base) or x.dtype != conv.weight.dtype or autocasting(x):
        return False
    pads = conv._reversed_padding_repeated_twice
    positions = x.shape[0]
    for axis, size in enumerate(reversed(x.shape[2:])):
        reach = conv.dilation[-1 - axis] * (conv.kernel_size[-1 - axis] - 1)
        positions *= max(0, (size + pads[2 * axis] + pads[2 * axis + 1] - reach - 1) // conv.stride[-1 - axis] + 1)
    return merging_pays(positions, (len(conv.weight), conv.weight[0].numel()), x.dtype, IN_PASSING)


def _padded(base: nn.Module, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return the input and how kernels go over it, padded before where that is not by zeros, as many on both sides.

    As torch's own convolutions do it, by the amounts that they keep for it, last axis first.
    """
    conv: Any = base
    pads = conv._reversed_padding_repeated_twice
    before, after = pads[::2], pads[1::2]
    if conv.padding_mode == "zeros" and before == after:
        return x, Geometry(conv.stride, tuple(reversed(before)), conv.dilation, conv.groups)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, pads, mode=mode), Geometry(conv.stride, (0,) * len(before), conv.dilation, conv.groups)


def _added(out: Tensor, update: Tensor, base: nn.Module) -> Tensor:
    """Return the sum, in the place of the base's output where nobody else can have a hold of that."""
    return out.add_(update) if _is_own(base) and out.dtype == update.dtype else out + update


def _is_own(base: nn.Module) -> bool:
    """Tell whether a layer is torch's own convolution and nobody watches it."""
    return type(base) in _OWN and not has_hooks(base)


def _ratio(layer: LoRALayer, slot: Slot, A: Tensor, B: Tensor) -> Tensor:
    """Return `magnitude / ‖W + delta‖` of each output channel, the norm as a constant."""
    with torch.no_grad():
        # Kernels are small, and in a transposed one outputs stand behind inputs: the plain norm is the clear way.
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        delta = FORMS[slot.form].delta(A.to(wide), B.to(wide))
        updated = torch.add(layer.weight.to(wide), delta, alpha=slot.scaling)
        if slot.form == "conv_transpose":
            updated = outputs_first(updated, layer.base.groups)  # type: ignore[arg-type]
        norm_O = torch.linalg.vector_norm(updated.flatten(1), dim=1)
    return magnitude_ratio(cast(Tensor, slot.magnitude), norm_O).to(A.dtype)


def _scaled(out: Tensor, ratio_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply each channel of an output by its ratio; the bias is left as it is."""
    axis = (-1, *(1,) * (out.ndim - 2))
    ratio = ratio_O.to(out.dtype).view(axis)
    if bias_O is None:
        return ratio * out
    bias = bias_O.to(out.dtype).view(axis)
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
