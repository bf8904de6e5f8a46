"""Parameters that stand at several places: a merge may not change one place through another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.tools.merge_config import tying_configs
from veneer.tools.merge_record import Kept, KeptSetting, KeptTie
from veneer.tools.merge_undo import put


@runtime_checkable
class HasBothEmbeddings(Protocol):
    """The protocol of transformers' language models for their table and their head."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, or None."""


@dataclass(frozen=True)
class Tie:
    """A parameter that stands at several places.

    Args:
        keeper: The place that a merge writes, which keeps the object.
        others: The other places.
    """

    keeper: str
    others: tuple[str, ...]


def find_ties(model: nn.Module, written: Iterable[str]) -> list[Tie]:
    """Return the parameters among those to be written that stand at other places too: as one object, or one memory.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> find_ties(model, ["1.weight"])
        [Tie(keeper='1.weight', others=('0.weight',))]
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    near: dict[int, list[str]] = {}
    for name, parameter in every.items():
        near.setdefault(_storage(parameter), []).append(name)
    ties, seen = [], set()
    for path in written:
        if path in seen or path not in every:
            continue
        same = [name for name in near[_storage(every[path])] if name != path and _meets(every[path], every[name])]
        seen |= {path, *same}
        if same:
            ties.append(Tie(path, tuple(same)))
    return ties


def _ordinary(tensor: Tensor) -> bool:
    return type(tensor.detach()) is Tensor and not tensor.is_meta and tensor.numel() > 0


def _storage(parameter: Tensor) -> int:
    """Return what two parameters have in common if they share memory; for those without memory, the object."""
    return parameter.untyped_storage().data_ptr() if _ordinary(parameter) else id(parameter)


def _meets(one: Tensor, other: Tensor) -> bool:
    """Tell whether two parameters of one storage share memory: pieces of a file lie in one storage side by side."""
    if one is other:
        return True
    if not (_ordinary(one) and _ordinary(other)):
        return False
    (start, stop), (other_start, other_stop) = _range(one), _range(other)
    return start < other_stop and other_start < stop


def _range(tensor: Tensor) -> tuple[int, int]:
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def check_ties(model: nn.Module, ties: Sequence[Tie], quantised: Mapping[str, nn.Module], *, untie: bool) -> None:
    """Raise unless every tie may be, and can be, undone.

    Args:
        model: The model.
        ties: What `find_ties` found.
        quantised: Layers that will be replaced, by path.
        untie: Whether the caller allows it.

    Raises:
        TargetError: If not; every tie is named.
    """
    problems = [
        f"{path}.weight is the same parameter as {', '.join(others)}, and quantised: it cannot be untied"
        for path, others in _shared_quantised(model, quantised)
    ]
    problems += [line for tie in ties for line in _problems(model, tie, untie)]
    if problems:
        raise TargetError(
            "a merge would change a tied parameter at all its places (nothing was touched); tied='untie' gives the "
            "other places a copy of their own, where the configuration can say so",
            problems,
        )


def _shared_quantised(model: nn.Module, quantised: Mapping[str, nn.Module]) -> Iterator[tuple[str, list[str]]]:
    every = list(model.named_parameters(remove_duplicate=False))
    for path, module in quantised.items():
        weight = module._parameters.get("weight")
        others = [name for name, one in every if one is weight and name != f"{path}.weight"]
        if others:
            yield path, others


def _problems(model: nn.Module, tie: Tie, untie: bool) -> Iterator[str]:
    same = f"{tie.keeper} is the same parameter as {', '.join(tie.others)}"
    if not untie:
        yield same
        return
    places = [_place(model, name) for name in (tie.keeper, *tie.others)]
    if len({(id(module), name) for module, name in places}) < len(places):
        yield f"{same}, because one module stands at several places: it cannot be untied"
    elif tying_configs(model) and not _is_table_and_head(model, tie):
        yield f"{same}; only a head and its table can be untied in a saved configuration, others are tied when it loads"


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _is_table_and_head(model: nn.Module, tie: Tie) -> bool:
    if len(tie.others) != 1 or not isinstance(model, HasBothEmbeddings):
        return False
    owners = {id(_place(model, name)[0]) for name in (tie.keeper, *tie.others)}
    return owners == {id(model.get_input_embeddings()), id(model.get_output_embeddings())}


def untie(model: nn.Module, ties: Sequence[Tie], kept: list[Kept]) -> None:
    """Give each other place of a tied parameter a copy of its own, and say so in the configuration.

    Args:
        model: Changed in place.
        ties: What `check_ties` let pass.
        kept: What is undone; appended to, step by step.
    """
    for tie in ties:
        for path in tie.others:
            original = model.get_parameter(path)
            with torch.no_grad():
                copy = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
            kept.append(KeptTie(path, tie.keeper, original, copy, original is model.get_parameter(tie.keeper)))
            put(model, path, copy)
    for place, config in enumerate(tying_configs(model) if ties else ()):
        kept.append(KeptSetting(place, config.tie_word_embeddings))
        config.tie_word_embeddings = False
