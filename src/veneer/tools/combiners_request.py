"""What is asked of `combine`, checked before any work: the settings, and whether the adapters fit each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.adapter import Adapter
from veneer.errors import AdapterError, ConfigError, shortened
from veneer.files.patterns import pattern_problem
from veneer.files.peft_values import MAX_RANK
from veneer.names import did_you_mean, pattern_matches, value_for
from veneer.tools.combiners import RULES
from veneer.tools.combiners_spaces import SPACES
from veneer.tools.stacks import dora_problems, layout_of

LINEAR = "linear"
METHODS = (LINEAR, *RULES)
TRAINED = ("exact", "first", "drop")
_OPTIONS = ("density", "space", "trained")
_SHOWN = 20


@dataclass(frozen=True)
class Request:
    """What is asked of `combine`, with every default filled in.

    Args:
        weights: One for each adapter.
        method: `linear` or a rule.
        rank: Highest rank of a module, or None.
        module_weights: Pattern to weights.
        seed: Fixes what is drawn.
        density: Share of the entries that stays; 1 for `linear`.
        space: Where entries are looked at.
        trained: What becomes of what trained whole.
        names: What errors call the adapters.
    """

    weights: tuple[float, ...]
    method: str
    rank: int | None
    module_weights: Mapping[str, tuple[float, ...]]
    seed: int
    density: float
    space: str
    trained: str
    names: tuple[str, ...]

    def weights_for(self, path: str) -> tuple[float, ...]:
        """Return the adapters' weights for a module or parameter."""
        return value_for(path, self.module_weights, self.weights)

    @property
    def options(self) -> dict[str, object]:
        """What there is to know of it beside weights and method, as plain values."""
        told: dict[str, object] = {"rank": self.rank, "trained": self.trained}
        if self.module_weights:
            told["module_weights"] = {pattern: list(one) for pattern, one in self.module_weights.items()}
        if self.method != LINEAR:
            told |= {"density": self.density, "space": self.space}
        if self.method.startswith("dare"):
            told["seed"] = self.seed
        return told


def read_request(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    module_weights: Mapping[str, Sequence[float]] | None,
    more: tuple[int, bool, Sequence[str] | None],
    options: Mapping[str, object],
) -> Request:
    """Return what is asked for, or raise for all of it that cannot be done.

    Args:
        adapters: What is to be combined.
        weights: As in `combine`, like the next three.
        method: See there.
        rank: See there.
        module_weights: See there.
        more: Its seed, its any_base and its names.
        options: Its options.

    Raises:
        ConfigError: If a setting is wrong; all at once.
        AdapterError: If the adapters do not fit each other; all at once.
    """
    seed, any_base, given = more
    names = tuple(given) if given is not None else tuple(f"adapters[{place}]" for place in range(len(adapters)))
    count, by_module = len(adapters), module_weights or {}
    problems = [] if adapters else ["adapters: expected at least one, got none"]
    if method not in METHODS:
        problems.append(_not_one_of("method", METHODS, method))
    problems += _rank_problems(rank) + _option_problems(method, options)
    if type(seed) is not int or not 0 <= seed < 2**63:
        problems.append(f"seed: expected a whole number from 0 to below 2**63, got {seed!r}")
    problems += _weight_problems("weights", weights, count) if weights is not None else []
    for pattern, one in by_module.items():
        problems += _weight_problems(f"module_weights[{pattern!r}]", one, count)
        problems += _pattern_problems(pattern, adapters)
    if problems:
        raise ConfigError("this combination cannot be made", problems)
    unfit = _unfit(adapters, names, any_base)
    if unfit:
        raise AdapterError("these adapters cannot be combined", shortened(unfit, _SHOWN))
    rule = RULES.get(method)
    even = 1.0 if rule is not None and rule.averages else 1.0 / count
    density = options.get("density", rule.density if rule is not None else 1.0)
    assert isinstance(density, (int, float))
    return Request(
        weights=tuple(float(one) for one in weights) if weights is not None else (even,) * count,
        method=method,
        rank=rank,
        module_weights={pattern: tuple(float(weight) for weight in one) for pattern, one in by_module.items()},
        seed=seed,
        density=float(density),
        space=str(options.get("space", "full")),
        trained=str(options.get("trained", TRAINED[0])),
        names=names,
    )


