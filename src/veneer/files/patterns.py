r"""Ranks and alphas by pattern: resolved fast, bounded in time, and written so that they come out exactly.

PEFT takes the first key for which `re.match(rf"(.*\.)?({key})$", path)` holds. A key may come from a file that nobody
vouches for, and Python's matcher cannot be interrupted, so keys that could take long are refused (failures.md A10).
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.peft_layout import owner_of

Value = TypeVar("Value")

MAX_PATTERN = 512
MAX_PATH = 256
MAX_CHOICES = 3
_SECONDS = 2.0

_LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\[^A-Za-z0-9\s])+")
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


@dataclass(frozen=True)
class Scales:
    """The numbers of a PEFT configuration that give each module its rank and its scaling.

    Args:
        rank: PEFT's `r`.
        alpha: PEFT's `lora_alpha`.
        rank_pattern: Pattern to rank.
        alpha_pattern: Pattern to alpha.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def within(self, config: LoRAConfig) -> LoRAConfig:
        """Return a configuration with these numbers in the place of its own."""
        patterns = {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        return config.model_copy(update={"rank": self.rank, "alpha": self.alpha, **patterns})


def pattern_problem(pattern: str) -> str | None:
    r"""Return why a pattern from a file is refused, or None.

    At most three of its parts may choose (a quantifier, or a group with `|`), and no group may repeat. On paths of
    256 characters one match then takes well under a second.

    Example:
        >>> pattern_problem(r".*\.(q|v)_proj"), pattern_problem("(a+)+$")
        (None, 'a group that repeats can take for ever')
    """
    if len(pattern) > MAX_PATTERN:
        return f"{len(pattern)} characters; at most {MAX_PATTERN} are read"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as cause:
        return f"not a regular expression: {cause}"
    if re.search(r"\\[1-9]", pattern) or re.search(r"\(\?[^:]", pattern):
        return "back references, look-around and flags are not read"
    plain = _ONE_CHARACTER.sub("x", pattern.replace("(?:", "("))
    if re.search(r"\)[*+{]", plain):
        return "a group that repeats can take for ever"
    choices = len(re.findall(r"[*+?{]", plain)) + _alternations(plain)
    if choices > MAX_CHOICES:
        return f"{choices} quantifiers and alternatives; at most {MAX_CHOICES} are read"
    return None


def resolve(paths: Iterable[str], patterns: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return each path's value: that of the first pattern that stands for it, else the default.

    Equals, and is tested against, `{path: names.value_for(path, patterns, default) for path in paths}`, but takes time
    linear in the number of paths where the patterns are plain names.

    Raises:
        AdapterError: If matching takes longer than two seconds.

    Example:
        >>> resolve(["a.q", "a.k"], {"q": 4}, 8)
        {'a.q': 4, 'a.k': 8}
    """
    values = list(patterns.values())
    literal: dict[str, int] = {}
    regexes: list[tuple[int, re.Pattern[str]]] = []
    for place, pattern in enumerate(patterns):
        if _LITERAL.fullmatch(pattern):
            literal.setdefault(re.sub(r"\\(.)", r"\1", pattern), place)
        else:
            regexes.append((place, re.compile(rf"(.*\.)?({pattern})$")))
    found, deadline = {}, time.monotonic() + _SECONDS
    for path in paths:
        best = min((literal[name] for name in _suffixes(path) if name in literal), default=len(values))
        for place, regex in regexes:
            if place >= best:
                break
            if regex.match(path):
                best = place
            if time.monotonic() > deadline:
                raise AdapterError(f"matching {len(patterns)} patterns takes over {_SECONDS:g} s; write full paths")
        found[path] = values[best] if best < len(values) else default
    return found


def divisor(rank: int, use_rslora: bool) -> float:
    """Return what alpha is divided by to give the scaling.

    Example:
        >>> divisor(4, use_rslora=False), divisor(4, use_rslora=True)
        (4, 2.0)
    """
    return math.sqrt(rank) if use_rslora else rank


def alpha_giving(scaling: float, rank: int, use_rslora: bool) -> float:
    """Return the alpha that gives a scaling: the roundest that gives it exactly, else the nearest.

    Example:
        >>> alpha_giving(16 / 3**0.5, 3, use_rslora=True)
        16.0
    """
    by = divisor(rank, use_rslora)
    alpha = scaling * by
    tries = [float(f"{alpha:.{digits}g}") for digits in (6, 12, 15)]
    tries += [alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0)]
    return next((one for one in tries if one / by == scaling), alpha)


def scales_for(adapter: Adapter) -> Scales:
    """Return the numbers to write: the configuration's own where they give every module what it has, else exact ones.

    Raises:
        AdapterError: If a scaling is not a positive, finite number.
    """
    config = adapter.config
    modules = {owner_of(path, pair.form): pair for path, pair in adapter.modules.items()}
    bad = [f"{path}: scaling {pair.scaling!r}" for path, pair in modules.items() if not 0 < pair.scaling < math.inf]
    if bad:
        raise AdapterError("a scaling must be positive and finite to be written; fold its sign into lora_B", bad)
    # JSON is written with sorted keys, by PEFT too, and the first match wins: so the sorted order is what counts.
    ranks_by = {key: config.rank_pattern[key] for key in sorted(config.rank_pattern)}
    alphas_by = {key: config.alpha_pattern[key] for key in sorted(config.alpha_pattern)}
    ranks = resolve(modules, ranks_by, config.rank)
    alphas = resolve(modules, alphas_by, config.alpha)
    readable = not any(pattern_problem(key) for key in (*ranks_by, *alphas_by))
    if readable and all(
        ranks[path] == pair.rank and _gives(alphas[path], pair, config.use_rslora) for path, pair in modules.items()
    ):
        return Scales(config.rank, config.alpha, ranks_by, alphas_by)
    ranks = {path: pair.rank for path, pair in modules.items()}
    alphas = {path: alpha_giving(pair.scaling, pair.rank, config.use_rslora) for path, pair in modules.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return Scales(rank, alpha, _exceptions(ranks, rank), _exceptions(alphas, alpha))


def _gives(alpha: float, pair: LowRank, use_rslora: bool) -> bool:
    if alpha / divisor(pair.rank, use_rslora) == pair.scaling:
        return True
    return alpha == alpha_giving(pair.scaling, pair.rank, use_rslora)


def _most_common(values: Iterable[Value]) -> Value:
    return Counter(sorted(values, key=float)).most_common(1)[0][0]  # type: ignore[arg-type]


def _exceptions(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return a pattern for each path whose value is not the default, which stands for that path alone."""
    tails = Counter(tail for path in values for tail in _suffixes(path)[2:])
    # The caret keeps the pattern of `q` from standing for `x.q` too; it is left out where nothing needs it.
    return {("^" if tails[path] else "") + re.escape(path): value for path, value in values.items() if value != default}


def _suffixes(path: str) -> list[str]:
    """Return the plain patterns that stand for a path, the anchored one and the whole path first."""
    parts = path.split(".")
    return ["^" + path, *(".".join(parts[start:]) for start in range(len(parts)))]


def _alternations(plain: str) -> int:
    """Return how many groups, the whole included, hold a `|` of their own."""
    count, stack = 0, [False]
    for char in plain:
        if char == "(":
            stack.append(False)
        elif char == ")" and len(stack) > 1:
            count += stack.pop()
        elif char == "|":
            stack[-1] = True
    return count + sum(stack)
