"""Files to rows: every row is checked before any model is loaded, every problem named with file and line.

A row is an object of one of three shapes; it may carry an `"id"` (any value, ignored), and no other key:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"text": "2 + 2 = 4"}

One file holds rows of one shape, in UTF-8: JSON Lines, or CSV with a header (the latter two shapes).
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from veneer.errors import DataError
from veneer.names import did_you_mean

ROLES = ("system", "user", "assistant", "tool")

_SHAPES: dict[str, tuple[str, ...]] = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_LISTED = 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A dialogue, of which the assistant's turns are learned; `source` is "file:line" here and below."""

    source: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and what follows it, which is learned."""

    source: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text, all of which is learned."""

    source: str
    text: str


Row: TypeAlias = ChatRow | CompletionRow | TextRow

_NAMES = {ChatRow: "chat", CompletionRow: "completion", TextRow: "text"}


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows of a file in their order, and "file:line: what is wrong" for each row left out."""

    rows: list[Row]
    bad: list[str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model goes on from, a dialogue or a text, and the answer that the row has for it, if any."""

    source: str
    start: tuple[Message, ...] | str
    answer: str | None


@dataclass(frozen=True, slots=True)
class _Bad:
    """Why a row, or the file as a whole, cannot be used."""

    text: str
    whole_file: bool = False


def read_rows(path: str, *, skip_bad_rows: bool = False) -> RowsRead:
    r"""Read the rows of a `.jsonl`, `.ndjson` or `.csv` file to train or evaluate on.

    A row must hold something to learn: an assistant message, a completion or a text that is not blank.
    `skip_bad_rows` leaves bad rows out and lists them in `bad`; what concerns the whole file is refused all the same:
    a byte order mark, a CSV header, broken CSV quotes, rows of two shapes, no usable row.

    Raises:
        DataError: The file or rows of it cannot be used; the first 20 problems are listed, the others counted.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.jsonl")
        ...     _ = path.write_text('{"text": "hello"}\n{"txt": "hello"}\n')
        ...     found = read_rows(str(path), skip_bad_rows=True)
        >>> found.rows[0].text, found.bad[0].partition("a.jsonl")[2]
        ('hello', ":2: a row has 'messages', 'prompt' and 'completion', or 'text'; unknown key 'txt'; nearest: 'text'")
    """
    rows, bad = _read(path, answers=True, skip_bad_rows=skip_bad_rows)
    return RowsRead(rows, bad)


def read_prompts(path: str) -> list[Prompt]:
    """Read what to generate from: dialogues or prompts, with or without answers, or a `.txt` of one prompt a line.

    Equals `[as_prompt(row) for row in read_rows(path).rows]` where all rows have answers.

    Raises:
        DataError: As `read_rows`; also for a text row and for a prompt that is blank.

    Example:
        read_prompts("prompts.txt")[0].start
    """
    return [as_prompt(row) for row in _read(path, answers=False)[0]]


def as_prompt(row: Row) -> Prompt:
    """Split a row into what the model goes on from and the answer, in a dialogue the last message if the assistant's.

    Raises:
        DataError: For a text row, which has no answer.

    Example:
        >>> as_prompt(CompletionRow("a.jsonl:1", "2 + 2 =", " 4"))
        Prompt(source='a.jsonl:1', start='2 + 2 =', answer=' 4')
    """
    if isinstance(row, ChatRow):
        start, last = row.messages[:-1], row.messages[-1]
        answered = last.role == "assistant"
        return Prompt(row.source, start if answered else row.messages, last.content if answered else None)
    if isinstance(row, CompletionRow):
        return Prompt(row.source, row.prompt, row.completion or None)
    raise DataError(f"{row.source}: a text row has no answer; use 'messages', or 'prompt' and 'completion'")


