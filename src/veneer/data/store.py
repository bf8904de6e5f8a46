"""Checked rows to encoded rows: in memory where the file is small, else in a store on the disk that a later run finds.

A store is a committed folder in the cache, `rows/ROWS/TOKENS`: ROWS is a digest of what the rows depend on (the file,
how it is read, whether bad rows are skipped), TOKENS of what their ids depend on besides. Its files are mapped, so that
pages of them are in memory only while they are used. A store is read only where every byte is as its manifest says.
"""

import hashlib
import json
import logging
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from veneer.base.cache import cache_folder
from veneer.data.encode import LISTED, Gathered, TogetherDiffersError, encode_stream, refused
from veneer.data.encoded import Buffer, EncodedRows, Findings, Places, RowSink, rows_of
from veneer.data.records import RowFiles, Tick, digest_of, find_rows
from veneer.data.rows import BadRow, CheckedRows, check_rows
from veneer.errors import DamagedArtefactError, DataError
from veneer.files.commit import commit_folder, verify_folder
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.manifest import read_verified
from veneer.files.strict_json import dump_json, parse_json

log = logging.getLogger("veneer")

STORE = 1
"""Part of the key: raise it when the same file gives other rows or other ids, or is laid down otherwise."""

SMALL = 16 << 20
"""Bytes of a file whose rows are encoded in memory; of these, little is left in the cache."""

_PARTS = ("token_ids.bin", "supervised.bin", "index.bin")
_REPORT = "report.json"
_MAX_REPORT = 1 << 30
_PIECE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the ids of rows depend on besides the rows.

    Args:
        tokenizer: The base model's.
        max_length: Longest row in tokens.
        skip_bad_rows: Leave rows out that cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    skip_bad_rows: bool = False


@dataclass
class _Report:
    """What is known of a file's rows besides their ids; bad rows by their places, since the file may be moved."""

    num_rows: int
    row_format: str
    unread: list[BadRow] = field(default_factory=list)
    unused: list[BadRow] = field(default_factory=list)
    unequal: list[list[int]] = field(default_factory=list)
    num_supervised: int = 0
    num_lost: int = 0
    num_tails: int = 0
    num_compared: int = 0


def recall_or_check(path: str, *, skip_bad_rows: bool, tick: Tick, small: int = SMALL) -> CheckedRows:
    """Return a file's rows as `check_rows` does; a file of which a store was made need not be read again.

    Raises:
        DataError: As `check_rows`.
    """
    found = find_rows(path, True)
    if found.num_bytes > small:
        digest = digest_of(found, tick)
        for folder in sorted(_rows_folder(found, digest, skip_bad_rows).glob("[0-9a-f]*")):
            try:
                report = _read_report(folder)
            except (DamagedArtefactError, OSError):
                continue  # said where the ids are asked for
            return CheckedRows(found, digest, report.num_rows, report.row_format, tuple(report.unread))
    return check_rows(path, skip_bad_rows=skip_bad_rows, tick=tick)


def encode_checked(
    checked: CheckedRows, settings: Settings, tick: Tick, *, small: int = SMALL, fs: FileSystem = REAL
) -> EncodedRows:
    """Return a file's rows encoded as `encode_rows` does, in memory or mapped from a store.

    A slow tokenizer's are held in memory: there is no telling whether another one is the same.

    Args:
        checked: The rows.
        settings: What their ids depend on.
        tick: Called now and then with the share of the work that is done; what it raises ends the work.
        small: Bytes of a file whose rows are held in memory.
        fs: Where a store lies.

    Raises:
        DataError: As `encode_rows`; also if the file is not what it was when it was checked.
        OutputError: If the cache cannot be written to.

    Example:
        encode_checked(check_rows("a.jsonl"), Settings(tokenizer, 1024), tick=print).num_tokens
    """
    if checked.found.num_bytes <= small or not settings.tokenizer.is_fast:
        parts = [_Memory() for _ in _PARTS]
        return _rows(parts, checked, _encode(checked, settings, tick, parts))
    folder = _rows_folder(checked.found, checked.digest, settings.skip_bad_rows) / _tokens_key(settings)
    try:
        return _open(folder, checked)
    except FileNotFoundError:
        pass
    except (DamagedArtefactError, OSError) as error:
        log.warning("the stored rows of %s are damaged and are made again: %s", checked.found.path, error)
    notes = {"source": checked.found.path, "sha256": checked.digest, "store": STORE}
    commit_folder(
        folder,
        lambda target: _write(target, checked, settings, tick, fs),
        kind="rows",
        notes=notes,
        replace=True,
        fs=fs,
    )
    rows = _open(folder, checked)
    log.info("%d rows of %s are kept in %s, %.0f MB", len(rows), checked.found.path, folder, rows.num_tokens * 5 / 1e6)
    return rows


