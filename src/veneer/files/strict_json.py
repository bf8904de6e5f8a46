"""JSON from untrusted files, read strictly, and JSON of our own, written the same way every time.

The standard library takes duplicate keys, NaN, 1e999 and lone surrogates (research: failures.md 8, A08);
each of them lets two readers see two different files, so none is taken here.
"""

import json
import math
from typing import Any

from veneer.errors import AdapterError, VeneerError, shortened

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_DIGITS = 30
_SHOWN = 20


def parse_json(
    data: bytes,
    where: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    error: type[VeneerError] = AdapterError,
) -> Any:
    """Return the value that JSON text stands for, refusing what readers disagree about.

    Args:
        data: The text in UTF-8, without a byte order mark.
        where: What errors call the text, usually its file.
        max_bytes: Longest text.
        max_depth: Deepest nesting of lists and objects.
        error: The error to raise.

    Raises:
        VeneerError: Of the class `error`, listing everything that is wrong.

    Example:
        >>> parse_json(b'{"r": 8}', "adapter_config.json")
        {'r': 8}
    """
    if len(data) > max_bytes:
        raise error(f"{where}: expected at most {max_bytes} bytes of JSON, got {len(data)}")
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: begins with a byte order mark; save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 at byte {cause.start} (0x{data[cause.start]:02x})") from None
    problems: list[str] = []
    try:
        value = _decoder(problems).decode(text)
    except json.JSONDecodeError as cause:
        raise error(f"{where}: not JSON at line {cause.lineno}, column {cause.colno}: {cause.msg}") from None
    except RecursionError:
        raise error(f"{where}: nested deeper than {max_depth} levels") from None
    problems += _walk(value, max_depth)
    if problems:
        raise error(f"{where}: JSON that cannot be trusted to mean one thing", shortened(problems, _SHOWN))
    return value


def dump_json(value: Any) -> bytes:
    r"""Return the one text of a JSON value: keys sorted, indent 2, ASCII, a newline at the end.

    Raises:
        ValueError: If it holds NaN, infinity or a lone surrogate.

    Example:
        >>> dump_json({"b": 1, "a": []})
        b'{\n  "a": [],\n  "b": 1\n}\n'
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8, and our reader would refuse it
    return text.encode() + b"\n"


def _decoder(problems: list[str]) -> json.JSONDecoder:
    """Return a decoder that notes what it must not accept."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    problems.append(f"key {key!r} stands twice in one object")
                seen.add(key)
        return found

    def constant(text: str) -> float:
        problems.append(f"{text} is not JSON")
        return 0.0

    def integer(text: str) -> int:
        if len(text.lstrip("-")) > MAX_DIGITS:
            problems.append(f"an integer of {len(text)} digits; at most {MAX_DIGITS} are read")
            return 0
        return int(text)

    def real(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            problems.append(f"number {text[:40]} does not fit a 64-bit float")
        return number

    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant, parse_int=integer, parse_float=real)


def _walk(value: Any, max_depth: int) -> list[str]:
    """Return what is wrong with depth and strings, without recursion."""
    problems: list[str] = []
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str) and not item.isascii() and _has_lone_surrogate(item):
            problems.append(f"string {ascii(item)[:60]} holds half of a surrogate pair")
        elif isinstance(item, (list, dict)):
            if depth == max_depth:
                return [*problems, f"nested deeper than {max_depth} levels"]
            inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            waiting += [(part, depth + 1) for part in inner]
    return problems


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
