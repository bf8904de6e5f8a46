"""Rows as the model sees them: a sequence whose rows are slices of two flat arrays, in memory or mapped from files.

Shapes: N rows, T tokens of all rows.
"""

import hashlib
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STOP, FILE, NUMBER, BYTE, CONTENT = range(5)
"""Columns of the index: where a row's tokens end, the file, line and byte where it stands, a hash of what it holds."""

Int64s = NDArray[np.int64]
Buffer: TypeAlias = bytearray | memoryview | mmap.mmap

_LINE = struct.Struct("<5q")


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
class Findings:
    """What encoding rows brought to light besides the rows.

    Args:
        num_supervised: Tokens whose loss counts.
        num_lost: Rows left out because no supervised token of theirs was left: too long, or the template drops it.
        num_tails: Last tokens of long texts left out because each stood alone, with nothing to be predicted from.
        num_compared: Chats whose ids before each answer were compared with the ids that a model is asked with.
        unequal: Of those, the sources of the rows that differ.
    """

    num_supervised: int = 0
    num_lost: int = 0
    num_tails: int = 0
    num_compared: int = 0
    unequal: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class EncodedRows(Sequence[EncodedRow]):
    """The rows that can be trained on, and "file:line: what is wrong" for each left out.

    Args:
        token_ids_T: The tokens of all rows, int32.
        supervised_T: Whether a token's loss counts, bool.
        index_N5: A line for each row, int64: see `STOP`.
        sources: "file:line" of each row.
        bad: What is wrong with each row left out.
        findings: What encoding brought to light.

    Example:
        encode_rows(read_rows("a.jsonl").rows, tokenizer, max_length=1024)[0].token_ids
    """

    token_ids_T: Tensor
    supervised_T: Tensor
    index_N5: Int64s
    sources: Sequence[str]
    bad: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def __len__(self) -> int:
        return len(self.index_N5)

    @overload
    def __getitem__(self, number: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, number: slice) -> list[EncodedRow]: ...
    def __getitem__(self, number: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        stops = self.index_N5
        start, stop = int(stops[place - 1, STOP]) if place else 0, int(stops[place, STOP])
        return EncodedRow(self.sources[place], self.token_ids_T[start:stop], self.supervised_T[start:stop])

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[place] for place in range(len(self)))

    @property
    def rows(self) -> Sequence[EncodedRow]:
        """The rows: this sequence itself."""
        return self

    @cached_property
    def lengths(self) -> Int64s:
        """Tokens of each row."""
        return np.diff(self.index_N5[:, STOP], prepend=0)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.token_ids_T)

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss counts."""
        return self.findings.num_supervised

    @property
    def num_sources(self) -> int:
        """Rows of the file that these rows were made of; a long text becomes several."""
        places = self.index_N5[:, [FILE, NUMBER]]
        return int(1 + np.any(places[1:] != places[:-1], axis=1).sum()) if len(self) else 0

    @cached_property
    def num_duplicates(self) -> int:
        """Rows that hold the same tokens, supervised alike, as an earlier row.

        Told by a hash of 64 bits: of a million rows, two that differ are taken for one once in 37 million files.
        """
        return len(self) - len(np.unique(self.index_N5[:, CONTENT]))

    def num_in(self, other: "EncodedRows") -> int:
        """Return how many of these rows stand in others too."""
        return int(np.isin(self.index_N5[:, CONTENT], other.index_N5[:, CONTENT]).sum())


class Places(Sequence[str]):
    """The sources of rows, each made when it is asked for.

    Args:
        source: Gives the name of a place, by file and number.
        index_N5: As in `EncodedRows`.
    """

    def __init__(self, source: Callable[[int, int], str], index_N5: Int64s) -> None:
        self._source, self._index_N5 = source, index_N5

    def __len__(self) -> int:
        return len(self._index_N5)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        return self._source(*self._index_N5[number, [FILE, NUMBER]].tolist())


class Sheet(Protocol):
    """Takes bytes in, one after another; a file, or memory."""

    def write(self, data: bytes, /) -> object:
        """Take bytes in."""


class RowSink:
    """Takes rows one after another and writes what `EncodedRows` is made of to three files.

    Args:
        token_ids: Gets the token ids, int32.
        supervised: Gets the marks, bool.
        index: Gets a line of five int64 for each row.

    Example:
        >>> from io import BytesIO
        >>> parts = BytesIO(), BytesIO(), BytesIO()
        >>> RowSink(*parts).add((0, 1, 0), np.array([5, 6], np.int32), np.array([False, True]))
        >>> rows = rows_of([part.getbuffer() for part in parts], ["a:1"])
        >>> len(rows), rows[0].token_ids.tolist(), rows.lengths.tolist()
        (1, [5, 6], [2])
    """

    def __init__(self, token_ids: Sheet, supervised: Sheet, index: Sheet) -> None:
        self._files = token_ids, supervised, index
        self._stop = 0
        self.num_rows = 0
        self.num_supervised = 0

    def add(self, place: tuple[int, int, int], ids_S: NDArray[np.int32], supervised_S: NDArray[np.bool_]) -> None:
        """Write a row that stands at a place: its file, line and byte."""
        content = ids_S.tobytes(), supervised_S.tobytes()
        digest = hashlib.blake2b(b"".join(content), digest_size=8).digest()
        self._stop += len(ids_S)
        self.num_rows += 1
        self.num_supervised += int(np.count_nonzero(supervised_S))
        line = _LINE.pack(self._stop, *place, int.from_bytes(digest, "little", signed=True))
        for file, data in zip(self._files, (*content, line), strict=True):
            file.write(data)


def rows_of(
    parts: Sequence[Buffer],
    sources: Sequence[str] | Callable[[Int64s], Sequence[str]],
    bad: list[str] | None = None,
    findings: Findings | None = None,
) -> EncodedRows:
    """Return the rows whose ids, marks and index lie in three buffers, which are not copied."""
    if not all(memoryview(part).nbytes for part in parts):
        raise ValueError("no rows: a sequence needs one")
    ids_T = torch.frombuffer(parts[0], dtype=torch.int32)
    supervised_T = torch.frombuffer(parts[1], dtype=torch.bool)
    index_N5 = np.frombuffer(parts[2], np.int64).reshape(-1, 5)
    named = sources(index_N5) if callable(sources) else sources
    found = findings or Findings(num_supervised=int(supervised_T.sum()))
    return EncodedRows(ids_T, supervised_T, index_N5, named, bad or [], found)
