"""Dialogues to text: what the model's own template writes, and where each answer begins and ends in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from veneer.data.shapes import ChatRow, Message


class RowError(Exception):
    """Why one row cannot be used."""


class LostError(RowError):
    """No supervised token of the row is left."""


@dataclass(frozen=True)
class Turn:
    """The text of a dialogue up to a border: ids never reach across it.

    Args:
        text: From the beginning of the dialogue.
        supervised: Whether what the last border does not cover is learned.
        asked: Whether the model is asked with exactly this text.
    """

    text: str
    supervised: bool = False
    asked: bool = False


def turns_of(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> list[Turn] | RowError:
    """Return the borders of a dialogue up to the end of its last answer, or why it cannot be used."""
    try:
        _refuse_special(row.messages, tokenizer)
        turns: list[Turn] = []
        written = ""
        for index, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            asked = render(row.messages[:index], tokenizer, ask=True)
            told = render(row.messages[: index + 1], tokenizer, ask=False)
            if not (asked.startswith(written) and told.startswith(asked)):
                raise RowError(
                    f"the chat template writes the turns before message {index + 1} differently once it follows; "
                    "split the row, so that only its last turn is the assistant's"
                )
            end = _end_of_turn(told, len(asked), message.content, tokenizer)
            turns += [Turn(asked, asked=True), Turn(told[:end], supervised=True), Turn(told)]
            written = told
    except RowError as error:
        return error
    return turns[:-1]  # nothing is learned from what follows the last answer


def _end_of_turn(told: str, start: int, content: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the answer's end-of-turn token ends: the first special token behind the answer's own text.

    What the template writes behind it is not the model's to say.
    """
    place = told.find(content.strip(), start)
    if place < 0:
        raise RowError("the chat template does not write the assistant's answer as it is")
    behind = place + len(content.strip())
    found = [(told.find(token, behind), token) for token in tokenizer.all_special_tokens]
    ends = [(where, token) for where, token in found if where >= 0]
    if not ends:
        raise RowError("the chat template writes no end-of-turn token after the assistant's answer")
    where, token = min(ends)
    return where + len(token)


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    """Return a dialogue as the template writes it, where `ask` with the beginning of an answer.

    Raises:
        RowError: If there is no template, or it rejects the dialogue.
    """
    if tokenizer.chat_template is None:
        raise RowError("the base model's tokenizer has no chat template; use prompt and completion rows")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(f"the chat template rejects the dialogue: {error}") from None


def _refuse_special(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse content that spells a special token: it would fake the end of a turn."""
    for index, message in enumerate(messages, start=1):
        for token in tokenizer.all_special_tokens:
            if token in message.content:
                raise RowError(f"message {index} spells the special token {token!r}")
