"""A process that has imported everything and computed nothing; each run is a fork of it.

A fork is a process of its own that runs the real `veneer` command on the real disk, and a signal to it is a real
signal. What is not real: the imports, which would take three of the four seconds of a run, were done before.

It reads a line of JSON for each run, and answers with a line: how the run ended, and when.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from veneer.cli import main as cli
from veneer.files.filesystem import REAL

HEAVY = ("veneer.train.run", "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg")

PHASES = {
    "rows": ("veneer.train.run", "read_data"),
    "tokens": ("veneer.train.run", "prepare_data"),
    "base": ("veneer.train.run", "load_model"),
    "start": ("veneer.train.run", "attach"),
    "folder": ("veneer.train.run", "begin_run_folder"),
    "prefix": ("veneer.train.loop", "prefix_caches"),
    "step": ("veneer.train.loop", "step_gradient"),
    "evaluation": ("veneer.train.loop", "evaluate_loss"),
    "save": ("veneer.train.running", "save_checkpoint"),
    "adapter": ("veneer.train.finish", "save_adapter"),
    "picture": ("veneer.train.loop", "draw_losses"),
}
"""Where each phase of a run begins: a module and the name under which it calls it."""

OPERATIONS = ("open_new", "truncate", "write", "fsync", "close", "rename", "fsync_folder", "unlink", "make_folder")
"""Operations of the file system at which a run may be killed."""


def on_entry(place: tuple[str, str], act: Callable[..., None]) -> None:
    """Call a function before another one, with its arguments."""
    module, name = import_module(place[0]), place[1]
    original = vars(module)[name]

    def both(*args: object, **options: object) -> object:
        act(*args, **options)
        return original(*args, **options)

    setattr(module, name, both)


def trace_rows(path: str) -> None:
    """Append the number and the rows of each step whose gradient is computed."""

    def note(model: object, rows: object, step: list, begin: object, **_: object) -> None:
        line = json.dumps([begin.args[1], [row for micro in step for row in micro]]) + "\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())
        os.close(handle)

    on_entry(PHASES["step"], note)


def kill_at_operation(number: int) -> None:
    """Let the process kill itself at a file operation: half of the times before it, half behind it."""
    count = [0]
    for name in OPERATIONS:
        original = getattr(REAL, name)

        def counted(*args: object, original: Callable = original) -> object:
            count[0] += 1
            here = count[0] == number  # an operation may be made of others
            if here and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = original(*args)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(REAL, name, counted)


def fill_disk(room: int) -> None:
    """Let the disk take so many bytes of the process, the last write in part, and nothing more."""
    left, original = [room], REAL.write

    def write(handle: int, data: memoryview) -> int:
        part = data[: left[0]]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = original(handle, part)
        left[0] -= taken
        return taken

    REAL.write = write


def signal_in_phase(phase: str, call: int, delay: float, number: int, marks: str, times: int = 1) -> None:
    """Send a signal to the process shortly after a phase began for a certain time, and note when."""
    count = [0]

    def send() -> None:
        Path(marks).write_text(str(time.monotonic()))
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.005)

    def act(*_: object, **__: object) -> None:
        count[0] += 1
        if count[0] == call:
            threading.Timer(delay, send).start()

    on_entry(PHASES[phase], act)


def limit_memory(after_base: int) -> None:
    """Leave the process so many bytes of address space more than it has when training begins."""

    def limit(*_: object, **__: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + after_base
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    on_entry(("veneer.train.loop", "_all_steps"), limit)


def run_child(order: dict) -> None:
    """Be the `veneer` command; never returns."""
    code = 70
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
        trace_rows(order["trace"])
        if "operation" in order:
            kill_at_operation(order["operation"])
        if "room" in order:
            fill_disk(order["room"])
        if "memory" in order:
            limit_memory(order["memory"])
        if "phase" in order:
            signal_in_phase(**order["phase"])
        sys.argv = ["veneer", *order["arguments"]]
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, after: float | None) -> tuple[int, float]:
    """Wait for a child, kill it after some seconds; return how it ended and when."""
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if ended:
            return os.waitstatus_to_exitcode(status), now
        if after is not None and now - start >= after:
            os.kill(pid, signal.SIGKILL)
            after = None
        if now - start > 900:  # it hangs
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def main() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    for name in HEAVY:
        import_module(name)
    for line in sys.stdin:
        order, start = json.loads(line), time.monotonic()
        pid = os.fork()
        if not pid:
            run_child(order)
        code, end = wait(pid, order.get("after"))
        print(json.dumps({"code": code, "seconds": end - start, "end": end}), flush=True)


if __name__ == "__main__":
    main()
