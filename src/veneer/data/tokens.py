"""Text to token ids: one text after another, or many at once with the same ids.

Many at once are quick for three reasons: one call of the tokenizer for all of them uses every core; a dialogue is cut
at its special tokens into pieces, so that what was said is tokenised once and not again with every later turn; and
pieces that come again, such as a system prompt, are remembered.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from transformers import PreTrainedTokenizerBase

Piece = tuple[str, str, str]
"""The special token before it, the piece itself, and the special token that it ends in; "" for none."""

_SHORT = 256
_REMEMBERED = 10_000


class Tokens(Protocol):
    """What gives the ids of texts."""

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text; the caller leaves them as they are."""

    def opening(self, text: str) -> list[int]:
        """Return the ids of a text at the beginning of a sequence, with what the tokenizer puts before it."""


class OneByOne:
    """Every text when it is asked for: the reference."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def opening(self, text: str) -> list[int]:
        """Return the ids of a text at the beginning of a sequence, with what the tokenizer puts before it."""
        ids = list(self._tokenizer(text).input_ids)
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id and ids != self.ids(text) else ids


class Together:
    """Texts that were announced with `learn`, all at once; others one by one. Equals `OneByOne`.

    A text is cut where a special token ends, and each piece is tokenised together with the special token before it.
    That gives the ids of the whole text, because tokenizers look for special tokens first, from the left, the longest
    of those at a place; what lies between two of them they normalise, split and tokenise without a look at what is
    beyond. (The special token before a piece is there since some, such as SentencePiece's, treat the beginning of a
    text otherwise.)
    Where a piece does not begin and end with the ids of its special tokens, the whole text is tokenised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._plain = OneByOne(tokenizer)
        self._borders = _borders(tokenizer)
        longest_first = sorted(self._borders, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._adds_nothing = tokenizer.is_fast and not tokenizer.num_special_tokens_to_add()
        self._known: dict[Piece, list[int] | None] = {}
        self._short: dict[Piece, list[int] | None] = {}
        self._openings: dict[str, list[int]] = {}

    def learn(self, texts: Iterable[str], openings: Iterable[str] = ()) -> None:
        """Tokenise everything that `ids` and `opening` will be asked for; what was learned before is forgotten."""
        if len(self._short) > _REMEMBERED:
            self._short = {}
        self._known = {}
        if self._adds_nothing:
            self._learn_pieces((*texts, *openings))
            return
        openings = list(dict.fromkeys(openings))
        self._openings = dict(zip(openings, self._many(openings, special=True), strict=True))
        ended = [text for text, ids in self._openings.items() if ids[-1:] == [self._tokenizer.eos_token_id]]
        self._learn_pieces((*texts, *ended))

    def _learn_pieces(self, texts: Iterable[str]) -> None:
        pieces = dict.fromkeys(piece for text in texts for piece in self._pieces(text))
        new = [piece for piece in pieces if piece not in self._short]
        ids = self._many([before + text for before, text, _ in new], special=False)
        self._known = {piece: self._inner(piece, found) for piece, found in zip(new, ids, strict=True)}
        self._short |= {piece: found for piece, found in self._known.items() if len(piece[1]) <= _SHORT}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        found: list[int] = []
        for piece in self._pieces(text):
            ids = self._known.get(piece)
            if ids is None:
                ids = self._short.get(piece)
            if ids is None:
                return self._plain.ids(text)
            found += ids
        return found

    def opening(self, text: str) -> list[int]:
        """Return the ids of a text at the beginning of a sequence, with what the tokenizer puts before it."""
        if self._adds_nothing:
            return self.ids(text)
        ids = self._openings.get(text)
        if ids is None:
            return self._plain.opening(text)
        ends = ids and ids[-1] == self._tokenizer.eos_token_id and ids != self.ids(text)
        return ids[:-1] if ends else ids

    def _pieces(self, text: str) -> Iterator[Piece]:
        """Cut a text behind each special token."""
        before, start = "", 0
        for match in self._cut.finditer(text):
            yield before, text[start : match.end()], match[0]
            before, start = match[0], match.end()
        if start < len(text):
            yield before, text[start:], ""

    def _inner(self, piece: Piece, ids: list[int]) -> list[int] | None:
        """Return a piece's own ids, or None where its special tokens were not found as such."""
        before, _, after = piece
        if before and ids[:1] != [self._borders[before]]:
            return None
        inner = ids[1:] if before else ids
        return None if after and inner[-1:] != [self._borders[after]] else inner

    def _many(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            return list(self._tokenizer(texts, add_special_tokens=special).input_ids)
        self._tokenizer(texts[0], add_special_tokens=special)  # so that the backend neither cuts nor pads
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [one.ids for one in encodings]


def _borders(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens that a text may be cut behind, and their ids.

    A slow tokenizer, and tokens that are looked for only after normalising or only as whole words, may look further.
    """
    if not tokenizer.is_fast:
        return {}
    special = set(tokenizer.all_special_tokens)
    added = tokenizer.added_tokens_decoder
    return {
        one.content: index
        for index, one in added.items()
        if one.content in special and not one.normalized and not one.single_word
    }
