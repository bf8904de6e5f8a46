"""Files to rows: every row is checked before any model is loaded, every problem named with file, line and byte.

A row is an object of one of three shapes; it may carry an `"id"` (any value, ignored), and no other key:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"text": "2 + 2 = 4"}

One file holds rows of one shape: JSON Lines in UTF-8, CSV with a header (the latter two shapes), Parquet or Arrow.
`check_rows` reads a file of any length without holding it; `read_rows` holds what it read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from veneer.data.records import Record, RowFiles, Tick, digest_of, find_rows, records
from veneer.data.shapes import (
    FORMATS,
    Bad,
    ChatRow,
    CompletionRow,
    Message,
    Prompt,
    Row,
    TextRow,
    as_prompt,
    as_row,
)
from veneer.errors import DataError, shortened

__all__ = [
    "ChatRow",
    "CheckedRows",
    "CompletionRow",
    "Message",
    "Prompt",
    "Row",
    "RowsRead",
    "TextRow",
    "as_prompt",
    "check_rows",
    "read_prompts",
    "read_rows",
]

LISTED = 20

BadRow = tuple[int, int, int, str]
"""File, number and byte of a row as in `Record`, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows of a file in their order, and "file:line: what is wrong; row at byte ..." for each row left out."""

    rows: list[Row]
    bad: list[str]


@dataclass(frozen=True)
class CheckedRows:
    """Rows that were checked and are not held, see `check_rows`.

    Args:
        found: The files.
        digest: SHA-256 of the file, or of the digests and names of several.
        num_rows: How many can be used.
        row_format: chat, completion or text.
        bad: Those that are left out.
    """

    found: RowFiles
    digest: str
    num_rows: int
    row_format: str
    bad: tuple[BadRow, ...]

    @property
    def bad_lines(self) -> list[str]:
        """What is wrong with every row left out, a line each."""
        return [self.found.problem(one, one[3]) for one in self.bad]

    def rows(self, tick: Tick | None = None) -> Iterator[tuple[Record, Row]]:
        """Read the file again: yield the rows that can be used, in their order, each with its place."""
        for record in records(self.found, True, tick or _go_on):
            row = as_row(record.value, self.found.source(record.file, record.number), True)
            if not isinstance(row, Bad):
                yield record, row


def check_rows(path: str, *, skip_bad_rows: bool = False, tick: Tick | None = None) -> CheckedRows:
    """Check every row of a file, of which no more than the row in hand is held.

    Args:
        path: As for `read_rows`.
        skip_bad_rows: As for `read_rows`.
        tick: Called now and then with the share of the work that is done; what it raises ends the work.

    Raises:
        DataError: As `read_rows`.

    Example:
        check_rows("train.jsonl").num_rows

    Cost:
        10 microseconds for a chat of 900 bytes, 6 for a short row; memory for bad rows alone.
    """
    tick, found = tick or _go_on, find_rows(path, True)
    digest = digest_of(found, tick)
    tally = _Tally(found, answers=True, skip_bad_rows=skip_bad_rows)
    for _ in tally.sound_rows(tick):
        pass
    tally.judge()
    return CheckedRows(found, digest, tally.num_rows, tally.row_format, tuple(tally.bad))


def read_rows(path: str, *, skip_bad_rows: bool = False) -> RowsRead:
    r"""Read the rows of a file to train or evaluate on, and hold them all.

    That is a `.jsonl`, `.ndjson`, `.csv`, `.parquet` or `.arrow` file, or a folder that the `datasets` library saved.
    A row must hold something to learn: an assistant message, a completion or a text that is not blank. `skip_bad_rows`
    leaves bad rows out and lists them in `bad`; what concerns the whole file is refused all the same: a byte order
    mark, a CSV header, columns of a table, broken CSV quotes, rows of two shapes, no usable row.

    Raises:
        DataError: The file or rows of it cannot be used; the first 20 problems are listed, the others counted.
        MissingDependencyError: If a table is to be read and pyarrow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.jsonl")
        ...     _ = path.write_text('{"text": "hello"}\n{"txt": "hello"}\n')
        ...     found = read_rows(str(path), skip_bad_rows=True)
        >>> found.rows[0].text, found.bad[0].partition("; ")[2]
        ('hello', "unknown key 'txt'; nearest: 'text'; row at byte 18")
    """
    tally = _Tally(find_rows(path, True), answers=True, skip_bad_rows=skip_bad_rows)
    rows = [row for _, row in tally.sound_rows(_go_on)]
    tally.judge()
    return RowsRead(rows, [tally.found.problem(one, one[3]) for one in tally.bad])


def read_prompts(path: str) -> list[Prompt]:
    """Read what to generate from: dialogues or prompts, with or without answers, or a `.txt` of one prompt a line.

    Equals `[as_prompt(row) for row in read_rows(path).rows]` where all rows have answers.

    Raises:
        DataError: As `read_rows`; also for a text row and for a prompt that is blank.

    Example:
        read_prompts("prompts.txt")[0].start
    """
    tally = _Tally(find_rows(path, False), answers=False)
    rows = [row for _, row in tally.sound_rows(_go_on)]
    tally.judge()
    return [as_prompt(row) for row in rows]


@dataclass
class _Tally:
    """What was met in a file: counts, the first problems, and every bad row where those are to be skipped."""

    found: RowFiles
    answers: bool
    skip_bad_rows: bool = False
    num_rows: int = 0
    num_bad: int = 0
    num_whole: int = 0
    first: tuple[str, str] = ("", "")
    other: str = ""
    bad: list[BadRow] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    @property
    def row_format(self) -> str:
        """The shape of the first row."""
        return self.first[0]

    def sound_rows(self, tick: Tick) -> Iterator[tuple[Record, Row]]:
        """Yield the rows that can be used, and count the others."""
        for record in records(self.found, self.answers, tick):
            row = as_row(record.value, self.found.source(record.file, record.number), self.answers)
            if isinstance(row, Bad):
                self._note(record, row)
                continue
            self.num_rows += 1
            shape = FORMATS[type(row)]
            if self.num_rows == 1:
                self.first = shape, row.source
            elif shape != self.row_format and not self.other:
                text = f"a {shape} row, but {self.first[1]} is a {self.row_format} row"
                self.other = self.found.problem(record, f"{text}; keep each shape of row in a file of its own")
            yield record, row

    def judge(self) -> None:
        """Raise where the file cannot be used."""
        path, whole = self.found.path, [*self.whole, *([self.other] if self.other else [])]
        if self.num_rows and not whole and (self.skip_bad_rows or not self.num_bad):
            return
        bad = (self.found.problem(one, one[3]) for one in self.bad)
        count = self.num_whole + bool(self.other) + self.num_bad
        if not count:
            raise DataError(f"{self.found.source(0, 1)}: the file holds no rows; it needs at least one")
        listed = shortened([*whole, *bad], LISTED, count)
        if whole:
            raise DataError(f"{path}: the file cannot be used", listed)
        can_skip = self.answers and self.num_rows and not self.skip_bad_rows
        advice = ", or leave them out with skip_bad_rows (--skip-bad-rows)" if can_skip else ""
        of = f"{self.num_bad} of {self.num_bad + self.num_rows} rows cannot be used"
        raise DataError(f"{path}: {of}; correct them{advice}", listed)

    def _note(self, record: Record, bad: Bad) -> None:
        if bad.whole_file:
            self.num_whole += 1
            if len(self.whole) < LISTED:
                self.whole.append(self.found.problem(record, bad.text))
            return
        self.num_bad += 1
        if self.skip_bad_rows or len(self.bad) < LISTED:
            self.bad.append((*record[:3], bad.text))


def _go_on(share: float) -> None:
    """Nobody looks, nobody stops the work."""
