"""Rows to token ids and a mark on every token whose loss counts.

A chat goes through the model's own template, turn by turn: what the template writes before an assistant's answer is
exactly what it will write when the model is asked, and from there to the end-of-turn token all is supervised.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from veneer.adapter import AdapterMetadata
from veneer.data.chats import LostError, RowError, Turn, render, turns_of
from veneer.data.encoded import EncodedRow, EncodedRows, Findings, RowSink, rows_of
from veneer.data.shapes import ChatRow, CompletionRow, Prompt, Row, TextRow
from veneer.data.tokens import OneByOne, Together, Tokens
from veneer.errors import AdapterError, DataError, shortened

__all__ = [
    "EncodedRow",
    "EncodedRows",
    "check_template",
    "encode_rows",
    "encode_stream",
    "prompt_ids",
    "template_digest",
]

Place = tuple[int, int, int]
"""File, number and byte of a row, as in `Record`."""

Marked = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids, and whether the loss of each counts."""

LISTED = 20
_ROWS, _CHARS = 1024, 2 << 20
_FIRST = 16
"""So many rows, and one of each batch, are encoded both ways."""


class TogetherDiffersError(Exception):
    """Rows encoded together have other ids than one by one; `encode_stream(one_by_one=True)` is right."""


@dataclass
class Encoded:
    """A row's ids and marks (several for a long text), or why there are none."""

    place: Place
    source: str
    parts: list[Marked] = field(default_factory=list)
    error: str = ""
    lost: bool = False
    num_tails: int = 0
    compared: bool = False
    unequal: bool = False


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    skip_bad_rows: bool = False,
    one_by_one: bool = False,
) -> EncodedRows:
    """Turn rows into token ids with their supervised tokens marked, in memory.

    Chat: the assistant's turns with their end-of-turn token. Completion: the completion and the end-of-sequence
    token. Text: everything; a text longer than `max_length` becomes several rows. What follows the last supervised
    token is left off.

    Args:
        rows: Rows of one kind.
        tokenizer: The base model's; chats need its template.
        max_length: Longest row in tokens. A longer chat or completion would lose its answer: it cannot be used.
        skip_bad_rows: Leave rows out that cannot be used, and list them, instead of refusing.
        one_by_one: Give every text to the tokenizer alone: the reference, with the same ids.

    Raises:
        DataError: Rows that the template rejects, or that are too long, or nothing supervised; all at once, with
            file and line.
    """
    places = (((0, number, -1), row) for number, row in enumerate(rows))
    parts, bad, sources = (BytesIO(), BytesIO(), BytesIO()), [], []
    sink, gathered = RowSink(*parts), Gathered()
    try:
        for one in encode_stream(places, tokenizer, max_length, one_by_one=one_by_one):
            gathered.add(one, sink)
            sources += [one.source] * len(one.parts)
            bad += [f"{one.source}: {one.error}"] * bool(one.error)
    except TogetherDiffersError:
        return encode_rows(rows, tokenizer, max_length=max_length, skip_bad_rows=skip_bad_rows, one_by_one=True)
    if bad and not (skip_bad_rows and sources):
        raise refused(len(bad), len(rows), bad, skip_bad_rows=skip_bad_rows)
    unequal = tuple(rows[number].source for _, number, _ in gathered.unequal)
    counts = sink.num_supervised, gathered.num_lost, gathered.num_tails, gathered.num_compared
    return rows_of([part.getbuffer() for part in parts], sources, bad, Findings(*counts, unequal))


def refused(num_bad: int, num_rows: int, bad: Sequence[str], *, skip_bad_rows: bool) -> DataError:
    """Return the error that lists the first rows that cannot be trained on."""
    advice = "" if skip_bad_rows else "; mend them, or leave them out with --skip-bad-rows"
    return DataError(f"{num_bad} of {num_rows} rows cannot be trained on{advice}", shortened(bad, LISTED, num_bad))


@dataclass
class Gathered:
    """What is counted while rows are encoded."""

    num_lost: int = 0
    num_tails: int = 0
    num_compared: int = 0
    unequal: list[Place] = field(default_factory=list)

    def add(self, one: Encoded, sink: RowSink) -> None:
        """Count a row, and write it where it can be used."""
        self.num_lost += one.lost
        self.num_tails += one.num_tails
        self.num_compared += one.compared
        if one.unequal:
            self.unequal.append(one.place)
        for ids, marks in one.parts:
            sink.add(one.place, ids, marks)


