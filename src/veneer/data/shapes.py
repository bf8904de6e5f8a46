"""What a row is: the three shapes, and everything that can be wrong with a value that should be one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from veneer.errors import DataError, shortened
from veneer.names import did_you_mean

ROLES = ("system", "user", "assistant", "tool")

_SHAPES: dict[str, tuple[str, ...]] = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    bytes: "bytes",
}
_OWN = {role: role for role in ROLES}  # the same strings for a million rows
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Message(NamedTuple):
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

FORMATS: dict[type, str] = {ChatRow: "chat", CompletionRow: "completion", TextRow: "text"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model goes on from, a dialogue or a text, and the answer that the row has for it, if any."""

    source: str
    start: tuple[Message, ...] | str
    answer: str | None


@dataclass(frozen=True, slots=True)
class Bad:
    """Why a row, or the file as a whole, cannot be used."""

    text: str
    whole_file: bool = False


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


def as_row(value: Any, source: str, answers: bool) -> Row | Bad:
    """Turn a value into a row, or say all that is wrong with it.

    Args:
        value: What a file holds; a `Bad` is handed on.
        source: Where it stands.
        answers: Whether the row must hold something to learn; else, something to go on from.

    Example:
        >>> as_row({"text": "hello"}, "a.jsonl:1", answers=True)
        TextRow(source='a.jsonl:1', text='hello')
    """
    if not isinstance(value, dict):
        return value if isinstance(value, Bad) else Bad(f"a row must be an object, is {_type(value)}")
    shape, problems = _shape(tuple(value), answers)
    messages = _plain_messages(value["messages"]) if shape == "chat" else None
    if messages is not None:
        pass
    elif shape == "chat":
        problems = (*problems, *_message_problems(value["messages"]))
    elif shape:
        problems = (*problems, *_text_problems(value, _SHAPES[shape]))
    if problems:
        return Bad(join_problems(problems))
    row: Row
    if messages is not None:
        row = ChatRow(source, messages)
    elif shape == "completion":
        row = CompletionRow(source, value["prompt"], value.get("completion", ""))
    else:
        row = TextRow(source, value["text"])
    lack = _lack_of_answer(row) if answers else _lack_of_prompt(row)
    return Bad(lack) if lack else row


def column_problems(columns: Sequence[str], answers: bool, *, dialogues: bool) -> str:
    """Say what is wrong with the columns of a table, or return nothing.

    Example:
        >>> column_problems(["text", "text"], answers=True, dialogues=False)
        "column 'text' stands twice"
    """
    shape, problems = _shape(tuple(columns), answers)
    twice = [f"column {name[:60]!r} stands twice" for name in dict.fromkeys(columns) if columns.count(name) > 1]
    chat = ["dialogues cannot stand in CSV; write them as JSON Lines"] if shape == "chat" and not dialogues else []
    return join_problems([*problems, *twice, *chat])


def join_problems(problems: Sequence[str]) -> str:
    """Put the problems of one row on its one line, the first three of them."""
    return "; ".join(shortened(problems, 3))


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


def _plain_messages(values: Any) -> tuple[Message, ...] | None:
    """Return the messages that values are, or None where anything is wrong with one, see `_message_problems`."""
    if not isinstance(values, list) or not values:
        return None
    found = []
    for value in values:
        if not isinstance(value, dict) or len(value) != 2:
            return None
        role, content = value.get("role"), value.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or role not in _OWN:
            return None
        if not content.isascii() and _LONE_SURROGATE.search(content):
            return None
        found.append(Message(_OWN[role], content))
    return tuple(found)


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
