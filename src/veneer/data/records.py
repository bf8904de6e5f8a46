"""Files to records: what stands in them, each with the place where it begins, one after another.

Nothing but the record in hand is held. Text files are UTF-8: JSON Lines, CSV with a header, or (for prompts) a `.txt`
of one prompt a line; tables are Parquet and Arrow files and folders of the `datasets` library, see `tables`.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from veneer.data.shapes import Bad, column_problems
from veneer.data.tables import splits_of, table_batches, table_columns, table_files
from veneer.errors import DataError
from veneer.names import did_you_mean

Tick: TypeAlias = Callable[[float], None]
"""Called now and then with the share of the input that is done; whatever it raises ends the work."""

TEXTS = (".jsonl", ".ndjson", ".csv")
TABLES = (".parquet", ".arrow")

_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_EVERY = 512
_CHUNK = 1 << 22


class Record(NamedTuple):
    """What stands at a place.

    Args:
        file: Which of the files.
        number: The line where it begins, or the row of a table; counted from 1 in its file.
        byte: The byte of the file where it begins, counted from 0; -1 in a table.
        value: A value, or a `Bad`.
    """

    file: int
    number: int
    byte: int
    value: Any


@dataclass(frozen=True)
class RowFiles:
    """Files of rows that were found.

    Args:
        path: As the user gave it.
        suffix: What the files are: .jsonl, .csv, .txt, .parquet, .arrow.
        files: The files, in their order; one but for a folder.
    """

    path: str
    suffix: str
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def source(self, file: int, number: int) -> str:
        """Return the name of a place: "file:line", or "file, row 7" in a table."""
        name = self.path if len(self.files) == 1 else str(self.files[file])
        return f"{name}, row {number}" if self.suffix in TABLES else f"{name}:{number}"

    def problem(self, record: Record | tuple[int, int, int, str], text: str) -> str:
        """Return a line that says what is wrong at a place, with its byte where it has one."""
        at = f"; row at byte {record[2]}" if record[2] >= 0 else ""
        return f"{self.source(record[0], record[1])}: {text}{at}"


def find_rows(path: str, answers: bool) -> RowFiles:
    """Look for a file or folder of rows.

    Raises:
        DataError: If there is none, it cannot be read, or is nothing that rows are read from.
    """
    place = Path(path)
    suffixes = (*TEXTS, *TABLES) if answers else (*TEXTS, ".txt", *TABLES)
    if place.is_dir():
        files = table_files(place)
        return RowFiles(path, ".arrow", files) if files else _refuse_folder(path, suffixes)
    try:
        with place.open("rb") as file:
            mark = next((name for mark, name in _MARKS.items() if file.peek(3).startswith(mark)), None)
    except FileNotFoundError:
        near = did_you_mean(place.name, sorted(one.name for one in place.parent.glob("*")))
        where = "no such file" if place.parent.is_dir() else f"no such file, and no folder {place.parent}"
        raise DataError(f"{path}: {where}{near}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    suffix = place.suffix.lower()
    if suffix not in suffixes:
        found = f"suffix {place.suffix!r}" if place.suffix else "no suffix"
        raise DataError(f"{path}: the file has {found}; rows are read from {', '.join(suffixes)} and datasets folders")
    if mark is not None and suffix not in TABLES:
        raise DataError(
            f"{path}:1: begins with the byte order mark (BOM) of {mark}; save the file as UTF-8 without BOM"
        )
    return RowFiles(path, ".jsonl" if suffix == ".ndjson" else suffix, (place,))


def digest_of(found: RowFiles, tick: Tick) -> str:
    """Return the SHA-256 of a file, or of the digests and names of several."""
    total, done, digests = max(1, found.num_bytes), 0, []
    for path in found.files:
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                sha.update(piece)
                done += len(piece)
                tick(min(1.0, done / total))
        digests.append(sha.hexdigest())
    if len(digests) == 1:
        return digests[0]
    names = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, found.files, strict=True))
    return hashlib.sha256(names.encode()).hexdigest()


def records(found: RowFiles, answers: bool, tick: Tick) -> Iterator[Record]:
    """Yield what stands in files, in order; blank lines at the end are none."""
    if found.suffix in TABLES:
        yield from _table_records(found, answers, tick)
        return
    with found.files[0].open("rb") as file:
        lines, total = _Lines(file), max(1, found.num_bytes)
        stream = _text_records(lines, found.suffix, answers)
        while batch := list(islice(stream, _EVERY)):
            yield from batch
            tick(min(1.0, lines.end / total))


class _Lines:
    """The lines of a file, decoded; where one is not UTF-8, `spoilt` tells so.

    `end` is how many bytes were read: where the next line begins.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.end = 0
        self.spoilt: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for raw in self._file:
            start, self.end = self.end, self.end + len(raw)
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x} at byte {start + error.start} of the file"
                self.spoilt.append(f"not UTF-8: {byte}")
                yield raw.decode(errors="replace")


