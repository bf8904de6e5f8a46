"""What the benchmarks share: the machine, the versions, the commit, results as JSON, tables."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    capabilities = torch.cpu.get_capabilities()
    changes = "+changes" if _git("status", "--porcelain", "--", "..", ":!results") else ""
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "avx512": bool(capabilities.get("avx512_f")),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short", "HEAD") + changes,
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "circumstances": circumstances()}, indent=2) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in head) + " |" for row in rows)])


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS now, VmHWM at most so far."""
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(field + ":"))


def peak_above(step: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory rises at its peak while a step runs.

    Only where malloc hands back what is freed (MALLOC_MMAP_THRESHOLD_ small): else the step finds room that an earlier
    one left behind, and the figure says nothing.
    """
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    step()
    return memory("VmHWM") - before


def bytes_held(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, each once."""
    tensors = {one.data_ptr(): one.nbytes for one in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
