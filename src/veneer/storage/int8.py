"""A frozen linear layer with a byte for each weight.

Shapes: I in, O out.
"""

from typing import Self

import torch
from torch import Tensor, nn

from veneer.storage.checks import checked
from veneer.storage.layer import StoredLinear
from veneer.storage.panels import Decode
from veneer.storage.rounding import to_int8


def _decode(stored: tuple[Tensor, ...], start: int, stop: int, in_features: int, scratch: Tensor) -> Tensor:
    codes_OI, scale_bits_O = stored
    panel_PI = scratch[: (stop - start) * in_features].view(stop - start, in_features)
    # Copy, then scale: a product of mixed dtypes would first make a float copy of the codes somewhere else.
    return panel_PI.copy_(codes_OI[start:stop]).mul_(scale_bits_O.view(torch.float32)[start:stop, None])


class Int8Linear(StoredLinear):
    """A frozen linear layer that stores int8 codes and one float32 scale for each output row.

    Equals, with `W = codes * scale[:, None]`:

        out = x @ W.T + bias

    The codes are symmetric, absmax / 127 (see `rounding.exact_scale`), and decoding them is exact. There is no
    `weight`, which would hide a whole decoding: `storage.registry.read_weight` is the one way to it. The scales are
    kept as their bits in an int32 buffer: casts of the module (`.to(torch.bfloat16)`, `.half()`, `.double()`) change
    floating tensors only, and so never round them. The bias is an ordinary, frozen Parameter, which casts do change.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: The bias, which is copied, or None.
        device: Where the codes live.

    Cost:
        1 byte for each weight and 4 for each output row.

    Example:
        >>> layer = quantise_int8(nn.Linear(64, 32))
        >>> layer, layer.stored_bytes, layer(torch.ones(5, 64)).shape
        (Int8Linear(in_features=64, out_features=32, bias=True), 2176, torch.Size([5, 32]))
    """

    codes_OI: Tensor
    scale_bits_O: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("codes_OI", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale_bits_O", torch.zeros(out_features, dtype=torch.int32, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return the quantised layer of a linear one, which stays as it is.

        Raises:
            BaseModelError: If the weight holds NaN or infinity.
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias, linear.weight.device)
        write_int8(layer, linear.weight.detach())
        return layer.train(linear.training)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The stored weight: codes, bits of the scales."""
        return self.codes_OI, self.scale_bits_O

    @property
    def decode(self) -> Decode:
        """The function that reads rows of the weight."""
        return _decode


def quantise_int8(linear: nn.Linear) -> Int8Linear:
    """Return a linear layer with its weight rounded to int8, each within half the scale of its row.

    Raises:
        BaseModelError: If the weight holds NaN or infinity.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> difference = read_int8(quantise_int8(layer)) - layer.weight
        >>> bool((difference.abs() <= layer.weight.abs().amax() / 127).all())
        True
    """
    return Int8Linear.from_linear(linear)


def read_int8(layer: Int8Linear) -> Tensor:
    """Return the weight as a fresh float32 tensor (O, I)."""
    scratch = torch.empty(layer.codes_OI.numel(), dtype=torch.float32, device=layer.codes_OI.device)
    return _decode(layer.stored, 0, layer.out_features, layer.in_features, scratch)


@torch.no_grad()
def write_int8(layer: Int8Linear, weight_OI: Tensor) -> None:
    """Round a weight (O, I) into the codes and scales of a layer, in place."""
    shape = torch.Size([layer.out_features, layer.in_features])
    weight_OI = checked(weight_OI, shape, layer.codes_OI.device, "an Int8Linear")
    to_int8(weight_OI, layer.codes_OI, layer.scale_bits_O.view(torch.float32))
