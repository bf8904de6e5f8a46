"""The kinds of layers that can be adapted: one row for each.

A new kind is a final layer class and a row here; finding, planning, attaching, merging and the contract tests follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.nn.attention import LoRAAttention
from veneer.nn.conv import LoRAConv, LoRAConvTranspose, conv_sizes
from veneer.nn.embedding import LoRAEmbedding, why_not_embedding
from veneer.nn.experts import LoRAExperts, StackedExperts, expert_sizes, why_not_experts
from veneer.nn.layer import LoRALayer
from veneer.nn.linear import LoRALinear, is_transposed_linear
from veneer.nn.parameters import LoRAParameters, why_not_parameter
from veneer.nn.routing import Routing
from veneer.storage.registry import storage_of

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LayerKind:
    """How one kind of layer is adapted.

    Args:
        name: What `plan` calls it.
        form: Form of its factors, see `veneer.factors`.
        holds: Whether a module, or a parameter of it by name (empty for the module itself), is of this kind.
        build: Wraps the module.
        sizes: Size of an output and of an input: (out, in).
        shapes: Shapes of lora_A and lora_B for a rank.
        why_not: Why such a one cannot be adapted, or None.
        variants: What it can take beside plain LoRA: dora, dropout, parts, freeze_A, and initialisations that look at
            "weight" or at "data".
    """

    name: str
    form: str
    holds: Callable[[nn.Module, str], bool]
    build: Callable[[nn.Module, Routing], LoRALayer]
    sizes: Callable[[nn.Module, str], tuple[int, int]]
    shapes: Callable[[nn.Module, str, int], Shapes]
    why_not: Callable[[nn.Module, str], str | None]
    variants: frozenset[str]


def _never(module: nn.Module, name: str) -> str | None:  # noqa: ARG001
    return None


def _is(*types: type[nn.Module]) -> Callable[[nn.Module, str], bool]:
    return lambda module, name: not name and isinstance(module, types)


def _is_linear(module: nn.Module, name: str) -> bool:
    """A linear layer of torch, or one whose weight some storage reads and that has the sizes of one."""
    if name or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    return isinstance(module, nn.Linear) or (_storage_name(module) not in (None, "plain") and _has_sizes(module))


def _storage_name(module: nn.Module) -> str | None:
    storage = storage_of(module)
    return None if storage is None else storage.name


def _has_sizes(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int)


def _linear_sizes(module: nn.Module, name: str) -> tuple[int, int]:  # noqa: ARG001
    linear: Any = module
    return linear.out_features, linear.in_features


def _transposed_sizes(module: nn.Module, name: str) -> tuple[int, int]:  # noqa: ARG001
    first, second = module.get_parameter("weight").shape
    return second, first


def _matrix_shapes(sizes: Callable[[nn.Module, str], tuple[int, int]]) -> Callable[[nn.Module, str, int], Shapes]:
    def shapes(module: nn.Module, name: str, rank: int) -> Shapes:
        out_features, in_features = sizes(module, name)
        return (rank, in_features), (out_features, rank)

    return shapes


def _embedding_sizes(module: nn.Module, name: str) -> tuple[int, int]:  # noqa: ARG001
    table: Any = module
    return table.embedding_dim, table.num_embeddings


def _kernel_sizes(module: nn.Module, name: str) -> tuple[int, int]:  # noqa: ARG001
    return conv_sizes(module)


def _kernel_shapes(module: nn.Module, name: str, rank: int) -> Shapes:  # noqa: ARG001
    conv: Any = module
    ones = (1,) * len(conv.kernel_size)
    down = (rank, conv.in_channels // conv.groups, *conv.kernel_size)
    return down, (conv.out_channels, rank // conv.groups, *ones)


def _parameter_sizes(module: nn.Module, name: str) -> tuple[int, int]:
    out_features, in_features = module.get_parameter(name).shape
    return out_features, in_features


def _stacked_shapes(module: nn.Module, name: str, rank: int) -> Shapes:
    (out_features, in_features), count = expert_sizes(module, name), module.get_parameter(name).shape[0]
    return (count, rank, in_features), (count, out_features, rank)


def _in_attention(*names: str) -> Callable[[nn.Module, str], bool]:
    return lambda module, name: name in names and isinstance(module, nn.MultiheadAttention)


def _is_parameter(module: nn.Module, name: str) -> bool:
    return bool(name) and module.get_parameter(name).ndim == 2


def _is_stack(module: nn.Module, name: str) -> bool:
    return bool(name) and (isinstance(module, StackedExperts) or module.get_parameter(name).ndim == 3)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVS_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EVERYTHING = frozenset({"dora", "dropout", "parts", "freeze_A", "weight", "data"})
_KERNEL = frozenset({"dora", "dropout", "freeze_A"})
_BY_NAME = frozenset({"dora", "parts", "freeze_A", "weight"})

KINDS: tuple[LayerKind, ...] = (
    LayerKind(
        "linear", "linear", _is_linear, LoRALinear, _linear_sizes, _matrix_shapes(_linear_sizes), _never, _EVERYTHING
    ),
    LayerKind(
        "conv1d (transposed linear)",
        "transposed",
        lambda module, name: not name and is_transposed_linear(module),
        LoRALinear,
        _transposed_sizes,
        _matrix_shapes(_transposed_sizes),
        _never,
        _EVERYTHING,
    ),
    LayerKind(
        "embedding",
        "embedding",
        _is(nn.Embedding),
        LoRAEmbedding,
        _embedding_sizes,
        _matrix_shapes(_embedding_sizes),
        lambda module, name: why_not_embedding(module),  # noqa: ARG005
        frozenset({"dora", "dropout", "freeze_A", "weight"}),
    ),
    LayerKind("conv", "conv", _is(*_CONVS), LoRAConv, _kernel_sizes, _kernel_shapes, _never, _KERNEL),
    LayerKind(
        "conv transpose",
        "conv_transpose",
        _is(*_CONVS_TRANSPOSED),
        LoRAConvTranspose,
        _kernel_sizes,
        _kernel_shapes,
        _never,
        _KERNEL,
    ),
    LayerKind(
        "attention in",
        "attention_in",
        _in_attention("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        LoRAAttention,
        _parameter_sizes,
        _matrix_shapes(_parameter_sizes),
        _never,
        _BY_NAME,
    ),
    LayerKind(
        "attention out",
        "attention_out",
        _in_attention("out_proj.weight"),
        LoRAAttention,
        _parameter_sizes,
        _matrix_shapes(_parameter_sizes),
        _never,
        _BY_NAME,
    ),
    LayerKind(
        "experts",
        "experts",
        _is_stack,
        LoRAExperts,
        expert_sizes,
        _stacked_shapes,
        why_not_experts,
        frozenset({"dropout", "freeze_A"}),
    ),
    LayerKind(
        "parameter",
        "parameter",
        _is_parameter,
        LoRAParameters,
        _parameter_sizes,
        _matrix_shapes(_parameter_sizes),
        why_not_parameter,
        _BY_NAME,
    ),
)


def kind_of(module: nn.Module, name: str = "") -> LayerKind | None:
    """Return the kind of a layer, or of a parameter of it, or None where there is none.

    Example:
        >>> kind_of(nn.Linear(1, 1)).name, kind_of(nn.LayerNorm(1))
        ('linear', None)
    """
    return next((kind for kind in KINDS if kind.holds(module, name)), None)


def members_of(module: nn.Module) -> Sequence[str]:
    """Return the parameters that naming a module means, where its own kernel reads them, else the module itself.

    Example:
        >>> members_of(nn.Linear(1, 1)), members_of(nn.MultiheadAttention(4, 2))
        (('',), ('in_proj_weight', 'out_proj.weight'))
    """
    if not isinstance(module, nn.MultiheadAttention):
        return ("",)
    packed = ("in_proj_weight",) if module.in_proj_weight is not None else ()
    apart = () if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return (*packed, *apart, "out_proj.weight")


def why_not(module: nn.Module, name: str = "") -> str | None:
    """Return why a layer, or a parameter of it, cannot be adapted, or None where it can."""
    if isinstance(module, LoRALayer):
        return "has an adapter already"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the output projection of nn.MultiheadAttention, whose kernel never calls it; name the attention"
    if not name and len(members_of(module)) > 1:
        return None
    kind = kind_of(module, name)
    if kind is None:
        names = ", ".join(dict.fromkeys(one.name for one in KINDS))
        return f"is a {type(module).__name__}; kinds that can be adapted: {names}"
    return kind.why_not(module, name)
