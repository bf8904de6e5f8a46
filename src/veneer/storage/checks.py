"""What is checked of a weight before it is stored."""

import torch
from torch import Tensor

from veneer.errors import BaseModelError, ConfigError


def check_finite(weight: Tensor, what: str) -> None:
    """Refuse a weight that holds NaN or infinity.

    Args:
        weight: Any floating tensor.
        what: Names it in the error.

    Raises:
        BaseModelError: If a value is not finite; says how many, and where the first is.

    Example:
        >>> check_finite(torch.tensor([[1.0, float("nan")]]), "the weight")
        Traceback (most recent call last):
        veneer.errors.BaseModelError: the weight holds 1 value that is not finite (of 2), the first (nan) at [0, 1]: \
it cannot be stored; check the checkpoint it comes from
    """
    # The extremes carry NaN and infinity along, without a second tensor of the size of the weight.
    if not weight.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
        return
    places = torch.nonzero(~torch.isfinite(weight))
    first = places[0].tolist()
    values = "1 value that is" if len(places) == 1 else f"{len(places):,} values that are"
    raise BaseModelError(
        f"{what} holds {values} not finite (of {weight.numel():,}), the first ({weight[tuple(first)].item()}) at "
        f"{first}: it cannot be stored; check the checkpoint it comes from"
    )


def checked(weight: Tensor, shape: torch.Size, device: torch.device, what: str) -> Tensor:
    """Return a weight on the device of its storage, float64 rounded to float32, once it is known to fit.

    Args:
        weight: What is to be stored.
        shape: The shape of the storage's weight.
        device: Where the storage lives.
        what: Names the storage in errors.

    Raises:
        ConfigError: If the shape is another, or the weight is not floating.
        BaseModelError: If a value is not finite (as float32).

    Example:
        >>> checked(torch.zeros(2, 3), torch.Size([3, 2]), torch.device("cpu"), "an Int8Linear")
        Traceback (most recent call last):
        veneer.errors.ConfigError: the weight of an Int8Linear is (3, 2) and floating, got (2, 3) torch.float32: \
give it as read_weight returns it
    """
    if weight.shape != shape or not weight.is_floating_point():
        raise ConfigError(
            f"the weight of {what} is {tuple(shape)} and floating, got {tuple(weight.shape)} {weight.dtype}: give it "
            "as read_weight returns it"
        )
    if weight.is_meta or device.type == "meta":
        raise BaseModelError(f"the weight of {what} is on the meta device and has no values: load the model first")
    weight = weight.detach().to(device=device, dtype=torch.float32 if weight.dtype == torch.float64 else None)
    check_finite(weight, f"the weight {tuple(shape)} of {what}")
    return weight