def _rank_problems(rank: object) -> list[str]:
    if rank is None or (type(rank) is int and 1 <= rank <= MAX_RANK):
        return []
    return [f"rank: expected a whole number from 1 to {MAX_RANK}, got {rank!r}"]


def _option_problems(method: str, options: Mapping[str, object]) -> list[str]:
    problems = []
    for name, value in options.items():
        if name not in _OPTIONS:
            problems.append(f"{name}: unknown option{did_you_mean(name, _OPTIONS)}; there are {', '.join(_OPTIONS)}")
        elif name in ("density", "space") and method == LINEAR:
            problems.append(f"{name}: {LINEAR} adds whole updates, in any space the same; leave it out")
        elif name == "density" and not (type(value) in (int, float) and 0 < value <= 1):  # type: ignore[operator]
            problems.append(f"density: expected a number above 0 and at most 1, got {value!r}")
    for name, known in (("space", tuple(SPACES)), ("trained", TRAINED)):
        value = options.get(name, known[0])
        if value not in known:
            problems.append(_not_one_of(name, known, value))
    return problems


def _not_one_of(name: str, known: Sequence[str], value: object) -> str:
    return f"{name}: expected one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}"


def _weight_problems(name: str, weights: Sequence[float], count: int) -> list[str]:
    problems = []
    if len(weights) != count:
        problems.append(f"{name}: expected a number for each adapter, {count} in all; got {len(weights)}")
    bad = [one for one in weights if type(one) not in (int, float) or not math.isfinite(one)]
    return problems + [f"{name}: {one!r} is no finite number" for one in bad]


def _pattern_problems(pattern: str, adapters: Sequence[Adapter]) -> list[str]:
    if problem := pattern_problem(pattern):
        return [f"module_weights[{pattern!r}]: {problem}"]
    paths = sorted({path for adapter in adapters for path in (*adapter.modules, *adapter.trained, *adapter.tokens)})
    if any(pattern_matches(path, pattern) for path in paths):
        return []
    leaves = [*dict.fromkeys(path.rpartition(".")[2] for path in paths), *paths]
    return [f"module_weights[{pattern!r}]: stands for none of {len(paths)} modules{did_you_mean(pattern, leaves)}"]


def _unfit(adapters: Sequence[Adapter], names: Sequence[str], any_base: bool) -> list[str]:
    """Return why adapters cannot become one: a line for each thing."""
    problems = [line for name, adapter in zip(names, adapters, strict=True) for line in dora_problems(adapter, name)]
    begins = [adapter.config.invocation_tokens for adapter in adapters]
    if len(set(begins)) > 1:
        told = ", ".join(f"{name}: {list(one)}" for name, one in zip(names, begins, strict=True))
        problems.append(
            f"they act from different tokens on (activated LoRA), and one adapter has one place to begin: {told}"
        )
    if not any_base:
        problems += _base_problems(adapters, names)
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        layouts = {
            name: layout_of(adapter.modules[path])
            for name, adapter in zip(names, adapters, strict=True)
            if path in adapter.modules
        }
        if len(set(layouts.values())) > 1:
            told = "; ".join(f"{name}: {' '.join(map(str, one))}" for name, one in layouts.items())
            problems.append(f"{path}: made for different layers: {told}")
    return problems


def _base_problems(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """Return whether the adapters were made for different bases: by fingerprint, or by name where one has none."""
    problems = []
    prints = [adapter.metadata.base_fingerprint for adapter in adapters]
    bases = [adapter.metadata.base for adapter in adapters]
    tasks = [adapter.metadata.task_type for adapter in adapters]
    known = prints if all(prints) else bases
    for what, found in (("bases", known), ("tasks", tasks)):
        if len({one for one in found if one is not None}) > 1:
            told = ", ".join(f"{name}: {one}" for name, one in zip(names, found, strict=True))
            problems.append(
                f"they were made for different {what}; any_base=True, or --any-base, combines them all the same: {told}"
            )
    return problems
