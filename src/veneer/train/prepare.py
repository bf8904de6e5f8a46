"""Rows of a run, checked and encoded before any model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from veneer.config import DataConfig
from veneer.data.encode import EncodedRows, encode_rows
from veneer.data.rows import ChatRow, CompletionRow, RowsRead, TextRow, read_rows
from veneer.files.filesystem import REAL

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
    return {role: read_rows(path, skip_bad_rows=config.skip_bad_rows) for role, path in _paths(config).items()}


def prepare_data(
    config: DataConfig, read: dict[str, RowsRead], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreparedData:
    """Encode the rows of a run.

    Raises:
        DataError: For every row that the template rejects or that is too long.
    """
    encoded = {role: _encode(found, tokenizer, max_length, config) for role, found in read.items()}
    return PreparedData(
        train=encoded["train"],
        eval=encoded.get("eval"),
        row_format=_FORMATS[type(read["train"].rows[0])],
        bad=tuple(line for role, found in read.items() for line in (*found.bad, *encoded[role].bad)),
        digests={role: REAL.measure(Path(path))[1] for role, path in _paths(config).items()},
    )


def _paths(config: DataConfig) -> dict[str, str]:
    """Return the files of a run by their role."""
    return {"train": config.train} | ({"eval": config.eval} if config.eval is not None else {})


def _encode(found: RowsRead, tokenizer: PreTrainedTokenizerBase, max_length: int, config: DataConfig) -> EncodedRows:
    return encode_rows(found.rows, tokenizer, max_length=max_length, skip_bad_rows=config.skip_bad_rows)
