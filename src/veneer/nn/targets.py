"""Which layers of a model a configuration means; every entry must match, every match must fit."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from veneer.config import ALL_LINEAR, LoRAConfig
from veneer.errors import TargetError
from veneer.names import did_you_mean, layer_index, matches, matches_suffix, pattern_matches
from veneer.nn.kinds import LayerKind, kind_of, members_of, why_not
from veneer.nn.unfit import bypassed_layers, misfits, shared_layers, tied_tables, unfit_layers


@dataclass(frozen=True)
class Target:
    """One layer, or one parameter, to adapt: where it is, what it is, and with which rank and scaling.

    Args:
        path: Path of the module, or of the parameter where one is adapted by name.
        owner: Path of the module that is wrapped.
        member: Name of the parameter in it; empty for the module itself.
        kind: What it is.
        out_features: Size of an output.
        in_features: Size of an input.
        shapes: Shapes of lora_A and lora_B.
        rank: Inner dimension of the factors, of each part where there are parts.
        scaling: Factor of the update.
        parts: Runs of output rows with factors of their own.
    """

    path: str
    owner: str
    member: str
    kind: LayerKind
    out_features: int
    in_features: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    rank: int
    scaling: float
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def full_rank(self) -> int:
        """Ranks of all parts together."""
        return self.rank * max(1, len(self.parts))

    def num_trainable(self, config: LoRAConfig) -> int:
        """Return how many numbers train: both factors, of a part only its own rows, and the magnitude."""
        size_A, size_B = (math.prod(shape) for shape in self.shapes)
        if self.parts:
            size_B = self.rank * sum(stop - start for start, stop in self.parts)
        return (0 if config.freeze_A else size_A) + size_B + (self.out_features if config.use_dora else 0)


def make_target(modules: Mapping[str, nn.Module], owner: str, member: str, rank: int, config: LoRAConfig) -> Target:
    """Return the target that a module, or a parameter of it, is; `unfit_layers` has been asked.

    Args:
        modules: The model's modules by path.
        owner: Path of the module.
        member: Name of the parameter, or empty.
        rank: Inner dimension, of each part.
        config: Gives scaling and parts.
    """
    module, path = modules[owner], f"{owner}.{member}" if member else owner
    path = path.removeprefix(".")
    kind = kind_of(module, member)
    assert kind is not None
    parts = config.parts_for(path)
    shapes = kind.shapes(module, member, rank * max(1, len(parts)))
    scaling = config.scaling_for(path)
    return Target(path, owner, member, kind, *kind.sizes(module, member), shapes, rank, scaling, parts)


def find_targets(model: nn.Module, config: LoRAConfig, *, skip: Iterable[nn.Module] = ()) -> list[Target]:
    """Return the layers that a configuration means, in the model's order; the model is not touched.

    Args:
        model: Any module.
        config: Which layers are meant.
        skip: Modules that `"all-linear"` leaves out (a model's output head).

    Raises:
        TargetError: If an entry of a pattern matches nothing, a layer cannot be adapted or cannot take what the
            configuration asks for, a layer stands at two places, or nothing is left; all problems at once, with the
            nearest names.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [target.path for target in find_targets(model, LoRAConfig(target_modules=["2"]))]
        ['2']
    """
    modules = dict(model.named_modules())
    wanted = list(dict.fromkeys([*_wanted(modules, config, {id(module) for module in skip}), *_named(modules, config)]))
    paths = [f"{owner}.{member}".strip(".") for owner, member in wanted]
    problems = [
        *_unmatched(modules, paths, config),
        *shared_layers(model, {owner for owner, _ in wanted}),
        *unfit_layers(modules, wanted),
        *tied_tables(modules, [owner for owner, _ in wanted]),
    ]
    asked = config.target_modules or config.target_parameters  # without either, rows of tokens train alone
    if asked and not wanted and not problems and not config.modules_to_save:
        problems.append(f"nothing is left of target_modules={config.target_modules!r}")
    targets = []
    if not problems:
        ranks = [config.rank_for(path) for path in paths]
        targets = [
            make_target(modules, owner, member, rank, config)
            for (owner, member), rank in zip(wanted, ranks, strict=True)
        ]
        problems = [problem for target in targets for problem in misfits(modules[target.owner], target, config)]
    if problems:
        raise TargetError(f"the model cannot be adapted as asked ({len(modules) - 1} modules, none touched)", problems)
    return targets


def _wanted(modules: Mapping[str, nn.Module], config: LoRAConfig, left_out: set[int]) -> Iterator[tuple[str, str]]:
    """Yield the modules that `target_modules` means, whatever they are, each with the parameters meant by it."""
    saved = _inside(modules, config.modules_to_save)
    bypassed = bypassed_layers(modules) if config.target_modules == ALL_LINEAR else set()
    for path, module in modules.items():
        if not path or path in saved or matches(path, config.exclude_modules):
            continue
        if config.target_modules == ALL_LINEAR:
            kind = kind_of(module)
            fits = kind is not None and kind.form in ("linear", "transposed") and why_not(module) is None
            if fits and path not in bypassed and id(module) not in left_out:
                yield path, ""
        elif matches(path, config.target_modules) and _in_layers(path, config):
            for member in members_of(module):
                yield path, member


def _named(modules: Mapping[str, nn.Module], config: LoRAConfig) -> Iterator[tuple[str, str]]:
    """Yield the module and the parameter's name in it for each parameter that `target_parameters` means.

    The weight of a layer that can be adapted is that layer; what an attention's kernel reads is the attention's.
    """
    for owner, module in modules.items():
        for name, _ in module.named_parameters(recurse=False):
            path = f"{owner}.{name}".strip(".")
            if not any(matches_suffix(path, entry) for entry in config.target_parameters):
                continue
            if not (matches(path, config.exclude_modules) or matches(owner, config.exclude_modules)):
                yield locate(modules, path)


def locate(modules: Mapping[str, nn.Module], path: str) -> tuple[str, str]:
    """Return the path of the module to wrap, and the parameter's name in it, for the path of a module or parameter.

    The weight of a layer that can be adapted is that layer; what an attention's kernel reads is the attention's.

    Raises:
        KeyError: If the model has neither.

    Example:
        >>> modules = dict(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(1, 1)}).named_modules())
        >>> locate(modules, "a.out_proj.weight"), locate(modules, "b.weight"), locate(modules, "a.in_proj_weight")
        (('a', 'out_proj.weight'), ('b', ''), ('a', 'in_proj_weight'))
    """
    if path in modules:
        return path, ""
    owner, _, name = path.rpartition(".")
    parent, _, leaf = owner.rpartition(".")
    module = modules[owner]
    if name not in dict(module.named_parameters(recurse=False)):
        raise KeyError(path)
    if owner and f"{leaf}.{name}" in members_of(modules[parent]):
        return parent, f"{leaf}.{name}"
    return (owner, "") if name == "weight" and kind_of(module) is not None else (owner, name)


def _in_layers(path: str, config: LoRAConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    return layer_index(path, config.layers_pattern) in config.layers_to_transform


def _inside(modules: Iterable[str], entries: Sequence[str]) -> set[str]:
    """Return the paths of the named modules and of all that lies in them."""
    roots = [path for path in modules if any(matches_suffix(path, entry) for entry in entries)]
    return {path for path in modules if any(path == root or path.startswith(root + ".") for root in roots)}


def _unmatched(modules: Mapping[str, nn.Module], wanted: Sequence[str], config: LoRAConfig) -> Iterator[str]:
    """Yield a line for each entry of each pattern that matches nothing."""
    paths = [path for path in modules if path]
    adaptable = [path for path in paths if why_not(modules[path]) is None]
    words = list(dict.fromkeys([*(path.rpartition(".")[2] for path in adaptable), *adaptable]))
    if isinstance(config.target_modules, str):
        if config.target_modules != ALL_LINEAR and not any(matches(path, config.target_modules) for path in paths):
            hint = "; write a list for suffixes" if config.target_modules in words else ""
            yield f"target_modules={config.target_modules!r} matches no whole path{hint}"
    else:
        yield from _entries("target_modules", config.target_modules, paths, words)
    if isinstance(config.exclude_modules, str):
        if not any(matches(path, config.exclude_modules) for path in paths):
            yield f"exclude_modules={config.exclude_modules!r} matches no whole path"
    else:
        yield from _entries("exclude_modules", config.exclude_modules, paths, words)
    yield from _entries("modules_to_save", config.modules_to_save, paths, [*words, *paths])
    if config.target_parameters:
        names = [name for name, _ in modules[""].named_parameters(remove_duplicate=False)]
        tails = [".".join(name.split(".")[-2:]) for name in names]
        yield from _entries("target_parameters", config.target_parameters, names, [*tails, *names], "parameters")
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern, "parts": config.parts}
    for name, keys in patterns.items():
        for pattern in keys:
            if not any(pattern_matches(path, pattern) for path in wanted):
                chosen = [path.rpartition(".")[2] for path in wanted]
                yield f"{name} key {pattern!r} matches none of the adapted layers{did_you_mean(pattern, chosen)}"
    for index in config.layers_to_transform or ():
        if not any(layer_index(path, config.layers_pattern) == index for path in wanted):
            yield f"layers_to_transform={index} matches no target"


def _entries(
    name: str, entries: Sequence[str], paths: Sequence[str], words: Iterable[str], what: str = "modules"
) -> Iterator[str]:
    for entry in entries:
        if not any(matches_suffix(path, entry) for path in paths):
            yield f"{name} entry {entry!r} matches 0 of {len(paths)} {what}{did_you_mean(entry, words)}"
