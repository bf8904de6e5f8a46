"""How weights are stored: one row for each way.

A new way is two functions, a test whether a module uses it, and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, nn

from veneer.errors import BaseModelError
from veneer.storage.bnb import is_bitsandbytes, read_bitsandbytes, write_bitsandbytes
from veneer.storage.int8 import Int8Linear, read_int8, write_int8
from veneer.storage.nf4 import NF4Linear, read_nf4, write_nf4
from veneer.storage.plain import is_plain, read_plain, write_plain
from veneer.storage.torchao import is_torchao, read_torchao, write_torchao

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Storage:
    """One way of storing a weight.

    Args:
        name: What it is called.
        holds: Tells whether a module stores its weight so.
        read_weight: Returns the weight, fresh, in float32 (float64 for float64).
        write_weight: Rounds a weight once to the stored form, in place.
    """

    name: str
    holds: Callable[[nn.Module], bool]
    read_weight: Callable[[nn.Module], Tensor]
    write_weight: Callable[[nn.Module, Tensor], None]


def _of_type(
    name: str, kind: type[Layer], read: Callable[[Layer], Tensor], write: Callable[[Layer, Tensor], None]
) -> Storage:
    return Storage(
        name,
        lambda module: isinstance(module, kind),
        lambda module: read(cast(Layer, module)),
        lambda module, weight: write(cast(Layer, module), weight),
    )


STORAGES: tuple[Storage, ...] = (
    _of_type("int8", Int8Linear, read_int8, write_int8),
    _of_type("nf4", NF4Linear, read_nf4, write_nf4),
    Storage("bitsandbytes", is_bitsandbytes, read_bitsandbytes, write_bitsandbytes),
    Storage("torchao", is_torchao, read_torchao, write_torchao),
    # Last: the tensors of torchao look like floating Parameters.
    Storage("plain", is_plain, read_plain, write_plain),
)


def storage_of(module: nn.Module) -> Storage | None:
    """Return how a module stores its weight, or None where it has none or stores it in a way that is not known.

    Example:
        >>> storage_of(nn.Linear(1, 1)).name, storage_of(nn.GELU())
        ('plain', None)
    """
    return next((storage for storage in STORAGES if storage.holds(module)), None)


def _known(module: nn.Module) -> Storage:
    storage = storage_of(module)
    if storage is None:
        names = ", ".join(one.name for one in STORAGES)
        raise BaseModelError(
            f"a {type(module).__name__} stores no weight in a way that is known ({names}): leave it out, or add its "
            "storage to veneer.storage.registry"
        )
    return storage


def read_weight(module: nn.Module) -> Tensor:
    """Return the weight of a module in full, whatever it is stored as.

    Returns:
        A fresh contiguous tensor, never an alias, in the module's own shape: float64 for a float64 weight, else
        float32, in which every stored form is exact.

    Raises:
        BaseModelError: If the module stores no weight in a known way.
        ConfigError: If it does so in a form that cannot be read.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 3).to(torch.bfloat16)
        >>> read_weight(layer).dtype, torch.equal(read_weight(layer), layer.weight.float())
        (torch.float32, True)
    """
    return _known(module).read_weight(module)


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Round a weight once to the form that a module stores, in place: the module keeps its tensors.

    Args:
        module: Its stored weight changes; it is untouched where an error is raised.
        weight: Shape of the module's weight. Float64 is rounded to float32 first, unless the module stores float64.

    Raises:
        BaseModelError: If the module stores no weight in a known way, or a value is (or would be stored as) NaN or
            infinity.
        ConfigError: If the shape is another, or the stored form cannot be written.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> import torch
        >>> write_weight(layer, torch.tensor([[1.0, 2.0]]))
        >>> layer.weight.tolist()
        [[1.0, 2.0]]
    """
    _known(module).write_weight(module, weight)
