"""The demo's task: dates as people of many countries write them, to ISO 8601.

The written forms are those of Unicode's CLDR, through babel: real patterns and real names of months and days.
"""

import datetime
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from veneer.errors import ConfigError, MissingDependencyError
from veneer.names import did_you_mean

ChatDict: TypeAlias = dict[str, list[dict[str, str]]]

INSTRUCTION = "Write the date as YYYY-MM-DD."
LOCALES = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "nb", "pl", "cs")
FORMATS = ("full", "long", "medium")

_FIRST = datetime.date(1950, 1, 1)
_DAYS = tuple(_FIRST + datetime.timedelta(days) for days in range((datetime.date(2050, 1, 1) - _FIRST).days))


@dataclass(frozen=True)
class DateTask:
    """Chat rows to train on and to evaluate on; no date and no written form stands in both."""

    train: tuple[ChatDict, ...]
    eval: tuple[ChatDict, ...]


def date_rows(
    seed: int,
    num_train: int,
    num_eval: int,
    *,
    locales: Sequence[str] = LOCALES,
    instruction: str = INSTRUCTION,
) -> DateTask:
    """Draw rows of written dates and their ISO 8601 form, all of different dates, uniform over 1950 to 2049.

    Each date is written once, in one of the locales and CLDR's full, long or medium format. A written form that
    could stand for another date too, in whichever of the locales and formats, is never used. The evaluation rows
    depend on the seed and not on `num_train`.

    Args:
        seed: Fixes the rows, for one version of babel (each brings its own CLDR).
        num_train: Rows to train on.
        num_eval: Rows to evaluate on.
        locales: CLDR names such as "de" or "pt_BR".
        instruction: The system message of each row.

    Raises:
        ConfigError: Seed or counts below 0, more rows than there are dates, no locale, or one that CLDR does not have.
        MissingDependencyError: Without babel.

    Example:
        >>> task = date_rows(seed=0, num_train=2, num_eval=1, locales=["de"])
        >>> [message["role"] for message in task.eval[0]["messages"]], len(task.train)
        (['system', 'user', 'assistant'], 2)

    Source:
        Unicode CLDR's date formats, https://cldr.unicode.org, as babel carries them.
    """
    babel = _babel()
    _check(babel, seed, num_train, num_eval, locales)
    styles = [(locale, form) for locale in dict.fromkeys(locales) for form in FORMATS]
    meanings = _meanings(babel, styles)
    draw = random.Random(seed)
    rows: list[ChatDict] = []
    for day in draw.sample(_DAYS, len(_DAYS)):
        if len(rows) == num_train + num_eval:
            break
        for locale, form in draw.sample(styles, len(styles)):
            written = babel.dates.format_date(day, form, locale)
            if meanings.get(_without_year(written, day)) == {(day.month, day.day)}:
                turns = {"system": instruction, "user": written, "assistant": day.isoformat()}
                rows.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
                break
    if len(rows) < num_train + num_eval:
        raise ConfigError(f"{num_train + num_eval} rows asked for, but only {len(rows)} dates have an unambiguous form")
    return DateTask(train=tuple(rows[num_eval:]), eval=tuple(rows[:num_eval]))


def to_jsonl(rows: Iterable[ChatDict]) -> str:
    r"""Write rows as JSON Lines.

    Example:
        >>> to_jsonl([{"messages": [{"role": "user", "content": "5 août 2024"}]}])
        '{"messages": [{"role": "user", "content": "5 août 2024"}]}\n'
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _babel() -> Any:
    """Import babel where it is needed: only the demo uses it."""
    try:
        import babel
        import babel.dates
        import babel.localedata
    except ImportError:
        raise MissingDependencyError("the demo's dates need babel: pip install 'veneer[demo]'") from None
    return babel


def _check(babel: Any, seed: int, num_train: int, num_eval: int, locales: Sequence[str]) -> None:
    problems = [
        f"{name} must be at least 0, is {count}"
        for name, count in (("num_train", num_train), ("num_eval", num_eval))
        if count < 0
    ]
    if seed < 0:
        problems.append(f"seed must be at least 0, is {seed}")  # Python draws the same for -1 as for 1
    if num_train + num_eval > len(_DAYS):
        problems.append(f"{num_train} + {num_eval} rows, but 1950 to 2049 has only {len(_DAYS)} dates")
    if isinstance(locales, str) or not locales:
        problems.append(f"locales must be a list of at least one name, is {locales!r}")
    else:
        known = babel.localedata.locale_identifiers()
        unknown = [name for name in locales if name not in known]
        problems += [f"locale {name!r} is not in CLDR{did_you_mean(name, known)}" for name in unknown]
    if problems:
        raise ConfigError("the rows of dates cannot be made", problems)


def _meanings(babel: Any, styles: Sequence[tuple[str, str]]) -> dict[str, set[tuple[int, int]]]:
    """Map every written form, its year taken out, to the (month, day) pairs that it can stand for.

    One date stands for all of its month, day and weekday: what else a form holds is the year, in four digits that
    no day or month can be taken for. That makes 2,562 dates of 36,525, and two forms are equal only if their years
    and these keys are.
    """
    days = {(day.month, day.day, day.weekday()): day for day in _DAYS}.values()
    found: dict[str, set[tuple[int, int]]] = {}
    for locale, form in styles:
        # Without a weekday in the pattern, one date is enough for a month and day.
        weekdays = not {"E", "c", "e"}.isdisjoint(babel.Locale.parse(locale).date_formats[form].pattern)
        for day in days if weekdays else {(day.month, day.day): day for day in days}.values():
            written = _without_year(babel.dates.format_date(day, form, locale), day)
            if written:
                found.setdefault(written, set()).add((day.month, day.day))
    return found


def _without_year(written: str, day: datetime.date) -> str:
    """Take the year out of a written date; "" where the form does not hold it in full."""
    before, year, after = written.partition(str(day.year))
    return f"{before}\0{after}" if year else ""
