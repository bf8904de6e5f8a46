"""The run folder: whether it may be used, and what is written into it besides checkpoints."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from veneer.config import RunConfig
from veneer.errors import OutputError
from veneer.files.filesystem import REAL
from veneer.train.runfile import dump_run

Existing = Literal["refuse", "resume", "overwrite"]
"""What to do where the run folder exists."""

RUN, PLAN, METRICS, CHECKPOINTS, ADAPTER = "run.yaml", "plan.json", "metrics.jsonl", "checkpoints", "adapter"
PICTURE = "loss.png"

_OURS = (ADAPTER, CHECKPOINTS, METRICS, PICTURE, RUN, PLAN)
"""All that a run writes: nothing else in its folder is ever removed."""


def check_run_folder(out: str, existing: Existing) -> Path:
    """Tell whether a run may be written to a folder; nothing is touched.

    Raises:
        OutputError: If it exists and was to be left alone, or holds something else than a run.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"out: {out!r} is a file; expected a folder to write the run to")
    holds_something = folder.is_dir() and any(folder.iterdir())
    if not holds_something:
        if existing == "resume":
            raise OutputError(f"out: there is no run in {out!r} to go on with; leave out --resume to start one")
        return folder
    if existing == "refuse":
        raise OutputError(f"out: {out!r} exists; go on with --resume, or replace it with --overwrite")
    if not ((folder / RUN).is_file() and (folder / PLAN).is_file()):
        raise OutputError(
            f"out: {out!r} exists and holds no {RUN} with a {PLAN}: it is not a run folder and is left as it is"
        )
    return folder


def begin_run_folder(run: RunConfig, plan: Mapping[str, Any], made_with: Mapping[str, Any], existing: Existing) -> Path:
    """Make the run folder, with the resolved configuration and the plan in it.

    Args:
        run: The run.
        plan: What will be adapted.
        made_with: What the run's numbers depend on; a run that is resumed must find it unchanged.
        existing: What to do where the folder exists.

    Raises:
        OutputError: As `check_run_folder`, or naming what has changed since the run began.
    """
    folder = check_run_folder(run.out, existing)
    if existing == "resume":
        before = _made_with(folder / PLAN)
        changed = differences(before, json.loads(json.dumps(made_with)))
        if changed:
            raise OutputError(f"{folder} cannot be gone on from: the run has changed since", changed)
        return folder
    for name in _OURS:
        if (folder / name).exists():
            REAL.remove_tree(folder / name)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / RUN).write_text(dump_run(run), encoding="utf-8")
    (folder / PLAN).write_text(json.dumps({**plan, "made_with": made_with}, indent=2) + "\n", encoding="utf-8")
    return folder


def _made_with(plan: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(plan.read_text(encoding="utf-8"))["made_with"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{plan} is damaged, so the run cannot be gone on from: {error!r}") from None


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
    """The lines of `metrics.jsonl`; each is on its way to the disk when `write` returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all lines; one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def forget_after(self, step: int) -> None:
        """Keep the lines up to a step: those behind it will be written again."""
        kept = [line for line in self.read() if line["step"] <= step]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, self.path)  # noqa: PTH105
