"""The run folder: whether it may be used, and what is written into it besides checkpoints."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from veneer.config import RunConfig
from veneer.errors import OutputError
from veneer.files.commit import commit_file, discard
from veneer.files.filesystem import REAL, FileSystem
from veneer.train.runfile import dump_run

log = logging.getLogger("veneer")

Existing = Literal["refuse", "resume", "overwrite"]
"""What to do where the run folder exists."""

RUN, PLAN, METRICS, CHECKPOINTS, ADAPTER = "run.yaml", "plan.json", "metrics.jsonl", "checkpoints", "adapter"
PICTURE = "loss.png"
_LOCK = ".lock"

_OURS = (ADAPTER, CHECKPOINTS, METRICS, PICTURE, RUN, PLAN)
"""All that a run writes: nothing else in its folder is ever removed."""


def check_run_folder(out: str, existing: Existing) -> Path:
    """Tell whether a run may be written to a folder; nothing is touched.

    Raises:
        OutputError: If it exists and was to be left alone, holds something else than a run, or a run is at work in it.
    """
    folder = Path(out)
    if (folder / _LOCK).is_file():
        with alone_in(folder):
            pass
    return _usable(folder, existing)


def _usable(folder: Path, existing: Existing) -> Path:
    out = str(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"out: {out!r} is a file; expected a folder to write the run to")
    # What a run that was killed before it began has left is nothing: its lock, its plan half written.
    names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    holds_something = any(name != _LOCK and not name.startswith(f".{PLAN}.") for name in names)
    if not holds_something:
        if existing == "resume":
            raise OutputError(f"out: there is no run in {out!r} to go on with; leave out --resume to start one")
        return folder
    if existing == "refuse":
        raise OutputError(f"out: {out!r} exists; go on with --resume, or replace it with --overwrite")
    if not (folder / PLAN).is_file():
        raise OutputError(f"out: {out!r} exists and holds no {PLAN}: it is not a run folder and is left as it is")
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder within the block, which is made where it does not exist.

    The lock goes with the process; its file stays, empty. Where the file system knows no locks nobody is kept out.

    Raises:
        OutputError: If another run is at work in it.
    """
    REAL.make_parents(folder)
    with REAL.locked(folder / _LOCK, wait=False, create=True) as held:
        if held is False:
            raise OutputError(f"out: another run is at work in {folder}; wait for its end, or choose another folder")
        yield


def begin_run_folder(
    run: RunConfig, plan: Mapping[str, Any], made_with: Mapping[str, Any], existing: Existing, *, force: bool = False
) -> tuple[Path, list[str]]:
    """Make the run folder, with the resolved configuration and the plan in it.

    The plan is written first and never removed: a run that is killed here leaves a folder that is known as its own.

    Args:
        run: The run.
        plan: What will be adapted.
        made_with: What the run's numbers depend on; a run that is resumed must find it unchanged.
        existing: What to do where the folder exists.
        force: Go on where it has changed, and record that in the plan.

    Returns:
        The folder, and why the run is no longer the one that was begun: a line for each change.

    Raises:
        OutputError: As `check_run_folder`, or naming what has changed since the run began.
    """
    folder = _usable(Path(run.out), existing)
    inexact: list[str] = []
    if existing == "resume":
        before, inexact = _read_plan(folder / PLAN)
        changed = differences(before, json.loads(json.dumps(made_with)))
        if changed and not force:
            raise OutputError(f"{folder} cannot be gone on from: the run has changed since", changed)
        REAL.make_parents(folder / CHECKPOINTS)  # a run that was killed as it began may lack it
        if not changed and (folder / RUN).is_file():
            return folder, inexact
        inexact += [f"gone on with by force from step {_steps_done(folder)}: {line}" for line in changed]
    else:
        for name in _OURS:
            if name != PLAN and (folder / name).exists():
                discard(folder / name)
        REAL.make_parents(folder)
    written = {**plan, "made_with": made_with, "exact": not inexact, "inexact": inexact}
    commit_file(folder / PLAN, (json.dumps(written, indent=2) + "\n").encode())
    commit_file(folder / RUN, dump_run(run).encode())
    REAL.make_parents(folder / CHECKPOINTS)
    return folder, inexact


def _read_plan(plan: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        held = json.loads(plan.read_text(encoding="utf-8"))
        return dict(held["made_with"]), list(held["inexact"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{plan} is damaged, so the run cannot be gone on from: {error!r}") from None


def _steps_done(folder: Path) -> int:
    """Return the step of the newest checkpoint by its name, 0 without one."""
    names = [path.name.partition("-")[2] for path in (folder / CHECKPOINTS).glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that differs, nested settings by dotted name.

    Example:
        >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        ['b.c: was 2, is 3']
    """
    lines = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{key}: was {old!r}, is {new!r}")
    return lines


class Metrics:
    """The lines of `metrics.jsonl`: a record for people and plots, which no run stops or fails for.

    A line outlives the process once it is written, and a power loss once `sync` returned, which is before each
    checkpoint. What the disk refuses is kept in memory and written with the next line that it takes. A line that was
    cut short is left out, and overwritten by the next one.
    """

    def __init__(self, folder: Path, *, fs: FileSystem = REAL) -> None:
        self.path, self._fs = folder / METRICS, fs
        self._pending: list[bytes] = []
        self._whole: int | None = None  # bytes of whole lines, where the file may hold more than them
        self._is_known, self._has_name = False, False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._pending.append(json.dumps(line).encode() + b"\n")
        try:
            self._flush()
        except OSError as error:
            if len(self._pending) == 1:
                log.warning("%s cannot be written (the run goes on, later lines bring it along): %s", self.path, error)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        try:
            self._flush()
            if self._fs.exists(self.path):
                self._fs.fsync_file(self.path)
                if not self._has_name:
                    self._fs.fsync_folder(self.path.parent)
                    self._has_name = True
        except OSError as error:
            log.warning("%s may not be on the disk: %s", self.path, error)

    def read(self) -> list[dict[str, Any]]:
        """Return all lines up to one that is damaged, as one is that a crash cut short."""
        lines = _whole_lines(self._held())
        return [json.loads(text) for text in [*lines, *self._pending]]

    def forget_after(self, step: int, evaluated: int) -> None:
        """Keep the lines up to a step, and up to an evaluation: those behind them will be written again.

        Raises:
            OutputError: If the disk refuses; the file is as it was.
        """
        kept = [line for line in self.read() if line["step"] <= (evaluated if "eval_loss" in line else step)]
        commit_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode(), fs=self._fs)
        self._pending, self._whole, self._is_known = [], None, True

    def _flush(self) -> None:
        if not self._pending:
            return
        if not self._is_known:
            self._whole, self._is_known = sum(map(len, _whole_lines(self._held()))), True
        elif self._whole is None:
            self._whole = self._fs.size_of(self.path) if self._fs.exists(self.path) else 0
        self._fs.append_bytes(self.path, self._pending, self._whole)
        self._pending, self._whole = [], None

    def _held(self) -> bytes:
        return self._fs.read_bytes(self.path) if self._fs.exists(self.path) else b""


def _whole_lines(data: bytes) -> list[bytes]:
    """Return the lines, with their ends, up to the first one that is no object of a step."""
    lines = []
    for text in data.splitlines(keepends=True):
        try:
            value = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or not isinstance(value, dict) or type(value.get("step")) is not int:
            break
        lines.append(text)
    return lines
