"""Four adapters of rank 16 as one of rank 16, on the shapes of a 7B model: Veneer against PEFT.

    python benchmarks/combine.py [--divide N] [--layers N]

32 layers × (q, k, v, o: 4096 × 4096; gate, up: 11008 × 4096; down: 4096 × 11008), float32, weights 0.4, 0.3, 0.2, 0.1,
the same factors for both. PEFT's `add_weighted_adapter(combination_type="svd")` forms each update and decomposes it, as
it comes (full_matrices) and at its best (svd_full_matrices=False). Veneer combines all layers. PEFT would take hours:
it is measured on one module of each shape, in a process of its own, and its time is scaled up by their counts; its peak
is the largest of the three, without the model's weights, which PEFT needs in memory and Veneer does not.

Time is that of one call. Peak is the memory above what stood before it, the result included. Error is that of the
result against the weighted sum of the updates, dense and in float64, on one module of each shape, after the clock has
stopped. `--divide` makes all sizes smaller, to try the script; nothing is saved then.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings

import torch
from common import peak_above, save, table
from torch import Tensor, nn

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.tools.combine import combine

SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
"""Module to (out, in)."""
RANK, WEIGHTS, DECAY = 16, (0.4, 0.3, 0.2, 0.1), 0.8
AIMS = {"times faster than PEFT": 200.0, "share of PEFT's peak": 0.1}
BEST, AS_IT_COMES = "PEFT svd, svd_full_matrices=False", "PEFT svd"


def factors(path: str, shape: tuple[int, int], adapter: int) -> tuple[Tensor, Tensor]:
    """A and B with a spectrum that falls, the same for both contestants."""
    generator = torch.Generator().manual_seed(sum(path.encode()) * 10 + adapter)
    falls = DECAY ** torch.arange(RANK)
    A = torch.randn(RANK, shape[1], generator=generator) / shape[1] ** 0.5
    return A, torch.randn(shape[0], RANK, generator=generator) / shape[0] ** 0.5 * falls


def distance(path: str, shape: tuple[int, int], A: Tensor, B: Tensor, scaling: float) -> float:
    """Relative error of a result against the weighted sum, dense, in float64."""
    meant = torch.zeros(shape, dtype=torch.float64)
    for adapter, weight in enumerate(WEIGHTS):
        A_i, B_i = factors(path, shape, adapter)
        meant.addmm_(B_i.double(), A_i.double(), alpha=weight)
    norm = meant.norm()
    return (meant.addmm_(B.double(), A.double(), alpha=-scaling).norm() / norm).item()


def measured(work) -> tuple[float, int]:
    seconds = []

    def timed() -> None:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)

    peak = peak_above(timed)
    return seconds[0], peak


def veneer(layers: int, divide: int) -> dict[str, object]:
    shapes = {path: (out // divide, inputs // divide) for path, (out, inputs) in SHAPES.items()}
    modules = {f"layers.{layer}.{path}": shape for layer in range(layers) for path, shape in shapes.items()}
    config = LoRAConfig(rank=RANK, alpha=RANK, target_modules=[path.rpartition(".")[2] for path in SHAPES])
    adapters = [
        Adapter({path: LowRank(*factors(path, shape, one), 1.0) for path, shape in modules.items()}, config)
        for one in range(len(WEIGHTS))
    ]
    made = []
    seconds, peak = measured(lambda: made.append(combine(adapters, WEIGHTS, rank=RANK)))
    found = made[0].adapter
    one_of_each = {shape: path for path, shape in modules.items() if path.startswith("layers.0.")}
    errors = []
    for shape, path in one_of_each.items():
        pair = found.modules[path]
        errors.append(distance(path, shape, pair.lora_A, pair.lora_B, pair.scaling))
    told = made[0].total.error
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "result_bytes": found.num_bytes,
        "worst_error": max(errors),
        "told_error": told,
    }


def peft(path: str, divide: int, full_matrices: bool) -> dict[str, object]:
    from peft import LoraConfig, get_peft_model

    shape = (SHAPES[path][0] // divide, SHAPES[path][1] // divide)
    key = f"layers.0.{path}"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Memory that nobody writes: the base's weight has no part in this.
            self.layer = nn.Linear(shape[1], shape[0], bias=False, device="meta").to_empty(device="cpu")

    warnings.simplefilter("ignore")
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
    model = get_peft_model(Model(), settings, "0")
    for one in range(1, len(WEIGHTS)):
        model.add_adapter(str(one), settings)
    layer = model.base_model.model.layer
    for one in range(len(WEIGHTS)):
        A, B = factors(key, shape, one)
        layer.lora_A[str(one)].weight.data, layer.lora_B[str(one)].weight.data = A, B
    names = [str(one) for one in range(len(WEIGHTS))]
    seconds, peak = measured(
        lambda: model.add_weighted_adapter(
            names, list(WEIGHTS), "all", combination_type="svd", svd_rank=RANK, svd_full_matrices=full_matrices
        )
    )
    A, B = layer.lora_A["all"].weight.data, layer.lora_B["all"].weight.data
    error = distance(key, shape, A, B, layer.scaling["all"])
    return {"seconds": seconds, "peak_bytes": peak, "worst_error": error}


def in_a_process(*arguments: object) -> dict[str, float]:
    """Run a contestant where malloc hands back what is freed, and nothing else was."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peft_scaled(layers: int, divide: int, full_matrices: bool) -> dict[str, object]:
    one_of_each = {shape: path for path, shape in SHAPES.items()}
    counts = {shape: layers * list(SHAPES.values()).count(shape) for shape in one_of_each}
    each = {shape: in_a_process("peft", path, divide, full_matrices) for shape, path in one_of_each.items()}
    return {
        "seconds": sum(counts[shape] * one["seconds"] for shape, one in each.items()),
        "peak_bytes": max(one["peak_bytes"] for one in each.values()),
        "worst_error": max(one["worst_error"] for one in each.values()),
        "of_each_shape": [{"shape": shape, "count": counts[shape], **one} for shape, one in each.items()],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--one", type=json.loads)
    given = parser.parse_args()
    if given.one:
        name, *rest = given.one
        print(json.dumps({"veneer": veneer, "peft": peft}[name](*rest)))
        return
    found = {
        "Veneer combine": in_a_process("veneer", given.layers, given.divide),
        BEST: peft_scaled(given.layers, given.divide, False),
        AS_IT_COMES: peft_scaled(given.layers, given.divide, True),
    }
    ours, reached = found["Veneer combine"], {}
    for peer in (BEST, AS_IT_COMES):
        theirs = found[peer]
        reached[peer] = {
            "times faster": theirs["seconds"] / ours["seconds"],
            "share of its peak": ours["peak_bytes"] / theirs["peak_bytes"],
            "error no larger": ours["worst_error"] <= theirs["worst_error"],
        }
    rows = [
        {
            "combine, 4 × rank 16 → 16": name,
            "seconds": f"{one['seconds']:,.1f}" + (" (3 modules, scaled up)" if "of_each_shape" in one else ""),
            "peak above the inputs, MB": f"{one['peak_bytes'] / 1e6:,.0f}",
            "worst relative error": f"{one['worst_error']:.9f}",
        }
        for name, one in found.items()
    ]
    print(table(rows))
    print(json.dumps(reached, indent=2))
    if given.divide == 1 and given.layers == 32:
        print(save("combine", {"aims": AIMS, "reached": reached, "results": found}))


if __name__ == "__main__":
    main()
