"""What the verbs share: options, tables, JSON, log lines."""

import json
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Modules = Annotated[bool, typer.Option("--modules", help="A line for every module.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, if veneer wrote it.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and list them."),
]
AdapterFolder = Annotated[
    str | None, typer.Option("--adapter", metavar="DIR", help="Adapter folder; the base alone without it.")
]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="Use the adapter although it was made for other weights or another template."),
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="NAME", help="How the base's weights are stored: plain, int8 or nf4."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="What the base is computed in: float32, bfloat16 or float16."),
]


def log_to_stderr() -> None:
    """Show our log lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("veneer")
    log.handlers = [handler]
    log.setLevel(logging.INFO)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_result(command: str, inputs: Mapping[str, Any], found: Mapping[str, Any], *, out: object = None) -> None:
    """Print what a verb did as one JSON object, which begins alike for every verb (docs/json.md).

    Args:
        command: The verb.
        inputs: What was read, as it was typed, by the names of the arguments.
        found: All other keys.
        out: The folder or file that was written.
    """
    start = {"command": command, "inputs": dict(inputs), "out": None if out is None else str(out)}
    print_json(start | dict(found))


def print_error(error: BaseException, exit_code: int, message: str, problems: Sequence[str] = ()) -> None:
    """Print why a command failed as one JSON object on standard output."""
    told = {"type": type(error).__name__, "message": message, "problems": list(problems)}
    print_json({"error": {**told, "exit_code": exit_code}})


def num_bad_rows(bad_rows: Sequence[str]) -> dict[str, Any]:
    """Return what JSON says of rows that were left out."""
    return {"num_bad_rows": len(bad_rows), "bad_rows": list(bad_rows)}


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], *, right: Sequence[str] = (), fold: Sequence[str] = ()
) -> None:
    """Print rows as a table that aligns; columns named in `right` hold numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    for name in rows[0]:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name not in fold)
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row.values()))
    stdout().print(table)


def printable(value: object) -> str:
    r"""Return a value as text that a terminal shows and does not obey: names come from files of anybody.

    Example:
        >>> printable("q\x1b[2J")
        'q\\x1b[2J'
    """
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in str(value))


def stdout() -> Console:
    """Return standard output: as wide as the terminal, and wide enough for everything where it is none."""
    return Console(width=None if sys.stdout.isatty() else 200)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values in two aligned columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(printable(name)), Text(printable(value)))
    stdout().print(table)


def print_bad_rows(bad_rows: Sequence[str]) -> None:
    """Say on standard error which rows were left out."""
    if bad_rows:
        print(f"{len(bad_rows)} rows were left out:", file=sys.stderr)
        for line in bad_rows:
            print(f"  - {line}", file=sys.stderr)


@contextmanager
def answers_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many answers are finished, on standard error where that is a terminal."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("answering", total=total)
        yield lambda count: bar.advance(task, count)


def size(num_bytes: int) -> str:
    """Return a number of bytes for people: 9,768,960 bytes (9.8 MB).

    Example:
        >>> size(9_768_960), size(12)
        ('9,768,960 bytes (9.8 MB)', '12 bytes')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes:,} bytes ({num_bytes / factor:.1f} {unit})"
    return f"{num_bytes} bytes"


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return what is alike together, in the order in which it comes.

    Example:
        >>> grouped(["q", "kv", "k"], len)
        {1: ['q', 'k'], 2: ['kv']}
    """
    groups: dict[Key, list[Item]] = {}
    for one in items:
        groups.setdefault(key(one), []).append(one)
    return groups


def ratio(value: float) -> str:
    """Return a relative error for people.

    Example:
        >>> ratio(0.0), ratio(0.0123)
        ('0', '1.23e-02')
    """
    return f"{value:.2e}" if value else "0"


def span(numbers: Sequence[float], form: str = "") -> str:
    """Return the least and the most of some numbers, once where they read the same; a dash where there are none.

    Example:
        >>> span([3, 1, 2]), span([0.1, 0.1004], ".2%"), span([])
        ('1–3', '10.00%–10.04%', '–')
    """
    if not numbers:
        return "–"
    least, most = format(min(numbers), form), format(max(numbers), form)
    return least if least == most else f"{least}–{most}"
