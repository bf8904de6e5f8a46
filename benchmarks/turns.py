"""Contenders in processes of their own, in whatever Python each of them needs, that take turns step by step.

Standard library only: peers' environments import it. A parent starts a contender's script with one end of a socket; the
contender prepares, says that it is ready, and then does a step each time the parent asks for one.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Args:
        name: As tables call it.
        python: Interpreter of the environment that it is installed in.
        script: Its worker in this folder.
        options: What the worker makes of it, as JSON.
        environment: Variables set for it alone; None takes one away.
        missing: Why it cannot be started, if so.
    """

    name: str
    python: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    missing: str = ""


class Running:
    """A contender's process, seen from the parent; `record` is what it has told so far."""

    def __init__(self, contender: Contender, task: Path, log: Path) -> None:
        self.record: dict[str, Any] = {
            "options": dict(contender.options),
            "seconds": [],
            "losses": [],
            "supervised": [],
            "peak_bytes": 0,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._log = log
        if contender.missing:
            self.record["error"] = contender.missing
            return
        ours, theirs = socket.socketpair()
        command = [contender.python, str(Path(__file__).parent / contender.script), "--task", str(task)]
        command += ["--pipe", str(theirs.fileno()), "--options", json.dumps(contender.options)]
        environment = {**os.environ, **contender.environment}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={name: value for name, value in environment.items() if value is not None},
            )
        theirs.close()
        self._pipe = Connection(ours.detach())
        told = self._receive()
        if told:
            self.record |= told

    @property
    def more(self) -> bool:
        """Whether it has steps left to do."""
        return "error" not in self.record and len(self.record["seconds"]) < self.record["steps"]

    def step(self) -> None:
        """Let it do one step."""
        self._pipe.send(True)
        told = self._receive()
        if told is None:
            return
        for name in ("seconds", "losses", "supervised"):
            self.record[name].append(told[name])
        self.record["peak_bytes"] = told["peak_bytes"]

    def end(self) -> None:
        """Let the process go."""
        if self._process is None:
            return
        if "error" not in self.record and self.more:
            self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any] | None:
        """Return what it says; where it fails or dies, note why."""
        try:
            told: dict[str, Any] = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait() if self._process else None
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            told = {"error": f"the process ended with {code}: {lines[-1] if lines else 'it said nothing'}"}
        if "error" in told:
            self.record["error"] = told["error"][:400]
            return None
        return told


def take_turns(running: Mapping[str, Running], *, tell: Callable[[str], None]) -> None:
    """Let each contender do all its steps, one each in turn."""
    while any(one.more for one in running.values()):
        for name, one in running.items():
            if one.more:
                one.step()
                if "error" in one.record:
                    tell(f"{name}: {one.record['error']}")
                else:
                    number, seconds, loss = (
                        len(one.record["seconds"]),
                        one.record["seconds"][-1],
                        one.record["losses"][-1],
                    )
                    tell(f"{name}: step {number} of {one.record['steps']}: {seconds:.2f} s, loss {loss:.4f}")


class Turns:
    """A contender's side of it.

    Example:
        turns = Turns(pipe)
        turns.loaded()  # once the model is in memory
        turns.ready(steps=24, packages=("torch",))
        for _ in range(24):
            turns.wait()
            turns.done(loss, num_supervised)
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._loaded = 0
        self._start = 0.0

    def loaded(self) -> None:
        """Note what the process holds with its model loaded; the peak so far is forgotten."""
        self._loaded = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def ready(self, *, steps: int, packages: Sequence[str], **more: Any) -> None:
        """Say that steps can be done, and how many there are."""
        versions = {name: metadata.version(name) for name in packages}
        self._pipe.send({"steps": steps, "loaded_bytes": self._loaded, "versions": versions, **more})

    def wait(self) -> None:
        """Wait for the parent to ask for a step; the time runs from then on."""
        self._pipe.recv()
        self._start = time.perf_counter()

    def done(self, loss: float, supervised: int) -> None:
        """Tell what a step came to: the mean loss of how many supervised tokens."""
        seconds = time.perf_counter() - self._start
        told = {"seconds": seconds, "losses": loss, "supervised": supervised, "peak_bytes": memory("VmHWM")}
        self._pipe.send(told)

    def failed(self, error: BaseException) -> None:
        """Tell why no more comes."""
        lines = str(error).strip().splitlines()
        self._pipe.send({"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"})


def work(contend: Callable[[Turns, dict[str, Any], dict[str, Any]], None]) -> None:
    """Run a contender's script: `contend(turns, task, options)`; what it raises is told to the parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # the first to go where memory runs out
    turns = Turns(Connection(arguments.pipe))
    try:
        contend(turns, json.loads(arguments.task.read_text(encoding="utf-8")), arguments.options)
    except Exception as error:
        turns.failed(error)
        raise
    sys.stdout.flush()


def memory(name: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
