"""Module paths: matching patterns, near misses, values by pattern.

The rules are PEFT's, so that a configuration means the same in both
(research: peft-format.md 2.2; PEFT 0.21 `tuners/tuners_utils.py`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def matches_suffix(path: str, entry: str) -> bool:
    """Tell whether a module path is the entry or ends with it at a dot.

    Equals `path == entry or path.endswith("." + entry)`.

    Example:
        >>> matches_suffix("layers.0.self_attn.q_proj", "q_proj")
        True
        >>> matches_suffix("layers.0.self_attn.q_proj", "proj")
        False
    """
    return path == entry or path.endswith("." + entry)


def matches(path: str, patterns: str | Iterable[str]) -> bool:
    r"""Tell whether a module path matches: a string is a regular expression for the whole path, a list holds suffixes.

    Example:
        >>> matches("layers.3.mlp.up_proj", r".*\.mlp\..*"), matches("layers.3.mlp.up_proj", ["up_proj"])
        (True, True)
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(matches_suffix(path, entry) for entry in patterns)


def pattern_matches(path: str, pattern: str) -> bool:
    r"""Tell whether a `rank_pattern` or `alpha_pattern` key stands for a module path.

    Equals `re.match(rf"(.*\.)?({pattern})$", path) is not None`.

    Example:
        >>> pattern_matches("layers.3.mlp.up_proj", "up_proj"), pattern_matches("layers.3.mlp.up_proj", r"3\.mlp")
        (True, False)
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def value_for(path: str, patterns: Mapping[str, Value], default: Value) -> Value:
    """Return the value of the first pattern that stands for the path, else the default.

    Example:
        >>> value_for("layers.0.q_proj", {"k_proj": 4, "q_proj": 2}, 8)
        2
    """
    return next((value for pattern, value in patterns.items() if pattern_matches(path, pattern)), default)


def layer_index(path: str, layers_pattern: str | None = None) -> int | None:
    """Return the number of the layer that a module path lies in, or None.

    It is the first number behind the `layers_pattern` name, or the first number in the path, so that
    the numbers of experts are not taken for layers. (PEFT finds no number in a path that begins with
    the layer list, such as `layers.0.q_proj`; we do.)

    Example:
        >>> layer_index("model.layers.7.mlp.experts.3.up_proj")
        7
        >>> layer_index("encoder.h.2.attn.c_attn", "h")
        2
    """
    if layers_pattern is None:
        found = _FIRST_NUMBER.match("." + path)
    else:
        found = re.match(rf".*?\.?(?:{layers_pattern})\.(?P<index>\d+)\.", path)
    return int(found["index"]) if found else None


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the candidates most like a name, best first, each once.

    Whole names are compared, and for dotted paths their last parts as well.

    Example:
        >>> nearest("q_prj", ["q_proj", "k_proj", "o_proj", "embed_tokens"])
        ['q_proj', 'o_proj', 'k_proj']
    """
    unique = list(dict.fromkeys(candidates))
    return difflib.get_close_matches(name, unique, n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; nearest: 'a', 'b'" for an error text, or nothing where no candidate is near.

    Example:
        >>> did_you_mean("learning_rat", ["learning_rate", "epochs"])
        "; nearest: 'learning_rate'"
    """
    near = nearest(name, candidates)
    return "; nearest: " + ", ".join(repr(one) for one in near) if near else ""


def last_name(path: str) -> str:
    """Return the last part of a path that is a name, with the numbers behind it.

    Example:
        >>> last_name("layers.0.q_proj"), last_name("attn1.to_out.0"), last_name("0")
        ('q_proj', 'to_out.0', '0')
    """
    parts = path.split(".")
    start = next((at for at in range(len(parts) - 1, -1, -1) if not parts[at].isdigit()), 0)
    return ".".join(parts[start:])


def by_number(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts paths as people count: layer 2 before layer 10.

    Example:
        >>> sorted(["layers.10.q", "layers.2.q"], key=by_number)
        ['layers.2.q', 'layers.10.q']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