def _read(path: str, *, answers: bool, skip_bad_rows: bool = False) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    problems: dict[bool, list[str]] = {True: [], False: []}  # True: those that concern the whole file
    with _open(path, answers) as file:
        for number, value in _records(file, Path(path).suffix.lower(), answers):
            row = value if isinstance(value, _Bad) else _row(value, f"{path}:{number}", answers)
            if isinstance(row, _Bad):
                problems[row.whole_file].append(f"{path}:{number}: {row.text}")
            else:
                rows.append(row)
    other = next((row for row in rows if type(row) is not type(rows[0])), None)
    if other is not None:
        found = f"a {_NAMES[type(other)]} row, but {rows[0].source} is a {_NAMES[type(rows[0])]} row"
        problems[True].append(f"{other.source}: {found}; keep each shape of row in a file of its own")
    bad = problems[False]
    if rows and not problems[True] and (skip_bad_rows or not bad):
        return rows, bad
    listed = problems[True] + bad
    if not listed:
        raise DataError(f"{path}:1: the file holds no rows; it needs at least one")
    listed = listed[:_LISTED] + [f"... and {len(listed) - _LISTED} more"] * (len(listed) > _LISTED)
    if problems[True]:
        raise DataError(f"{path}: the file cannot be used", listed)
    can_skip = answers and rows and not skip_bad_rows
    advice = ", or leave them out with skip_bad_rows (--skip-bad-rows)" if can_skip else ""
    count = f"{len(bad)} of {len(bad) + len(rows)} rows cannot be used"
    raise DataError(f"{path}: {count}; correct them{advice}", listed)


