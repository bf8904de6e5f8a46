"""Rows of a run, checked and encoded before any model is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from veneer.config import DataConfig
from veneer.data.encode import EncodedRows, encode_rows
from veneer.data.rows import ChatRow, CompletionRow, RowsRead, TextRow, read_rows

_FORMATS = {ChatRow: "chat", CompletionRow: "completion", TextRow: "text"}


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    Args:
        train: Training rows.
        eval: Rows to evaluate on, or None.
        row_format: chat, completion or text.
        bad: "file:line: what is wrong" for every row left out.
        digests: SHA-256 of each file, by its role.
    """

    train: EncodedRows
    eval: EncodedRows | None
    row_format: str
    bad: tuple[str, ...]
    digests: dict[str, str]


def read_data(config: DataConfig) -> dict[str, RowsRead]:
    """Read the rows of a run by their role, `train` and `eval`; nothing of the base is needed yet.

    Raises:
        DataError: For everything that is wrong with them.
    """
    paths = {"train": config.train, "eval": config.eval}
    return {
        role: read_rows(path, skip_bad_rows=config.skip_bad_rows) for role, path in paths.items() if path is not None
    }


def prepare_data(
    config: DataConfig, read: dict[str, RowsRead], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreparedData:
    """Encode the rows of a run.

    Raises:
        DataError: For every row that the template rejects or that is too long.
    """
    encoded = {role: _encode(found, tokenizer, max_length, config) for role, found in read.items()}
    paths = {"train": config.train, "eval": config.eval}
    return PreparedData(
        train=encoded["train"],
        eval=encoded.get("eval"),
        row_format=_FORMATS[type(read["train"].rows[0])],
        bad=tuple(line for role, found in read.items() for line in (*found.bad, *encoded[role].bad)),
        digests={role: file_digest(path) for role, path in paths.items() if path is not None},
    )


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def _encode(found: RowsRead, tokenizer: PreTrainedTokenizerBase, max_length: int, config: DataConfig) -> EncodedRows:
    return encode_rows(found.rows, tokenizer, max_length=max_length, skip_bad_rows=config.skip_bad_rows)
