"""Single values of a PEFT configuration, with exact types: each reader returns the value and notes what is wrong.

Nothing is run that comes from the file: regular expressions are compiled, to see that they are some.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from veneer.config import ALL_LINEAR
from veneer.files.patterns import pattern_problem
from veneer.names import did_you_mean

Choice = TypeVar("Choice", bool, str)

MAX_RANK = 32_768
MAX_ENTRIES = 20_000
MAX_REGEX = 16_384
_SHOWN = 80


def show(value: Any) -> str:
    """Return a value for an error text, cut where it is long.

    Example:
        >>> show("q_proj")
        "'q_proj'"
    """
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def is_empty(value: Any) -> bool:
    """Tell whether a value switches nothing on, whatever its key means; 0 is a value.

    Example:
        >>> [is_empty(value) for value in (None, False, [], {}, "", 0, "no")]
        [True, True, True, True, True, False, False]
    """
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def number(raw: Mapping[str, Any], key: str, default: int, problems: list[str], *, whole: bool = False) -> int | float:
    """Read a rank (`whole`) or an alpha."""
    value = raw.get(key, default)
    if not _is_number(value, whole):
        problems.append(f"{key}: expected {_expected(whole)}, got {show(value)}")
        return default
    return int(value) if whole else float(value)


def dropout(raw: Mapping[str, Any], key: str, problems: list[str]) -> float:
    """Read a probability below 1."""
    value = raw.get(key, 0.0)
    if type(value) not in (int, float) or not 0 <= value < 1:
        problems.append(f"{key}: expected a number from 0 to below 1, got {show(value)}")
        return 0.0
    return float(value)


def pattern(raw: Mapping[str, Any], key: str, problems: list[str], *, whole: bool = False) -> dict[str, Any]:
    """Read patterns with their ranks (`whole`) or alphas, in the order of the file: the first match wins."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        problems.append(f"{key}: expected an object of at most {MAX_ENTRIES} patterns, got {show(value)}")
        return {}
    found: dict[str, int | float] = {}
    for one, amount in value.items():
        if problem := pattern_problem(one):
            problems.append(f"{key}[{show(one)}]: {problem}")
        elif not _is_number(amount, whole):
            problems.append(f"{key}[{show(one)}]: expected {_expected(whole)}, got {show(amount)}")
        else:
            found[one] = int(amount) if whole else float(amount)
    return found


def names(raw: Mapping[str, Any], key: str, problems: list[str], *, regex: bool = False) -> str | tuple[str, ...]:
    """Read a list of names, sorted, each once; or a regular expression where one may stand."""
    value = raw.get(key)
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, list) and len(value) <= MAX_ENTRIES and all(isinstance(one, str) and one for one in value):
        return tuple(sorted(set(value)))
    if not regex or not isinstance(value, str) or len(value) > MAX_REGEX:
        problems.append(f"{key}: expected a list of names{' or a regular expression' * regex}, got {show(value)}")
        return ()
    if value.lower() == ALL_LINEAR:  # PEFT takes the word in any case
        return ALL_LINEAR
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as cause:
        problems.append(f"{key}: not a regular expression: {cause}")
        return ()
    return value


def layers(raw: Mapping[str, Any], key: str, problems: list[str]) -> tuple[int, ...] | None:
    """Read layer indices: one, or a list."""
    value = raw.get(key)
    if value is None or value == []:
        return None
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_ENTRIES or not all(type(one) is int and one >= 0 for one in entries):
        problems.append(f"{key}: expected layer indices from 0, got {show(value)}")
        return None
    return tuple(sorted(set(entries)))


def layers_pattern(raw: Mapping[str, Any], key: str, problems: list[str]) -> str | None:
    """Read the name of the list of layers; several names become one expression."""
    value = raw.get(key)
    if value is None or value == "" or value == []:
        return None
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) and one for one in entries):
        problems.append(f"{key}: expected a name or a list of names, got {show(value)}")
        return None
    joined = entries[0] if len(entries) == 1 else f"(?:{'|'.join(entries)})"
    if problem := pattern_problem(joined):
        problems.append(f"{key}: {problem}")
        return None
    return str(joined)


def choice(raw: Mapping[str, Any], key: str, choices: tuple[Choice, ...], problems: list[str]) -> Choice:
    """Read one of some values of one type; the first is the default."""
    value = raw.get(key)
    if value is None:
        return choices[0]
    if type(value) is not type(choices[0]) or value not in choices:
        near = did_you_mean(value, [str(one) for one in choices]) if isinstance(value, str) else ""
        problems.append(f"{key}: expected one of {', '.join(map(repr, choices))}, got {show(value)}{near}")
        return choices[0]
    return value


def text(raw: Mapping[str, Any], key: str, problems: list[str]) -> str | None:
    """Read a string or null."""
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return value
    problems.append(f"{key}: expected a string or null, got {show(value)}")
    return None


def token_ids(raw: Mapping[str, Any], key: str, problems: list[str]) -> tuple[int, ...]:
    """Read a sequence of token ids."""
    value = raw.get(key)
    if value is None or value == []:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > MAX_ENTRIES
        or not all(type(one) is int and one >= 0 for one in value)
    ):
        problems.append(f"{key}: expected token ids from 0, got {show(value)}")
        return ()
    return tuple(value)


def token_rows(raw: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, tuple[int, ...]]:
    """Read the tokens whose rows train, by the name of their table; a plain list means the table `embed_tokens`."""
    value = raw.get(key)
    if value is None or value == [] or value == {}:
        return {}
    tables = value if isinstance(value, dict) else {"embed_tokens": value}
    for name, ids in tables.items():
        sound = (
            isinstance(ids, list) and 0 < len(ids) <= MAX_ENTRIES and all(type(one) is int and one >= 0 for one in ids)
        )
        if not name or not sound or len(set(ids)) != len(ids):
            problems.append(f"{key}[{show(name)}]: expected token ids from 0, each once, got {show(ids)}")
            return {}
    return {name: tuple(ids) for name, ids in tables.items()}


def _is_number(value: Any, whole: bool) -> bool:
    if whole:
        return type(value) is int and 1 <= value <= MAX_RANK
    return type(value) in (int, float) and 0 < value < math.inf


def _expected(whole: bool) -> str:
    return f"a whole number from 1 to {MAX_RANK}" if whole else "a positive, finite number"
