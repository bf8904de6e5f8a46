"""What linear layers with a stored weight share, whatever it is stored in."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.storage.panels import Decode, decoded_panels, panel_linear


class StoredLinear(nn.Module):
    """The sizes and the frozen bias of a linear layer; a storage adds its buffers, `stored` and `decode`.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: The bias, which is copied, or None.

    Raises:
        ConfigError: If a size is below 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ConfigError(
                f"a quantised layer has at least one input and one output, got {in_features} and {out_features}: "
                "leave this layer out"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in."""
        raise NotImplementedError

    @property
    def decode(self) -> Decode:
        """The function that reads rows of the weight from them."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to an input of shape (..., in), in its dtype."""
        return panel_linear(input, self.bias, self.decode, self.out_features, self.stored)

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of rows and those rows of the weight, in one buffer that the next ones overwrite."""
        return decoded_panels(self.decode, self.stored, (self.out_features, self.in_features), dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored weight, without the bias."""
        return sum(one.nbytes for one in self.stored)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