def _text_records(lines: _Lines, suffix: str, answers: bool) -> Iterator[Record]:
    blank: list[tuple[int, int]] = []  # only those before another record are wrong
    for number, byte, record in _csv(lines, answers) if suffix == ".csv" else _plain(lines):
        if record == [] or (isinstance(record, str) and not record.strip()):
            blank.append((number, byte))
            continue
        if blank:
            yield from (Record(0, early, at, Bad("a blank line; remove it")) for early, at in blank)
            blank.clear()
        if lines.spoilt:
            also = [record.text] if isinstance(record, Bad) else []
            whole_file = isinstance(record, Bad) and record.whole_file
            yield Record(0, number, byte, Bad("; ".join(lines.spoilt + also), whole_file))
            lines.spoilt.clear()
        elif isinstance(record, str):
            line = record.rstrip("\r\n")
            yield Record(0, number, byte, {"prompt": line} if suffix == ".txt" else _json(line))
        else:
            yield Record(0, number, byte, record)


def _plain(lines: _Lines) -> Iterator[tuple[int, int, str]]:
    byte = 0
    for number, line in enumerate(lines, 1):
        yield number, byte, line
        byte = lines.end


def _csv(lines: _Lines, answers: bool) -> Iterator[tuple[int, int, Any]]:
    reader = csv.reader(iter(lines), strict=True)
    header: list[str] = []
    start, byte = 1, 0
    try:
        for fields in reader:
            if not fields:
                yield start, byte, fields
            elif not header:
                header = fields
                problems = column_problems(header, answers, dialogues=False)
                if problems:
                    yield start, byte, Bad(f"header: {problems}", whole_file=True)
                    return
            elif len(fields) != len(header):
                yield start, byte, Bad(f"{len(fields)} fields where the header has {len(header)}")
            else:
                yield start, byte, dict(zip(header, fields, strict=True))
            start, byte = reader.line_num + 1, lines.end
    except csv.Error as error:
        yield start, byte, Bad(f"broken CSV: {error}; the rows behind it cannot be told apart", whole_file=True)


def _json(line: str) -> Any:
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return Bad(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a key twice, a number of too many digits, nesting without end
        return Bad(f"JSON that cannot be used: {error}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:60]!r} stands twice")
            seen.add(key)
    return found


# A decoder made in C (msgspec) takes a fifth of the time of this one, which is a third of the whole; but it takes a key
# that stands twice, and to find those costs more than it saves.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice)


def _table_records(found: RowFiles, answers: bool, tick: Tick) -> Iterator[Record]:
    for place, path in enumerate(found.files):
        problems = column_problems(table_columns(path), answers, dialogues=True)
        if problems:
            yield Record(place, 1, -1, Bad(f"columns: {problems}", whole_file=True))
            return
        number = 0
        for share, values in table_batches(path, _EVERY):
            for value in values:
                number += 1
                yield Record(place, number, -1, value)
            tick((place + share) / len(found.files))


def _refuse_folder(path: str, suffixes: tuple[str, ...]) -> RowFiles:
    place = Path(path)
    splits = splits_of(place)
    if splits:
        named = ", ".join(str(place / name) for name in splits[:5])
        raise DataError(f"{path}: a datasets folder of several splits; name one of them: {named}")
    names = sorted(one.name for one in place.glob("*") if one.suffix.lower() in suffixes)
    inside = f"name one of its files: {', '.join(names[:5])}" if names else "and no file of rows is in it"
    raise DataError(f"{path}: a folder, not a file of rows; {inside}")
