"""How long `show` and `check` of a 100 MB adapter take, and what of it is the interpreter's and torch's.

    python benchmarks/show_check.py [--layers 32] [--runs 5]

Each command runs in a process of its own, as a user starts it. Beside it stands the time of a process that imports
torch and nothing else: below that no command that looks at weights can come. `inside` is what the command itself took,
from after the imports to the last line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import circumstances, save, table

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.files.peft import save_adapter

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)} | {
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
RANK = 16
TORCH = "import torch"
INSIDE = """
import sys, time
import torch, veneer
from veneer.cli import check, show
veneer.check, veneer.load_adapter, veneer.summarize, veneer.relate
from veneer.cli import main
sys.argv = ["veneer", *sys.argv[1:]]
start = time.perf_counter()
try:
    main.main()
finally:
    print(time.perf_counter() - start, "transformers" in sys.modules, file=sys.stderr)
"""


def make(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """Write an adapter for 8B-shaped layers; return the bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(layers):
        for name, (outs, ins) in SHAPES.items():
            A = torch.randn(RANK, ins, generator=generator).to(dtype)
            B = (torch.randn(outs, RANK, generator=generator) / 100).to(dtype)
            modules[f"model.layers.{layer}.self_attn.{name}_proj"] = LowRank(A, B, 2.0)
    adapter = Adapter(modules, LoRAConfig(rank=RANK, alpha=2.0 * RANK))
    save_adapter(adapter, folder)
    return adapter.num_bytes


def seconds(command: Sequence[str], runs: int) -> list[float]:
    """Return the wall-clock seconds of a process, several times."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        found.append(time.perf_counter() - start)
        if done.returncode:
            raise RuntimeError(done.stderr)
    return found


def inside(arguments: Sequence[str], runs: int) -> tuple[list[float], bool]:
    """Return the seconds of a command after the imports, and whether transformers was imported."""
    found, imported = [], False
    for _ in range(runs):
        command = [sys.executable, "-c", INSIDE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took, heavy = done.stderr.split()[-2:]
        found.append(float(took))
        imported |= heavy == "True"
    return found, imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print, and save nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"bfloat16": Path(scratch) / "a", "float32": Path(scratch) / "b"}
        sizes = {
            name: make(folder, options.layers // (2 if name == "float32" else 1), getattr(torch, name))
            for name, folder in folders.items()
        }
        floor = statistics.median(seconds([sys.executable, "-c", TORCH], options.runs))
        for name, folder in folders.items():
            for verb in (["show"], ["show", "--modules"], ["check"]):
                arguments = [*verb, str(folder)]
                program = "from veneer.cli.main import main; main()"
                whole = seconds([sys.executable, "-c", program, *arguments], options.runs)
                own, heavy = inside(arguments, options.runs)
                rows.append(
                    {
                        "command": " ".join(verb),
                        "dtype": name,
                        "MB": round(sizes[name] / 1e6, 1),
                        "process s": round(statistics.median(whole), 3),
                        "import torch s": round(floor, 3),
                        "inside s": round(statistics.median(own), 3),
                        "transformers": heavy,
                    }
                )
    print(table(rows))
    if options.dry:
        print(json.dumps(circumstances(), indent=2))
    else:
        print(save("show_check", {"rows": rows, "runs": options.runs}))


if __name__ == "__main__":
    main()
