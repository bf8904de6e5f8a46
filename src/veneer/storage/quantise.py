"""Quantising the linear layers of a model in place, one after the other."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from veneer.errors import BaseModelError, ConfigError
from veneer.names import did_you_mean
from veneer.storage.checks import check_finite
from veneer.storage.int8 import quantise_int8
from veneer.storage.nf4 import quantise_nf4
from veneer.storage.plain import is_plain
from veneer.storage.torchao import is_torchao

QUANTISERS: Mapping[str, Callable[[nn.Linear], nn.Module]] = MappingProxyType(
    {"int8": quantise_int8, "nf4": quantise_nf4}
)
"""Storage by name -> the quantised layer of a linear one."""


def quantise_model(model: nn.Module, storage: str, *, skip: Collection[str] = ()) -> int:
    """Replace the plain linear layers of a model by quantised ones, in place, and freeze the model.

    Left as they are: layers of any other type (subclasses of nn.Linear among them), layers whose weight another module
    shares (a head that is tied to the embedding; quantised, it would need a copy of its own), and what `skip` names.

    Args:
        model: Changed in place; untouched where an error is raised.
        storage: "int8" or "nf4".
        skip: Paths of modules that are left as they are, with everything inside of them.

    Returns:
        How many layers were replaced.

    Raises:
        ConfigError: If the storage or a path of `skip` is unknown, the model itself is a linear layer, or a layer has
            hooks, which would be lost.
        BaseModelError: If weights hold NaN or infinity, or no values; names all of them.

    Cost:
        One pass over the weights before anything is changed. The quantised weights, and the float weight of one layer
        more than the layers that are still to come.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
        >>> quantise_model(model, "int8", skip=["2"]), type(model[0]).__name__, type(model[2]).__name__
        (1, 'Int8Linear', 'Linear')
    """
    if storage not in QUANTISERS:
        raise ConfigError(
            f"storage={storage!r} is not one of {', '.join(QUANTISERS)}{did_you_mean(storage, QUANTISERS)}"
        )
    if type(model) is nn.Linear:
        raise ConfigError(f"the model itself is a Linear, which cannot be replaced in place: call quantise_{storage}")
    _check_skip(model, skip)
    # Paths only: a list of the layers would keep every float weight alive until the end.
    paths = [path for path, _ in _layers(model, skip)]
    _check_hooks(model, paths)
    _check_values(model, paths)
    for path in paths:
        _replace(model, path, QUANTISERS[storage])
    model.requires_grad_(False)
    return len(paths)


def _replace(model: nn.Module, path: str, quantise: Callable[[nn.Linear], nn.Module]) -> None:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    model.set_submodule(path, quantise(layer))


def _inside(path: str, skip: Collection[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in skip)


def _place(parameter: Tensor) -> int:
    # Tensors without values, and those that wrap others, have no address.
    ordinary = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta and parameter.numel()
    return parameter.data_ptr() if ordinary else id(parameter)


def _layers(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, nn.Linear]]:
    # A weight is shared where one Parameter has two places, or two begin at the same address. (Weights of one file may
    # lie in one storage without sharing anything.)
    count = Counter(
        _place(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or not is_plain(module) or is_torchao(module) or _inside(path, skip):
            continue
        if module.weight.numel() and count[_place(module.weight)] == 1:
            yield path, module


def _check_skip(model: nn.Module, skip: Collection[str]) -> None:
    if isinstance(skip, str):
        raise ConfigError(f"skip is a collection of paths, got the text {skip!r}: write [{skip!r}]")
    known = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    problems = [f"{one!r} is no module{did_you_mean(one, known)}" for one in skip if one not in set(known)]
    if problems:
        raise ConfigError(
            "skip names modules that the model does not have: take the paths of named_modules()", problems
        )


def _check_hooks(model: nn.Module, paths: Collection[str]) -> None:
    hooked = []
    for path in paths:
        layer = model.get_submodule(path)
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(hooks) or "forward" in vars(layer):
            hooked.append(path)
    if hooked:
        raise ConfigError(
            "layers have hooks or a forward of their own, which quantising would lose: quantise first, or skip them",
            hooked,
        )


def _check_values(model: nn.Module, paths: Collection[str]) -> None:
    problems = []
    for path in paths:
        weight = model.get_submodule(path).get_parameter("weight").detach()
        if weight.is_meta:
            problems.append(f"{path}: the weight is on the meta device and has no values")
            continue
        try:
            check_finite(weight, f"{path}: the weight {tuple(weight.shape)}")
        except BaseModelError as error:
            problems.append(error.message)
    if problems:
        raise BaseModelError("weights cannot be quantised, and nothing was changed", problems)