def _open(path: str, answers: bool) -> BufferedReader:
    place = Path(path)
    suffixes = (".jsonl", ".ndjson", ".csv") if answers else (".jsonl", ".ndjson", ".csv", ".txt")
    try:
        file = place.open("rb")
    except IsADirectoryError:
        names = sorted(one.name for one in place.glob("*") if one.suffix.lower() in suffixes)
        inside = f"name one of its files: {', '.join(names[:5])}" if names else "and no file of rows is in it"
        raise DataError(f"{path}: a folder, not a file of rows; {inside}") from None
    except FileNotFoundError:
        near = did_you_mean(place.name, sorted(one.name for one in place.parent.glob("*")))
        where = "no such file" if place.parent.is_dir() else f"no such file, and no folder {place.parent}"
        raise DataError(f"{path}: {where}{near}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    mark = next((name for mark, name in _MARKS.items() if file.peek(3).startswith(mark)), None)
    if place.suffix.lower() in suffixes and mark is None:
        return file
    file.close()
    if place.suffix.lower() in suffixes:
        raise DataError(
            f"{path}:1: begins with the byte order mark (BOM) of {mark}; save the file as UTF-8 without BOM"
        )
    later = "Parquet and `datasets` folders come with a later version"
    suffix = f"suffix {place.suffix!r}" if place.suffix else "no suffix"
    raise DataError(f"{path}: the file has {suffix}; rows are read from {', '.join(suffixes)} ({later})")


def _records(file: BufferedReader, suffix: str, answers: bool) -> Iterator[tuple[int, Any]]:
    """Yield what stands in the file with the line where it starts: a value, or a `_Bad`."""
    spoilt: list[str] = []
    blank: list[int] = []  # only those before another record are wrong
    lines = _lines(file, spoilt)
    records = _csv(lines, answers) if suffix == ".csv" else enumerate(lines, 1)
    for number, record in records:
        if record == [] or (isinstance(record, str) and not record.strip()):
            blank.append(number)
            continue
        yield from ((early, _Bad("a blank line; remove it")) for early in blank)
        blank.clear()
        if spoilt:
            also = [record.text] if isinstance(record, _Bad) else []
            yield number, _Bad("; ".join(spoilt + also), isinstance(record, _Bad) and record.whole_file)
            spoilt.clear()
        elif isinstance(record, str):
            line = record.rstrip("\r\n")
            yield number, {"prompt": line} if suffix == ".txt" else _json(line)
        else:
            yield number, record


def _lines(file: BufferedReader, spoilt: list[str]) -> Iterator[str]:
    """Decode line by line; where a line is not UTF-8, tell so in `spoilt`."""
    offset = 0
    for raw in file:
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            spoilt.append(f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {offset + error.start} of the file")
            yield raw.decode(errors="replace")
        offset += len(raw)


def _csv(lines: Iterator[str], answers: bool) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not fields:
                yield start, fields
            elif not header:
                header = fields
                problems = _header(header, answers)
                if problems:
                    yield start, _Bad(f"header: {problems}", whole_file=True)
                    return
            elif len(fields) != len(header):
                yield start, _Bad(f"{len(fields)} fields where the header has {len(header)}")
            else:
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        yield start, _Bad(f"broken CSV: {error}; the rows behind it cannot be told apart", whole_file=True)


def _header(header: list[str], answers: bool) -> str:
    shape, problems = _shape(tuple(header), answers)
    twice = [f"column {name[:60]!r} stands twice" for name in dict.fromkeys(header) if header.count(name) > 1]
    chat = ["dialogues cannot stand in CSV; write them as JSON Lines"] if shape == "chat" else []
    return _join([*problems, *twice, *chat])


def _json(line: str) -> Any:
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return _Bad(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a key twice, a number of too many digits, nesting without end
        return _Bad(f"JSON that cannot be used: {error}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:60]!r} stands twice")
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice)


def _row(value: Any, source: str, answers: bool) -> Row | _Bad:
    """Turn a value into a row, or say all that is wrong with it."""
    if not isinstance(value, dict):
        return _Bad(f"a row must be an object, is {_type(value)}")
    shape, problems = _shape(tuple(value), answers)
    if shape == "chat":
        problems = (*problems, *_message_problems(value["messages"]))
    elif shape:
        problems = (*problems, *_text_problems(value, _SHAPES[shape]))
    if problems:
        return _Bad(_join(problems))
    row: Row
    if shape == "chat":
        # The roles of ROLES itself: a million rows need not hold two million strings for them.
        turns = ((ROLES[ROLES.index(one["role"])], one["content"]) for one in value["messages"])
        row = ChatRow(source, tuple(Message(role, content) for role, content in turns))
    elif shape == "completion":
        row = CompletionRow(source, value["prompt"], value.get("completion", ""))
    else:
        row = TextRow(source, value["text"])
    lack = _lack_of_answer(row) if answers else _lack_of_prompt(row)
    return _Bad(lack) if lack else row


@lru_cache(maxsize=256)  # a file has few sets of keys, and near names take time to find
def _shape(keys: tuple[str, ...], answers: bool) -> tuple[str, tuple[str, ...]]:
    """Return the shape that most keys belong to ("" where none belongs to any), and what is wrong with the keys."""
    shapes = {name: own for name, own in _SHAPES.items() if answers or name != "text"}
    shape = max(shapes, key=lambda name: len({*shapes[name]} & {*keys}))
    if not {*shapes[shape]} & {*keys}:
        every = "a row has 'messages', 'prompt' and 'completion'" + (", or 'text'" if answers else " or no completion")
        return "", (every, *_key_problems(keys, (*sum(shapes.values(), ()), "id"), ()))
    needed = shapes[shape] if answers else shapes[shape][:1]
    return shape, _key_problems(keys, (*shapes[shape], "id"), needed)


@lru_cache(maxsize=256)
def _key_problems(keys: tuple[str, ...], allowed: tuple[str, ...], needed: tuple[str, ...]) -> tuple[str, ...]:
    missing = (f"missing key {key!r}" for key in needed if key not in keys)
    known = f" (known: {', '.join(allowed)})"
    unknown = (
        f"unknown key {key[:60]!r}{did_you_mean(key[:60], allowed) or known}" for key in keys if key not in allowed
    )
    return (*missing, *unknown)


def _message_problems(messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield f"'messages' must be a list of at least one message, is {_type(messages) if messages != [] else 'empty'}"
        return
    keys = ("role", "content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            yield f"message {number}: must be an object, is {_type(message)}"
            continue
        role = message.get("role")
        problems = [*_key_problems(tuple(message), keys, keys), *_text_problems(message, keys)]
        if isinstance(role, str) and role not in ROLES:
            problems.append(f"unknown role {role[:60]!r}{did_you_mean(role[:60], ROLES)}; roles are {', '.join(ROLES)}")
        yield from (f"message {number}: {problem}" for problem in problems)


def _text_problems(value: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        text = value.get(key, "")
        if not isinstance(text, str):
            yield f"{key!r} must be a string, is {_type(text)}"
        elif not text.isascii() and _LONE_SURROGATE.search(text):
            yield f"{key!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no character"


def _lack_of_answer(row: Row) -> str:
    if isinstance(row, ChatRow):
        taught = any(message.role == "assistant" and message.content.strip() for message in row.messages)
        return "" if taught else "no supervised tokens: no assistant message that is not blank"
    text, key = (row.completion, "completion") if isinstance(row, CompletionRow) else (row.text, "text")
    return "" if text.strip() else f"no supervised tokens: {key!r} is blank"


def _lack_of_prompt(row: Row) -> str:
    start = as_prompt(row).start
    given = start.strip() if isinstance(start, str) else start
    return "" if given else "nothing to generate from: the prompt is blank, or the answer is the only message"


def _type(value: Any) -> str:
    return _TYPES.get(type(value), "a number")


def _join(problems: Sequence[str]) -> str:
    """Put the problems of one row on its one line, the first three of them."""
    return "; ".join([*problems[:3], *[f"and {len(problems) - 3} more"] * (len(problems) > 3)])
