"""Which layers of a model a configuration means; every entry must match, every match must fit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from veneer.config import ALL_LINEAR, LoRAConfig
from veneer.errors import TargetError
from veneer.names import did_you_mean, layer_index, matches, matches_suffix, pattern_matches
from veneer.nn.kinds import LayerKind, kind_of, why_not


@dataclass(frozen=True)
class Target:
    """One layer to adapt: where it is, what it is, and with which rank and scaling."""

    path: str
    kind: LayerKind
    out_features: int
    in_features: int
    rank: int
    scaling: float

    @property
    def num_parameters(self) -> int:
        """Size of both factors: `rank · (in + out)`."""
        return self.rank * (self.in_features + self.out_features)


def find_targets(model: nn.Module, config: LoRAConfig, *, skip: Iterable[nn.Module] = ()) -> list[Target]:
    """Return the layers that a configuration means, in the model's order; the model is not touched.

    Args:
        model: Any module.
        config: Which layers are meant.
        skip: Modules that `"all-linear"` leaves out (a model's output head).

    Raises:
        TargetError: If an entry of a pattern matches nothing, a layer cannot be adapted, a layer stands at two
            places, or nothing is left; all problems at once, with the nearest names.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [target.path for target in find_targets(model, LoRAConfig(target_modules=["2"]))]
        ['2']
    """
    modules = dict(model.named_modules())
    del modules[""]
    left_out = {id(module) for module in skip}
    wanted = list(_wanted(modules, config, left_out))
    problems = [
        *_unmatched(modules, wanted, config),
        *shared_layers(model, set(wanted)),
        *unfit_layers(modules, wanted),
    ]
    if not wanted and not problems and not config.modules_to_save:
        problems.append(f"nothing is left of target_modules={config.target_modules!r}")
    if problems:
        raise TargetError(f"the model cannot be adapted as asked ({len(modules)} modules, none touched)", problems)
    return [_target(path, modules[path], config) for path in wanted]


def _target(path: str, module: nn.Module, config: LoRAConfig) -> Target:
    kind = kind_of(module)
    assert kind is not None  # find_targets has asked `why_not`
    out_features, in_features = kind.shape(module)
    return Target(path, kind, out_features, in_features, config.rank_for(path), config.scaling_for(path))


def _wanted(modules: dict[str, nn.Module], config: LoRAConfig, left_out: set[int]) -> Iterator[str]:
    """Yield the paths that the configuration means, whatever they are."""
    saved = _inside(modules, config.modules_to_save)
    bypassed = _bypassed(modules) if config.target_modules == ALL_LINEAR else set()
    for path, module in modules.items():
        if path in saved or matches(path, config.exclude_modules):
            continue
        if config.target_modules == ALL_LINEAR:
            fits = isinstance(module, nn.Linear) and why_not(module) is None and path not in bypassed
            if fits and id(module) not in left_out:
                yield path
        elif matches(path, config.target_modules) and _in_layers(path, config):
            yield path


def _in_layers(path: str, config: LoRAConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    return layer_index(path, config.layers_pattern) in config.layers_to_transform


def _inside(modules: Iterable[str], entries: Sequence[str]) -> set[str]:
    """Return the paths of the named modules and of all that lies in them."""
    roots = [path for path in modules if any(matches_suffix(path, entry) for entry in entries)]
    return {path for path in modules if any(path == root or path.startswith(root + ".") for root in roots)}


def _unmatched(modules: dict[str, nn.Module], wanted: Sequence[str], config: LoRAConfig) -> Iterator[str]:
    """Yield a line for each entry of each pattern that matches nothing."""
    adaptable = {path: None for path, module in modules.items() if why_not(module) is None}
    words = dict.fromkeys([*(path.rpartition(".")[2] for path in adaptable), *adaptable])
    paths = list(modules)
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
    yield from _entries("modules_to_save", config.modules_to_save, paths, dict.fromkeys([*words, *paths]))
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_matches(path, pattern) for path in wanted):
                chosen = [path.rpartition(".")[2] for path in wanted]
                yield f"{name} key {pattern!r} matches none of the adapted layers{did_you_mean(pattern, chosen)}"
    for index in config.layers_to_transform or ():
        if not any(layer_index(path, config.layers_pattern) == index for path in wanted):
            yield f"layers_to_transform={index} matches no target"


def unfit_layers(modules: dict[str, nn.Module], wanted: Sequence[str]) -> Iterator[str]:
    """Yield a line for each reason why targets cannot be adapted, with the first path and the count."""
    by_reason: dict[str, list[str]] = {}
    bypassed = _bypassed(modules)
    for path in wanted:
        reason = why_not(modules[path])
        if path in bypassed:
            reason = "is read by the fused kernel of nn.TransformerEncoderLayer, which never calls it in evaluation"
        if reason is not None:
            by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        more = f" (and {len(paths) - 1} more like it)" if len(paths) > 1 else ""
        yield f"{paths[0]} {reason}{more}"


def _entries(name: str, entries: Sequence[str], paths: Sequence[str], words: Iterable[str]) -> Iterator[str]:
    for entry in entries:
        if not any(matches_suffix(path, entry) for path in paths):
            yield f"{name} entry {entry!r} matches 0 of {len(paths)} modules{did_you_mean(entry, words)}"


def shared_layers(model: nn.Module, wanted: set[str]) -> Iterator[str]:
    """Yield a line for each wanted layer that stands at two places: swapping one would leave the other as it was."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        before = first.setdefault(id(module), path)
        if before != path and {before, path} & wanted:
            yield f"{path} is the same module as {before}; a layer that stands at two places cannot be adapted"


def _bypassed(modules: dict[str, nn.Module]) -> set[str]:
    """Return the layers of torch's encoder that its fused kernel reads in evaluation instead of calling them."""
    encoders = [path for path, module in modules.items() if isinstance(module, nn.TransformerEncoderLayer)]
    return {f"{path}.{name}" for path in encoders for name in ("linear1", "linear2")}