class _File:
    """A new file that is appended to in pieces of a megabyte."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self._path, self._fs = path, fs
        self.begin()

    def begin(self) -> None:
        """Begin anew, with an empty file."""
        self._size, self._kept, self._waiting = 0, 0, list[bytes]()

    def write(self, data: bytes) -> None:
        """Take bytes in, to be written soon."""
        self._waiting.append(data)
        self._kept += len(data)
        if self._kept > _PIECE:
            self.flush()

    def flush(self) -> None:
        """Write what was taken in."""
        self._fs.append_bytes(self._path, self._waiting, self._size)
        self._size, self._kept, self._waiting = self._size + self._kept, 0, []


class _Memory(bytearray):
    """What is a file elsewhere, in memory."""

    def begin(self) -> None:
        """Begin anew."""
        self.clear()

    def write(self, data: bytes) -> None:
        """Take bytes in."""
        self += data

    def flush(self) -> None:
        """Nothing waits."""


_Sheets = Sequence[_File] | Sequence[_Memory]


def _write(folder: Path, checked: CheckedRows, settings: Settings, tick: Tick, fs: FileSystem) -> None:
    report = _encode(checked, settings, tick, [_File(folder / name, fs) for name in _PARTS])
    fs.write_bytes(folder / _REPORT, dump_json(asdict(report)))


def _encode(checked: CheckedRows, settings: Settings, tick: Tick, sheets: _Sheets) -> _Report:
    """Write the rows that can be used, and return what is to be said of them."""
    try:
        return _encode_once(checked, settings, tick, sheets)
    except TogetherDiffersError as error:
        log.warning("%s: this tokenizer takes texts one by one only, which is slow", error)
        for sheet in sheets:
            sheet.begin()
        return _encode_once(checked, settings, tick, sheets, one_by_one=True)


def _encode_once(
    checked: CheckedRows, settings: Settings, tick: Tick, sheets: _Sheets, *, one_by_one: bool = False
) -> _Report:
    found, skip = checked.found, settings.skip_bad_rows
    report = _Report(checked.num_rows, checked.row_format, list(checked.bad))
    sink, gathered, num_bad = RowSink(*sheets), Gathered(), 0
    rows = (((record.file, record.number, record.byte), row) for record, row in checked.rows(tick))
    for one in encode_stream(rows, settings.tokenizer, settings.max_length, one_by_one=one_by_one):
        gathered.add(one, sink)
        num_bad += bool(one.error)
        if one.error and (skip or num_bad <= LISTED):
            report.unused.append((*one.place, one.error))
    if num_bad and not (skip and sink.num_rows):
        lines = [found.problem(one, one[3]) for one in report.unused[:LISTED]]
        raise refused(num_bad, checked.num_rows, lines, skip_bad_rows=skip)
    if digest_of(found, tick) != checked.digest:
        raise DataError(f"{found.path}: the file was changed while it was read; start again")
    for sheet in sheets:
        sheet.flush()
    report.unequal = [list(place) for place in gathered.unequal]
    report.num_supervised, report.num_lost = sink.num_supervised, gathered.num_lost
    report.num_tails, report.num_compared = gathered.num_tails, gathered.num_compared
    return report


def _open(folder: Path, checked: CheckedRows) -> EncodedRows:
    """Return the rows of a store, mapped.

    Raises:
        FileNotFoundError: If there is none.
        DamagedArtefactError: If a byte of it is not as it was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    if verify_folder(folder) is None:
        raise DamagedArtefactError(f"{folder}: holds no manifest")
    return _rows([_mapped(folder / name) for name in _PARTS], checked, _read_report(folder))


def _rows(parts: Sequence[Buffer], checked: CheckedRows, report: _Report) -> EncodedRows:
    found = checked.found
    findings = Findings(
        report.num_supervised,
        report.num_lost,
        report.num_tails,
        report.num_compared,
        tuple(found.source(one[0], one[1]) for one in report.unequal),
    )
    bad = [found.problem(one, one[3]) for one in report.unused]
    return rows_of(parts, lambda index_N5: Places(found.source, index_N5), bad, findings)


def _mapped(path: Path) -> mmap.mmap:
    """Map a file; what is written to the memory stays there."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_report(folder: Path) -> _Report:
    content, manifest = read_verified(folder, [_REPORT], max_bytes=_MAX_REPORT)
    if manifest is None:
        raise DamagedArtefactError(f"{folder}: holds no manifest")
    raw = parse_json(content[_REPORT], str(folder / _REPORT), max_bytes=_MAX_REPORT, error=DamagedArtefactError)
    try:
        report = _Report(**raw)
    except TypeError as error:
        raise DamagedArtefactError(f"{folder / _REPORT}: not a report: {error}") from None
    report.unread, report.unused = (
        [(file, number, byte, text) for file, number, byte, text in listed] for listed in (report.unread, report.unused)
    )
    return report


def _rows_folder(found: RowFiles, digest: str, skip_bad_rows: bool) -> Path:
    key = {"store": STORE, "rows": digest, "suffix": found.suffix, "skip_bad_rows": skip_bad_rows}
    return cache_folder() / "rows" / _digest(key)


def _tokens_key(settings: Settings) -> str:
    return _digest(
        {
            "tokenizer": tokenizer_digest(settings.tokenizer),
            "max_length": settings.max_length,
            "versions": [version(name) for name in ("tokenizers", "transformers", "jinja2")],
        }
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that the ids of rows depend on in a fast tokenizer, its chat template included."""
    sha = hashlib.sha256()
    special = [tokenizer.all_special_tokens, tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    told = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.eos_token_id, *special]
    sha.update(json.dumps(told, default=str).encode())
    tokenizer("")  # a call sets how the backend cuts and pads, which is told with it
    sha.update(tokenizer.backend_tokenizer.to_str().encode())
    return sha.hexdigest()


def _digest(key: Any) -> str:
    return hashlib.sha256(dump_json(key)).hexdigest()[:32]
