"""What a method of PEFT is here: which tensors a module has, and the functions that make an update of them.

A method is one row of a registry; `peft_other` reads any of them the same way.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError
from veneer.files.patterns import resolve
from veneer.ops.low_rank import Factors

Layout = Mapping[str, tuple[str, ...]]
"""Name of a tensor to the names of its dimensions; `r` is the rank, `1` is of size one."""

Parts = Mapping[str, Tensor]
"""Name of a tensor to its values: what one module has."""

Shapes = Mapping[str, Sequence[int]]
"""Module path to the shape of the base's weight."""


@dataclass(frozen=True)
class Raw:
    """What is known of a file while it is read.

    Args:
        modules: Module path to its tensors.
        shared: Tensors that belong to no module, by name.
        settings: Values of the configuration.
        shapes: Module path to the shape of the base's weight, where the caller knows them.
        problems: Where to note what is wrong.
    """

    modules: Mapping[str, Parts]
    shared: Parts
    settings: Mapping[str, Any]
    shapes: Shapes | None
    problems: list[str]


def _as_they_are(raw: Raw) -> Mapping[str, Parts]:
    return raw.modules


@dataclass(frozen=True, eq=False)
class Method:
    """One method: its configuration, its tensors, its arithmetic.

    Args:
        name: Its name for people.
        layouts: The sets of tensors that a module can have.
        keys: Keys of the configuration that are used besides those of every method.
        ignored: Keys that change nothing in a trained adapter.
        unsupported: Key to what it would switch on.
        settings: Reads the used keys.
        numbers: Gives each module path its rank and its scaling.
        fits: Tells what is wrong with a module's tensors besides shapes; gets parts, rank, settings.
        delta: The update from parts and scaling, in float64.
        factors: The update as a product of at most some rank, or None where it is none by structure.
        dropout: Key of a dropout on the layer's input, the one that LoRA has too.
        only: Its word for `bias="lora_only"`; None where it has no `bias`.
        shared: Names of tensors that belong to no module.
        complete: Gives each module its share of the shared tensors.
    """

    name: str
    layouts: tuple[Layout, ...]
    keys: tuple[str, ...]
    ignored: tuple[str, ...]
    settings: Callable[[Mapping[str, Any], list[str]], dict[str, Any]]
    numbers: Callable[[Mapping[str, Any], Collection[str], list[str]], dict[str, tuple[int, float]]]
    fits: Callable[[Parts, int, Mapping[str, Any]], list[str]]
    shape: Callable[[Parts], tuple[int, ...]]
    delta: Callable[[Parts, float], Tensor]
    factors: Callable[[Parts, float, int | None], Factors | None]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    dropout: str | None = None
    only: str | None = None
    shared: tuple[str, ...] = ()
    complete: Callable[[Raw], Mapping[str, Parts]] = _as_they_are

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that a module can have in the file."""
        names = dict.fromkeys(name for layout in self.layouts for name in layout)
        return tuple(name for name in names if name not in self.shared)


@dataclass(frozen=True, eq=False)
class ModuleUpdate:
    """What an adapter of another method adds to one weight.

    Args:
        method: The method.
        parts: The tensors, by the names that the method gives them.
        scaling: The factor that the method applies.
        shape: Of the weight: (out, in), or (out, in, kernel...) of a convolution. Without `shapes`, a convolution
            whose kernel the file keeps flat is (out, in * kernel), and one over one dimension has a last size of 1.
    """

    method: Method
    parts: Parts
    scaling: float
    shape: tuple[int, ...]

    def delta(self) -> Tensor:
        """Return the update in float64, in the weight's shape."""
        return self.method.delta(self.parts, self.scaling).reshape(self.shape)

    def factors(self, most: int | None = None) -> Factors | None:
        """Return the update as a product of matrices (out, rank) and (rank, everything else), or None.

        None stands where the structure gives no factors: convolutions of LoHa, some of LoKr, LoHa of high rank.

        Args:
            most: Highest rank that is wanted; where the structure allows it, no more is formed and `dropped` tells
                what was left out. The rank can still be higher.
        """
        return self.method.factors(self.parts, self.scaling, most)


def by_patterns(settings: Mapping[str, Any], paths: Collection[str], problems: list[str]) -> dict[str, Any]:
    """Return rank and `alpha / r` of each module, after the patterns, as LoHa and LoKr have them."""
    try:
        ranks = resolve(paths, settings["rank_pattern"], settings["r"])
        alphas = resolve(paths, settings["alpha_pattern"], settings["alpha"])
    except AdapterError as error:
        problems.append(error.message)
        return {}
    return {path: (ranks[path], alphas[path] / ranks[path]) for path in paths}
