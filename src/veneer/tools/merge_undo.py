"""Taking a merge back, step by step, and knowing whether the weights are still what it wrote."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from veneer.errors import AttachError
from veneer.nn.fingerprint import fingerprint
from veneer.storage.registry import read_weight, storage_of
from veneer.tools.merge_config import tying_configs
from veneer.tools.merge_record import Kept, KeptBits, KeptModule, KeptSetting, KeptStored, KeptTie


def keep_bits(model: nn.Module, path: str) -> KeptBits:
    """Return a parameter's numbers as they are."""
    return KeptBits(path, model.get_parameter(path).detach().to("cpu", copy=True))


def keep_stored(model: nn.Module, path: str) -> KeptStored:
    """Return the tensors of a quantised weight, with their numbers as they are."""
    module = model.get_submodule(path)
    tensors = {
        name: (one, one.detach().to("cpu", copy=True)) for name, one in _tensors(_roots(module), "", set()).items()
    }
    return KeptStored(path, tensors, _digest(read_weight(module)))


def _roots(module: nn.Module) -> dict[str, object]:
    """Return what a layer holds: parameters, buffers, and states of a package's own."""
    return {name: one for name, one in vars(module).items() if not name.startswith("_")} | {
        **module._parameters,
        **module._buffers,
    }


def _tensors(holder: dict[str, object], prefix: str, seen: set[int]) -> dict[str, Tensor]:
    """Return the plain tensors that can be reached through attributes, by path: codes, scales, scales of scales."""
    found: dict[str, Tensor] = {}
    for name, one in holder.items():
        if id(one) in seen or isinstance(one, (nn.Module, type)) or callable(one):
            continue
        seen.add(id(one))
        path = f"{prefix}{name}"
        if isinstance(one, Tensor) and type(one.detach()) is Tensor:  # not one that only wraps others
            found[path] = one
        if isinstance(one, Tensor) or type(one).__module__ != "builtins":
            found |= _tensors(_attributes(one), f"{path}.", seen)
    return found


def _attributes(one: object) -> dict[str, object]:
    try:
        return dict(vars(one))
    except TypeError:  # an object of slots holds no tensor of any known storage
        return {}


def put(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    """Set a module or a parameter of a model by its path."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


@torch.no_grad()
def undo(model: nn.Module, kept: Iterable[Kept]) -> None:
    """Put everything back, the last first; numbers by path, modules and parameters as the objects that they were.

    In a copy of the merged model, which a merge's record does not know, these are copies of their own.

    Raises:
        AttachError: If a quantised weight cannot be put back, or is to be copied and was changed since.
    """
    for one in reversed(list(kept)):
        match one:
            case KeptBits():
                model.get_parameter(one.path).copy_(one.original)
            case KeptStored():
                _restore(model.get_submodule(one.path), one)
            case KeptModule():
                _put_back(model, one)
            case KeptTie():
                _tie_again(model, one)
            case KeptSetting():
                tying_configs(model)[one.place].tie_word_embeddings = one.value


def _put_back(model: nn.Module, kept: KeptModule) -> None:
    now, original = model.get_submodule(kept.path), kept.original
    if now is not kept.replacement:
        if fingerprint(original) != kept.fingerprint:
            raise AttachError(f"{kept.path}: the layer that the merge replaced was changed since, and cannot be copied")
        original = deepcopy(original)
    _follow(original, now)
    put(model, kept.path, original)


def _tie_again(model: nn.Module, kept: KeptTie) -> None:
    now = model.get_parameter(kept.path)
    if now is kept.copy:
        # The model may have been moved in between.
        kept.original.data = kept.original.data.to(now.device)
        put(model, kept.path, kept.original)
    elif kept.was_the_keepers:
        put(model, kept.path, model.get_parameter(kept.keeper))
    # Else the copy's own parameter stays: that it lay on the keeper's memory is nothing that a copy can have.


def _restore(module: nn.Module, kept: KeptStored) -> None:
    """Write the numbers back: to what stands in a tensor's place (on another device), or to the tensor, if it moved."""
    now = _tensors(_roots(module), "", set())
    for name, (tensor, original) in kept.tensors.items():
        now.get(name, tensor).detach().copy_(original)
    if _digest(read_weight(module)) != kept.digest:
        raise AttachError(f"{kept.path}: its quantised tensors were replaced since the merge, and cannot be put back")


def _follow(original: nn.Module, replacement: nn.Module) -> None:
    """Bring a module to the device and the mode that its replacement has now."""
    original.train(replacement.training)
    here, there = device_of(original), device_of(replacement)
    if here != there:
        original.to(there)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's tensors are."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return tensors[0].device


def digests(model: nn.Module, kept: Iterable[Kept]) -> dict[str, str]:
    """Return a digest of what stands now at each place that was written.

    Cost:
        SHA-256 over every written weight: of the order of a second for a gigabyte.
    """
    return {place: read() for place, read in _readers(model, kept)}


def altered(model: nn.Module, kept: Iterable[Kept], written: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each place that is no longer what the merge wrote."""
    modules = dict(model.named_modules())
    for one in kept:
        # Of a copy of the model the module is another one; what it stands for is compared below.
        if isinstance(one, KeptModule) and type(modules.get(one.path)) is not type(one.replacement):
            yield f"{one.path}: another module stands here than the one that the merge put"
    found = digests(model, kept)
    yield from (f"{place}: the numbers are others" for place, digest in written.items() if found.get(place) != digest)


def _readers(model: nn.Module, kept: Iterable[Kept]) -> Iterator[tuple[str, Callable[[], str]]]:
    known = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for one in kept:
        match one:
            case KeptBits() | KeptTie() if one.path in known:
                yield one.path, lambda path=one.path: _digest(known[path])  # type: ignore[misc]
            case KeptModule() | KeptStored() if one.path in modules and storage_of(modules[one.path]) is not None:
                # In whatever form it is stored: what counts is what it stands for.
                yield one.path, lambda path=one.path: _digest(read_weight(modules[path]))  # type: ignore[misc]


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
