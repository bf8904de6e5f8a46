"""What a merge does to a layer whose weight is quantised, and which weights it can write at all."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, LowRank
from veneer.errors import ConfigError
from veneer.names import did_you_mean
from veneer.nn.targets import Target
from veneer.storage.plain import DTYPES
from veneer.storage.registry import read_weight, storage_of, write_weight
from veneer.tools.merge_undo import device_of
from veneer.tools.merge_weights import Change, merge_weight, stored_change

Quantised = Literal["refuse", "requantise", "dequantise"]
FullWeights = Mapping[str, Tensor] | Callable[[str], Tensor]


def weight_path(target: Target) -> str:
    """Return the path of the parameter that a target's update belongs to."""
    return f"{target.owner}.{target.member or 'weight'}"


def quantised_layers(model: nn.Module, targets: list[Target]) -> dict[str, nn.Module]:
    """Return the layers among the targets whose weight is not stored as plain numbers, by path."""
    layers = {target.owner: model.get_submodule(target.owner) for target in targets if not target.member}
    return {path: one for path, one in layers.items() if stored_as(one) not in (None, "plain")}


def stored_as(module: nn.Module) -> str | None:
    """Return the name of a module's storage, or None."""
    storage = storage_of(module)
    return None if storage is None else storage.name


def unwritable(
    model: nn.Module, targets: list[Target], adapter: Adapter, quantised: Mapping[str, nn.Module]
) -> list[str]:
    """Return a line for each parameter that cannot be written in place: not plain numbers, or not a parameter."""
    known = dict(model.named_parameters(remove_duplicate=False))
    paths = [weight_path(target) for target in targets if target.member or target.owner not in quantised]
    return [line for path in [*paths, *adapter.trained] for line in _why_unwritable(path, known)]


def _why_unwritable(path: str, known: Mapping[str, nn.Parameter]) -> Iterator[str]:
    one = known.get(path)
    if one is None:
        yield f"{path}: is no parameter, but made of others when it is read{did_you_mean(path, known)}"
    elif one.is_meta:
        yield f"{path}: is on the meta device and has no values; load the model first"
    elif one.dtype not in DTYPES or type(one.detach()) is not Tensor:
        yield f"{path}: is stored as {type(one.detach()).__name__} of {one.dtype}, which cannot be written in place"


def check_choice(
    quantised: Quantised, layers: Mapping[str, nn.Module], targets: list[Target], full_weights: FullWeights | None
) -> None:
    """Raise unless the user has said what a merge into quantised layers means, and it can be done.

    Raises:
        ConfigError: Then, naming the layers.
    """
    if not layers:
        if full_weights is not None:
            raise ConfigError("full_weights are given, and no adapted layer is quantised; leave them out")
        return
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(stored_as(one) for one in layers.values()).items())
    if quantised == "refuse" and full_weights is None:
        raise ConfigError(
            f"adapted layers are quantised ({kinds}; {next(iter(layers))} is one); say which base is meant: "
            "quantised='requantise' rounds the sum into the stored form again, quantised='dequantise' puts plain layers"
            " of the dequantised weight and the update, full_weights=… of the full-precision weight and the update"
        )
    if quantised == "requantise" and full_weights is not None:
        raise ConfigError("full_weights make plain layers; leave them out, or leave quantised='requantise' out")
    if quantised == "requantise":
        return
    problems = [line for path, one in layers.items() for line in _hooked(path, one)]
    problems += [
        f"{target.path}: is of kind {target.kind.name!r}; only linear layers become plain ones"
        for target in targets
        if target.owner in layers and target.kind.form != "linear"
    ]
    if isinstance(full_weights, Mapping):
        problems += [line for target in targets if target.owner in layers for line in _misfit(full_weights, target)]
    if problems:
        raise ConfigError("quantised layers cannot be replaced as asked (nothing was touched)", problems)


def _hooked(path: str, layer: nn.Module) -> Iterator[str]:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or "forward" in vars(layer):
        yield f"{path}: has hooks or a forward of its own, which its replacement would lose; merge first"


def _misfit(full_weights: Mapping[str, Tensor], target: Target) -> Iterator[str]:
    name = weight_path(target)
    if name not in full_weights:
        yield f"{name}: full_weights have no such tensor{did_you_mean(name, full_weights)}"
        return
    yield from _wrong_shape(full_weights[name], target)


def _wrong_shape(weight: Tensor, target: Target) -> Iterator[str]:
    expected = (target.out_features, target.in_features)
    if tuple(weight.shape) != expected or not weight.is_floating_point():
        yield (
            f"{weight_path(target)}: the layer's weight is {expected} and floating, full_weights give "
            f"{tuple(weight.shape)} {weight.dtype}"
        )


def common_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most of a model's plain floating numbers, in which it computes; float32 without any.

    Example:
        >>> common_dtype(nn.Linear(2, 2).bfloat16()), common_dtype(nn.GELU())
        (torch.bfloat16, torch.float32)
    """
    count: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.dtype in DTYPES and type(parameter.detach()) is Tensor:
            count[parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0] if count else torch.float32


@torch.no_grad()
def requantise(module: nn.Module, target: Target, pair: LowRank) -> Change:
    """Round a quantised weight with its update into its stored form, in place."""
    weight = read_weight(module)
    change = merge_weight(weight, weight, module, target, pair)
    if not change.largest:
        return change
    before = read_weight(module)
    write_weight(module, weight)
    return stored_change(before, weight, read_weight(module), change)


@torch.no_grad()
def dequantised(
    module: nn.Module, target: Target, pair: LowRank, full_weights: FullWeights | None, dtype: torch.dtype
) -> tuple[nn.Module, Change]:
    """Return a plain linear layer with a quantised one's weight, or the full-precision one, and its update."""
    device = device_of(module)
    if full_weights is None:
        weight = read_weight(module)
    else:
        name = weight_path(target)
        weight = full_weights[name] if isinstance(full_weights, Mapping) else full_weights(name)
        if problems := list(_wrong_shape(weight, target)):
            raise ConfigError("full_weights do not fit the model", problems)
        weight = weight.detach().to(device)
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    change = merge_weight(weight, out, module, target, pair)
    bias = module._parameters.get("bias")
    # On the meta device nothing is drawn: the caller's random state stays as it is.
    linear = nn.Linear(target.in_features, target.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(out, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)
    return linear.train(module.training), change
