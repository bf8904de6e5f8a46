"""Rows to token ids and a mark on every token whose loss counts.

A chat goes through the model's own template, turn by turn: what the template writes before an assistant's answer is
exactly what it will write when the model is asked, and from there to the end-of-turn token all is supervised.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.adapter import AdapterMetadata
from veneer.data.rows import ChatRow, CompletionRow, Message, Prompt, Row, TextRow
from veneer.errors import AdapterError, DataError

Part = tuple[list[int], bool]
"""Token ids, and whether their loss counts."""

LISTED = 20


class _RowError(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model sees it.

    Args:
        source: "file:line".
        token_ids: Shape (S,), int32.
        supervised: Whether a token's loss counts, shape (S,), bool; never for the first.
    """

    source: str
    token_ids: Tensor
    supervised: Tensor


@dataclass(frozen=True)
class EncodedRows:
    """The rows that can be trained on, and "file:line: what is wrong" for each left out."""

    rows: list[EncodedRow]
    bad: list[str]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss counts."""
        return sum(int(row.supervised.sum()) for row in self.rows)


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, skip_bad_rows: bool = False
) -> EncodedRows:
    """Turn rows into token ids with their supervised tokens marked.

    Chat: the assistant's turns with their end-of-turn token. Completion: the completion and the end-of-sequence
    token. Text: everything; a text longer than `max_length` becomes several rows. What follows the last supervised
    token is left off.

    Args:
        rows: Rows of one kind.
        tokenizer: The base model's; chats need its template.
        max_length: Longest row in tokens. A longer chat or completion would lose its answer: it cannot be used.
        skip_bad_rows: Leave rows out that cannot be used, and list them, instead of refusing.

    Raises:
        DataError: Rows that the template rejects, or that are too long, or nothing supervised; all at once, with
            file and line.
    """
    encoded, bad = [], []
    for row in rows:
        try:
            encoded += list(_encode(row, tokenizer, max_length))
        except _RowError as error:
            bad.append(f"{row.source}: {error}")
    if bad and not (skip_bad_rows and encoded):
        more = [f"... and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        advice = "" if skip_bad_rows else "; mend them, or leave them out with --skip-bad-rows"
        raise DataError(f"{len(bad)} of {len(rows)} rows cannot be trained on{advice}", bad[:LISTED] + more)
    return EncodedRows(encoded, bad)


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids to go on from: the same function of the same text that training used.

    Raises:
        DataError: If the template rejects the dialogue.
    """
    try:
        if isinstance(prompt.start, str):
            return _opening(prompt.start, tokenizer)
        return _ids(_render(prompt.start, tokenizer, ask=True), tokenizer)
    except _RowError as error:
        raise DataError(f"{prompt.source}: {error}") from None


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the digest of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def check_template(metadata: AdapterMetadata, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where an adapter was trained on chats with another template than the tokenizer's.

    Raises:
        AdapterError: Then; its answers would be measured or used on other text than it learned from.
    """
    expected, found = metadata.template_digest, template_digest(tokenizer)
    if metadata.row_format == "chat" and expected is not None and expected != found:
        raise AdapterError(
            f"the adapter was trained with another chat template: its digest is {expected[:16]}, the tokenizer's is "
            f"{found[:16] if found else 'none'}; use the tokenizer that it was trained with, or --any-base"
        )


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[EncodedRow]:
    if isinstance(row, TextRow):
        ids = [*_opening(row.text, tokenizer), _end(tokenizer)]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:  # a single token predicts nothing
                yield _marked(row.source, [(piece, True)])
        return
    parts = _chat(row.messages, tokenizer) if isinstance(row, ChatRow) else _completion(row, tokenizer)
    encoded = _marked(row.source, parts)
    if len(encoded.token_ids) > max_length:
        raise _RowError(f"{len(encoded.token_ids)} tokens, at most {max_length} fit: its answer would be cut")
    if not encoded.supervised.any():
        raise _RowError("no supervised tokens")
    yield encoded


def _marked(source: str, parts: Sequence[Part]) -> EncodedRow:
    """Join the parts; leave off what follows the last supervised token, which nothing learns from."""
    ids = [token for part, _ in parts for token in part]
    marks = [supervised for part, supervised in parts for _ in part]
    if marks:
        marks[0] = False  # nothing precedes the first token that could predict it
    end = len(marks) - marks[::-1].index(True) if True in marks else len(marks)
    return EncodedRow(source, torch.tensor(ids[:end], dtype=torch.int32), torch.tensor(marks[:end], dtype=torch.bool))


def _completion(row: CompletionRow, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    opening = _opening(row.prompt, tokenizer)
    added = len(opening) - len(_ids(row.prompt, tokenizer))  # the begin-of-sequence token, where there is one
    answer = _continue(row.prompt, opening[added:], row.completion, tokenizer)
    return [(opening, False), ([*answer, _end(tokenizer)], True)]


def _chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    _refuse_special(messages, tokenizer)
    parts: list[Part] = []
    ids: list[int] = []
    written = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked = _render(messages[:index], tokenizer, ask=True)
        told = _render(messages[: index + 1], tokenizer, ask=False)
        if not (asked.startswith(written) and told.startswith(asked)):
            raise _RowError(
                f"the chat template writes the turns before message {index + 1} differently once it follows; "
                "split the row, so that only its last turn is the assistant's"
            )
        end = _end_of_turn(told, len(asked), message.content, tokenizer)
        for text, supervised in ((asked, False), (told[:end], True), (told, False)):
            more = _continue(written, ids, text[len(written) :], tokenizer)
            parts.append((more, supervised))
            ids, written = ids + more, text
    return parts


def _end_of_turn(told: str, start: int, content: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the answer's end-of-turn token ends: the first special token behind the answer's own text.

    What the template writes behind it is not the model's to say.
    """
    place = told.find(content.strip(), start)
    if place < 0:
        raise _RowError("the chat template does not write the assistant's answer as it is")
    behind = place + len(content.strip())
    found = [(told.find(token, behind), token) for token in tokenizer.all_special_tokens]
    ends = [(where, token) for where, token in found if where >= 0]
    if not ends:
        raise _RowError("the chat template writes no end-of-turn token after the assistant's answer")
    where, token = min(ends)
    return where + len(token)


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    if tokenizer.chat_template is None:
        raise _RowError("the base model's tokenizer has no chat template; use prompt and completion rows")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except (TemplateError, TypeError, ValueError) as error:
        raise _RowError(f"the chat template rejects the dialogue: {error}") from None


def _refuse_special(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse content that spells a special token: it would fake the end of a turn."""
    for index, message in enumerate(messages, start=1):
        for token in tokenizer.all_special_tokens:
            if token in message.content:
                raise _RowError(f"message {index} spells the special token {token!r}")


def _continue(before: str, before_ids: list[int], more: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text that goes on from another, whose own ids stay as they are.

    Usually the ids of both together begin with those of the first. Where a token would reach across the border, the
    second is tokenised alone: when the model is asked, the first stands alone too.
    """
    together = _ids(before + more, tokenizer)
    if together[: len(before_ids)] == before_ids:
        return together[len(before_ids) :]
    return _ids(more, tokenizer)


def _opening(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text at the beginning of a sequence, with what the tokenizer puts before it."""
    ids = list(tokenizer(text).input_ids)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and ids != _ids(text, tokenizer) else ids


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise _RowError("the tokenizer has no end-of-sequence token")
    return int(tokenizer.eos_token_id)
