"""Rows of a run, checked and encoded before any model is loaded."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from veneer.config import DataConfig
from veneer.data.encode import EncodedRows
from veneer.data.records import Tick
from veneer.data.rows import CheckedRows
from veneer.data.store import Settings, encode_checked, recall_or_check
from veneer.train.progress import share_bar

log = logging.getLogger("veneer")

Check = Callable[[], None]
"""Called now and then during long work; what it raises ends the work, of which nothing is left behind."""


@dataclass(frozen=True)
class DataFacts:
    """What the rows of a run brought to light.

    Args:
        duplicates: Rows that hold the same tokens, supervised alike, as an earlier row; by role.
        overlap: Evaluation rows that stand among the training rows too.
        lost: Rows left out because no supervised token of theirs was left; among `bad`.
        compared: Chats whose training ids before each answer were compared with the ids that the model is asked with.
        unequal: Of those, the sources of the rows that differ.
    """

    duplicates: dict[str, int] = field(default_factory=dict)
    overlap: int = 0
    lost: int = 0
    compared: int = 0
    unequal: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What is worth to be known, a line each.

        Example:
            >>> DataFacts({"train": 0, "eval": 2}, overlap=1).lines
            ['2 eval rows are duplicates of earlier ones', '1 eval rows stand among the training rows too']
        """
        twice = {role: count for role, count in self.duplicates.items() if count}
        found = [f"{count:,} {role} rows are duplicates of earlier ones" for role, count in twice.items()]
        if self.overlap:
            found.append(f"{self.overlap:,} eval rows stand among the training rows too")
        if self.lost:
            found.append(f"{self.lost:,} of the rows left out had no supervised token left")
        if self.unequal:
            named = ", ".join(self.unequal[:3]) + (", ..." if len(self.unequal) > 3 else "")
            share = f"{len(self.unequal):,} of {self.compared:,} chats"
            found.append(f"in {share} a token reaches across a border of turns, so asking gives other ids: {named}")
        elif self.compared:
            found.append(f"in all {self.compared:,} chats the ids before each answer are those that asking gives")
        return found


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    Args:
        train: Training rows.
        eval: Rows to evaluate on, or None.
        row_format: chat, completion or text.
        bad: "file:line: what is wrong" for every row left out.
        digests: SHA-256 of each file, by its role.
        facts: What the rows brought to light.
    """

    train: EncodedRows
    eval: EncodedRows | None
    row_format: str
    bad: tuple[str, ...]
    digests: dict[str, str]
    facts: DataFacts = field(default_factory=DataFacts)


def read_data(config: DataConfig, *, check: Check | None = None) -> dict[str, CheckedRows]:
    """Check the rows of a run by their role, `train` and `eval`; nothing of the base is needed yet, no row is held.

    Raises:
        DataError: For everything that is wrong with them.
    """
    found = {}
    for role, path in _paths(config).items():
        with share_bar(f"checking {role} rows") as show:
            found[role] = recall_or_check(path, skip_bad_rows=config.skip_bad_rows, tick=_tick(check, show))
    return found


def prepare_data(
    config: DataConfig,
    read: dict[str, CheckedRows],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    check: Check | None = None,
) -> PreparedData:
    """Encode the rows of a run.

    Raises:
        DataError: For every row that the template rejects or that is too long.
    """
    settings = Settings(tokenizer, max_length, config.skip_bad_rows)
    encoded = {}
    for role, found in read.items():
        with share_bar(f"encoding {role} rows") as show:
            encoded[role] = encode_checked(found, settings, _tick(check, show))
    facts = _facts(encoded)
    for line in facts.lines:
        log.info("%s", line)
    return PreparedData(
        train=encoded["train"],
        eval=encoded.get("eval"),
        row_format=read["train"].row_format,
        bad=tuple(line for role, found in read.items() for line in (*found.bad_lines, *encoded[role].bad)),
        digests={role: found.digest for role, found in read.items()},
        facts=facts,
    )


def _paths(config: DataConfig) -> dict[str, str]:
    """Return the files of a run by their role."""
    return {"train": config.train} | ({"eval": config.eval} if config.eval is not None else {})


def _tick(check: Check | None, show: Tick) -> Tick:
    def tick(share: float) -> None:
        if check is not None:
            check()
        show(share)

    return tick


def _facts(encoded: dict[str, EncodedRows]) -> DataFacts:
    findings = [rows.findings for rows in encoded.values()]
    return DataFacts(
        duplicates={role: rows.num_duplicates for role, rows in encoded.items()},
        overlap=encoded["eval"].num_in(encoded["train"]) if "eval" in encoded else 0,
        lost=sum(one.num_lost for one in findings),
        compared=sum(one.num_compared for one in findings),
        unequal=tuple(source for one in findings for source in one.unequal),
    )