def encode_stream(
    rows: Iterable[tuple[Place, Row]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    one_by_one: bool = False,
) -> Iterator[Encoded]:
    """Yield rows encoded, in their order, holding no more than a batch of them.

    Raises:
        TogetherDiffersError: If a row that was encoded both ways has other ids; what was yielded may be wrong then.

    Cost:
        For a chat of 900 characters two renderings of the template (50 microseconds) and one tokenisation.
    """
    stream, plain, together = iter(rows), OneByOne(tokenizer), Together(tokenizer)
    number = 0
    while batch := list(_batch(stream)):
        chats = {place: turns_of(row, tokenizer) for place, (_, row) in enumerate(batch) if isinstance(row, ChatRow)}
        if not one_by_one:
            _learn(together, batch, chats)
        for place, (where, row) in enumerate(batch):
            if one_by_one:
                yield _encoded(where, row, chats.get(place, []), plain, tokenizer, max_length)
                continue
            found = _encoded(where, row, chats.get(place, []), together, tokenizer, max_length)
            if number < _FIRST or not place:
                _compare(found, _encoded(where, row, chats.get(place, []), plain, tokenizer, max_length))
            number += 1
            yield found


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids to go on from: the same function of the same text that training used.

    Raises:
        DataError: If the template rejects the dialogue.
    """
    try:
        if isinstance(prompt.start, str):
            return OneByOne(tokenizer).opening(prompt.start)
        return OneByOne(tokenizer).ids(render(prompt.start, tokenizer, ask=True))
    except RowError as error:
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


def _batch(rows: Iterator[tuple[Place, Row]]) -> Iterator[tuple[Place, Row]]:
    """Yield the next rows, about 2 MB of text at most."""
    size = 0
    for where, row in islice(rows, _ROWS):
        size += sum(map(len, _texts(row)))
        yield where, row
        if size > _CHARS:
            return


def _texts(row: Row) -> list[str]:
    if isinstance(row, ChatRow):
        return [message.content for message in row.messages]
    return [row.text] if isinstance(row, TextRow) else [row.prompt, row.completion]


def _learn(tokens: Together, batch: Sequence[tuple[Place, Row]], chats: dict[int, list[Turn] | RowError]) -> None:
    """Announce all texts of a batch, so that they are tokenised at once."""
    texts = [turn.text for turns in chats.values() if isinstance(turns, list) for turn in turns]
    openings = []
    for _, row in batch:
        if isinstance(row, CompletionRow):
            texts += [row.prompt, row.prompt + row.completion]
            openings.append(row.prompt)
        elif isinstance(row, TextRow):
            openings.append(row.text)
    tokens.learn(texts, openings)


def _compare(found: Encoded, plain: Encoded) -> None:
    same = found.error == plain.error and len(found.parts) == len(plain.parts)
    pairs = zip(found.parts, plain.parts, strict=False)
    if not same or not all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)):
        raise TogetherDiffersError(found.source)


def _encoded(
    place: Place,
    row: Row,
    turns: list[Turn] | RowError,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    found = Encoded(place, row.source)
    try:
        if isinstance(turns, RowError):
            raise turns
        if isinstance(row, TextRow):
            whole = [*tokens.opening(row.text), _end(tokenizer)]
            pieces = [whole[start : start + max_length] for start in range(0, len(whole), max_length)]
            found.num_tails = sum(len(piece) == 1 for piece in pieces)  # a single token predicts nothing
            found.parts = [_marked([(piece, True)]) for piece in pieces if len(piece) > 1]
            return found
        if isinstance(row, ChatRow):
            parts, found.unequal = _join(turns, tokens)
            found.compared = True
        else:
            parts = _completion(row, tokens, tokenizer)
        ids, marks = _marked(parts)
        if len(ids) > max_length:
            raise LostError(f"{len(ids)} tokens, at most {max_length} fit: its answer would be cut")
        if not marks.any():
            raise LostError("no supervised tokens")
        found.parts = [(ids, marks)]
    except RowError as error:
        found.error, found.lost = str(error), isinstance(error, LostError)
    return found


def _marked(parts: Sequence[tuple[list[int], bool]]) -> Marked:
    """Join the parts; leave off what follows the last supervised token, which nothing learns from."""
    ids = [token for part, _ in parts for token in part]
    marks = [supervised for part, supervised in parts for _ in part]
    if marks:
        marks[0] = False  # nothing precedes the first token that could predict it
    end = len(marks) - marks[::-1].index(True) if True in marks else len(marks)
    return np.array(ids[:end], np.int32), np.array(marks[:end], np.bool_)


def _completion(row: CompletionRow, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    opening = tokens.opening(row.prompt)
    added = len(opening) - len(tokens.ids(row.prompt))  # the begin-of-sequence token, where there is one
    answer, _ = _continue(row.prompt, opening[added:], row.completion, tokens)
    return [(opening, False), ([*answer, _end(tokenizer)], True)]


def _join(turns: Sequence[Turn], tokens: Tokens) -> tuple[list[tuple[list[int], bool]], bool]:
    """Return the ids between the borders, and whether they differ from those that the model is asked with."""
    parts: list[tuple[list[int], bool]] = []
    ids: list[int] = []
    written, unequal = "", False
    for turn in turns:
        more, goes_on = _continue(written, ids, turn.text[len(written) :], tokens)
        unequal |= turn.asked and not goes_on
        parts.append((more, turn.supervised))
        ids, written = ids + more, turn.text
    return parts, unequal


def _continue(before: str, before_ids: list[int], more: str, tokens: Tokens) -> tuple[list[int], bool]:
    """Return the ids of a text that goes on from another, whose own ids stay as they are, and whether both are one's.

    Usually the ids of both together begin with those of the first. Where a token would reach across the border, the
    second is tokenised alone: when the model is asked, the first stands alone too.
    """
    together = tokens.ids(before + more)
    if together[: len(before_ids)] == before_ids:
        return together[len(before_ids) :], True
    return tokens.ids(more), False


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise RowError("the tokenizer has no end-of-sequence token")
    return int(tokenizer.eos_token_id)
