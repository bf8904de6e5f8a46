"""The kinds of layers that can be adapted: one row for each.

A new kind is a final layer class and a row here; finding, planning, attaching and detaching follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from veneer.nn.linear import LoRALinear
from veneer.nn.routing import Routing

LoRALayer = LoRALinear
"""Any of the layer classes below (a union once there is more than one)."""


@dataclass(frozen=True)
class LayerKind:
    """How one kind of layer is adapted.

    Args:
        name: What `plan` calls it.
        module_type: The class of layers it stands for.
        build: Wraps a layer.
        shape: Size of an output row and of an input row: (out, in).
    """

    name: str
    module_type: type[nn.Module]
    build: Callable[[nn.Module, Routing], LoRALayer]
    shape: Callable[[nn.Module], tuple[int, int]]


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    return module.out_features, module.in_features  # type: ignore[return-value]


KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", nn.Linear, LoRALinear, _linear_shape),  # type: ignore[arg-type]
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or None where it cannot be adapted.

    Example:
        >>> kind_of(nn.Linear(1, 1)).name, kind_of(nn.LayerNorm(1))
        ('linear', None)
    """
    return next((kind for kind in KINDS if isinstance(module, kind.module_type)), None)


def why_not(module: nn.Module) -> str | None:
    """Return why a layer cannot be adapted, or None where it can."""
    if isinstance(module, LoRALinear):
        return "has an adapter already"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the output projection of nn.MultiheadAttention, whose kernel never calls it"
    if kind_of(module) is None:
        names = ", ".join(kind.module_type.__name__ for kind in KINDS)
        return f"is a {type(module).__name__}; layers that can be adapted: {names}"
    return None
