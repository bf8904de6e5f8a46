"""What does an adapted layer cost, kind by kind? Forward and backward in time and peak memory, Veneer against PEFT.

Rank 16, float32, the same weights, inputs and factors on both sides; the inputs ask for a gradient, as in the middle of
a model (ids cannot). Before anything is measured, both sides must give the same output and the same gradient of the
input (1e-4 of the largest value); a row where they do not says so. Each side lives in a process of its own; they take
turns of about a quarter of a second, so that all meet the same noise, and the best step counts. The bare layer, frozen,
takes part as the floor (but in attention: there torch multiplies batch by batch where the weight is frozen, which is
slower). Peak memory is what the layer holds and what one step adds to the resident memory, in a fresh process whose
malloc hands back what is freed.

PEFT runs at its strongest for training: adapters injected without its model wrapper, no dropout (its DoRA then uses the
base's output again), no autocast, `need_weights=False`; experts with each implementation of transformers that does not
copy a weight for every token. Its cache for DoRA acts in evaluation only, `low_cpu_mem_usage` on loading only. Where
PEFT has no such layer the peer is the bare layer, and for quantised weights it is Veneer on float32 weights. Two things
of PEFT's are evened out: it adds the update of an attention's out_proj twice, and its lora_A of a grouped convolution
sees all channels (it gets zeros where ours has nothing).

    python benchmarks/layers.py                        # all rows; writes results/layers.json
    python benchmarks/layers.py --only dora --repeats 12
    python benchmarks/layers.py --quick                # tiny sizes: does it run?
"""

import argparse
import gc
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.nn.attach import Attachment
from veneer.storage.quantise import quantise_model

sys.path.insert(0, str(Path(__file__).parent))
from common import bytes_held, peak_above, save, table

RANK, ALPHA, THREADS = 16, 32, 2
TOLERANCE = 1e-4
TURN_SECONDS, MOST_STEPS = 0.25, 100

Case = tuple[nn.Module, tuple[Tensor, ...]]
"""A model that holds what is adapted as `layer`, and its inputs."""


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Args:
        name: What it is called.
        case: Builds the model and its inputs.
        ours: Veneer's settings beside rank and alpha.
        theirs: PEFT's.
        peer: What Veneer is measured against: "peft", "bare" (the base layer) or "float32" (itself, unquantised).
        storage: How our weights are stored; empty for float32.
        at_most: The share of the peer's time that is asked for, or None.
    """

    name: str
    case: Callable[[], Case]
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    peer: str = "peft"
    storage: str = ""
    at_most: float | None = 1.0


def rows(s: int) -> tuple[Row, ...]:
    """Return all rows, every size divided by `s`."""
    dora: dict[str, Any] = {"ours": {"use_dora": True}, "theirs": {"use_dora": True}, "at_most": 0.7}
    stacks = {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]}
    both: dict[str, Any] = {"ours": stacks, "theirs": stacks, "at_most": 0.5}
    bare: dict[str, Any] = {"peer": "bare", "at_most": None}
    image, d, t = (8, 32 // s), 576 // s, 2048 // s  # batch and side, SmolLM2's width, tokens
    qkv = {"parts": {"layer": [[0, d], [2 * d, 3 * d]]}}
    small, square = partial(linear, d, 1536 // s), partial(linear, t, t)
    block = partial(llama_block, d, 1536 // s, 512 // s)
    kernel = partial(conv, nn.Conv2d, 64, 128, *image)
    return (
        Row("linear 576×1536, 2,048 tokens", partial(small, t)),
        Row("linear 2048×2048, 2,048 tokens", partial(square, t)),
        Row("transformers' Conv1D 576×1536", partial(transposed, d, 1536 // s, t), theirs={"fan_in_fan_out": True}),
        Row("embedding 49152×576, 2,048 ids", partial(embedding, 49152 // s, d, t)),
        Row("conv2d 64→128, 3×3, 32×32, batch 8", kernel),
        Row("conv2d 64→128, 1×1, 32×32, batch 8", partial(kernel, kernel_size=1)),
        Row("conv2d 64→128, 4 groups", partial(kernel, groups=4)),
        Row("conv1d 64→128, 3, 1024, batch 8", partial(conv, nn.Conv1d, 64, 128, 8, 1024 // s)),
        Row("conv3d 16→32, 3×3×3, 16³, batch 2", partial(conv, nn.Conv3d, 16, 32, 2, 16 // s)),
        Row("attention 512, 8 heads, 4 × 128", partial(attention, 512 // s, 8, 4, 128 // s)),
        Row("experts 8 × 512×1024, eager", partial(experts, "eager", 512 // s, 1024 // s, 512 // s), **both),
        Row("experts 8 × 512×1024, grouped", partial(experts, "grouped_mm", 512 // s, 1024 // s, 512 // s), **both),
        Row("DoRA linear 576×1536, 2,048 tokens", partial(small, t), **dora),
        Row("DoRA linear 576×1536, 256 tokens", partial(small, 256 // s), **dora),
        Row("DoRA linear 2048×2048, 2,048 tokens", partial(square, t), **dora),
        Row("DoRA linear 2048×2048, 256 tokens", partial(square, 256 // s), **dora),
        Row("DoRA conv2d 64→128, 3×3", kernel, **dora),
        Row("DoRA embedding 49152×576", partial(embedding, 49152 // s, d, t), **dora),
        Row("conv2d, circular padding", partial(kernel, padding_mode="circular"), **bare),
        Row("conv transpose2d 64→128, 3×3", partial(conv, nn.ConvTranspose2d, 64, 128, *image), **bare),
        Row("linear 576×1728, q and v as parts", partial(linear, d, 3 * d, t), ours=qkv, **bare),
        Row("int8 linear 576×1536", partial(small, t), peer="float32", storage="int8", at_most=1.1),
        Row("nf4 linear 576×1536", partial(small, t), peer="float32", storage="nf4", at_most=None),
        Row("int8 DoRA linear 576×1536", partial(small, t), {"use_dora": True}, {}, "float32", "int8", 1.1),
        Row("nf4 DoRA linear 576×1536", partial(small, t), {"use_dora": True}, {}, "float32", "nf4", None),
        Row("int8 Llama block", block, {"target_modules": "all-linear"}, {}, "float32", "int8", 1.1),
        Row("nf4 Llama block", block, {"target_modules": "all-linear"}, {}, "float32", "nf4", None),
    )


class Model(nn.Module):
    """Holds what is adapted as `layer`, and knows how a model would call it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self._call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.layer(*inputs) if self._call is None else self._call(self.layer, *inputs)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def linear(in_features: int, out_features: int, tokens: int) -> Case:
    return Model(nn.Linear(in_features, out_features)), (floats(tokens, in_features),)


def transposed(in_features: int, out_features: int, tokens: int) -> Case:
    return Model(Conv1D(out_features, in_features)), (floats(tokens, in_features),)


def embedding(entries: int, size: int, tokens: int) -> Case:
    return Model(nn.Embedding(entries, size)), (torch.randint(entries, (tokens,)),)


def conv(
    kind: Callable[..., nn.Module],
    channels_in: int,
    channels_out: int,
    batch: int,
    side: int,
    *,
    kernel_size: int = 3,
    **options: Any,
) -> Case:
    layer = kind(channels_in, channels_out, kernel_size, padding=kernel_size // 2, **options)
    axes = layer.get_parameter("weight").ndim - 2
    return Model(layer), (floats(batch, channels_in, *(side,) * axes),)


def attention(size: int, heads: int, batch: int, tokens: int) -> Case:
    layer = nn.MultiheadAttention(size, heads, batch_first=True)
    return Model(layer, lambda layer, x: layer(x, x, x, need_weights=False)[0]), (floats(batch, tokens, size),)


def experts(implementation: str, hidden: int, intermediate: int, tokens: int) -> Case:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=8)
    config._experts_implementation = implementation
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    weights_TK, index_TK = torch.randn(tokens, 8).softmax(1).topk(2)
    return Model(layer), (floats(tokens, hidden), index_TK, weights_TK)


def llama_block(hidden: int, intermediate: int, tokens: int) -> Case:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=32,
    )
    config.pad_token_id = None
    model = Model(LlamaModel(config), lambda layer, x: layer(inputs_embeds=x, use_cache=False).last_hidden_state)
    return model, (floats(4, tokens, hidden),)


def made(row: Row, side: str) -> Case:
    """Build one side of a row: the same weights, inputs and factors whichever it is."""
    torch.manual_seed(0)
    model, inputs = row.case()
    model.train().requires_grad_(False)
    if side == "veneer" and row.storage:
        quantise_model(model, row.storage)
    if side != "bare":
        config = veneer.LoRAConfig(rank=RANK, alpha=ALPHA, **{"target_modules": ["layer"], **row.ours})
        fill(veneer.attach(model, config))
    if side == "peft":
        adapter = veneer.detach(model)
        settings = {"target_modules": ["layer"], **row.theirs}
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **settings), model)
        fill_peft(model, adapter)
    return model, inputs


@torch.no_grad()
def fill(attachment: Attachment) -> None:
    """Give the factors values by which the update is about as large as the base's output."""
    for target in attachment.targets:
        slot = attachment.slot(target)
        fan_in = 1 if target.kind.form == "embedding" else target.in_features
        slot.lora_A.copy_(torch.randn(slot.lora_A.shape) / math.sqrt(fan_in))
        slot.lora_B.copy_(torch.randn(slot.lora_B.shape) / math.sqrt(RANK) / 4)
        if slot.magnitude is not None:
            slot.magnitude.mul_(1 + torch.randn(slot.magnitude.shape) / 8)


@torch.no_grad()
def fill_peft(model: nn.Module, adapter: veneer.Adapter) -> None:
    """Copy an adapter's factors into PEFT's layers, in PEFT's layout."""
    layers = {peft_path(name, one): one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    assert set(layers) == set(adapter.modules), (set(layers), set(adapter.modules))
    for path, pair in adapter.modules.items():
        layer, A, B = layers[path], pair.lora_A, pair.lora_B
        if pair.form == "embedding":
            parameters = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
        else:
            parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        if pair.form == "experts":
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        if pair.form == "attention_out":
            B = B / 2  # PEFT 0.21.2 adds the update of out_proj twice (huggingface/peft#3774, open)
        if A.shape != parameters[0].shape:
            A = over_all_groups(A, A.shape[0] // B.shape[1])
        for parameter, value in zip(parameters, (A, B), strict=True):
            assert parameter.shape == value.shape, (path, parameter.shape, value.shape)
            parameter.copy_(value)
        if pair.magnitude is not None:
            parameter = layer.lora_magnitude_vector["default"].get_parameter("weight")
            parameter.copy_(pair.magnitude.view(parameter.shape))


def peft_path(name: str, layer: LoraLayer) -> str:
    """Return the path by which Veneer knows what one of PEFT's layers adapts."""
    path = name.replace(".base_layer", "")
    if isinstance(layer, MultiheadAttention):
        return f"{path}.in_proj_weight"
    if isinstance(layer, ParamWrapper):
        return f"{path}.{layer.parameter_name}"
    return f"{path}.weight" if path.endswith("out_proj") else path


def over_all_groups(A: Tensor, groups: int) -> Tensor:
    """Spread a grouped kernel over all input channels: PEFT's lora_A sees them all, ours its own group's."""
    blocks = A.unflatten(0, (groups, -1))
    out = A.new_zeros(groups, blocks.shape[1], groups, *A.shape[1:])
    for group in range(groups):
        out[group, :, group] = blocks[group]
    return out.flatten(2, 3).flatten(0, 1)


class Side:
    """One side of a row, ready to step: forward, backward, no optimiser."""

    def __init__(self, row: Row, side: str) -> None:
        self.model, self.inputs = made(row, side)
        self.leaves = [one for one in (*self.model.parameters(), *self.inputs) if one.requires_grad]
        with torch.no_grad():
            shape = self.model(*self.inputs).shape
        self.gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def step(self) -> Tensor:
        """Forward and backward."""
        output = self.model(*self.inputs)
        if output.requires_grad:  # a bare embedding has no backward
            output.backward(self.gradient)
        return output.detach()

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        for leaf in self.leaves:
            leaf.grad = None

    def results(self) -> dict[str, Any]:
        """Return what both sides must agree on, as arrays, and whether the inputs got a gradient at all."""
        self.clear()
        found = {"output": self.step().numpy()}
        x = self.inputs[0]
        return found if x.grad is None else found | {"gradient of the input": x.grad.numpy()}

    def seconds(self, count: int) -> list[float]:
        """Return the times of some steps, after one that is not counted."""
        self.clear()
        self.step()
        gc.collect()
        gc.disable()
        found = []
        for _ in range(count):
            self.clear()
            start = time.perf_counter()
            self.step()
            found.append(time.perf_counter() - start)
        gc.enable()
        return found

    def memory(self) -> dict[str, int]:
        """Return the bytes of the model's tensors, and what a step adds at its peak."""
        peaks = []
        for _ in range(7):
            self.clear()
            peaks.append(peak_above(self.step))
        return {"held_bytes": bytes_held(self.model), "step_bytes": int(statistics.median(peaks[2:]))}


def serve(shrink: int, pipe: Connection) -> None:
    """Answer the parent: make a side of a row, give its results, time it, measure its memory."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    side: Side | None = None
    for question, argument in iter(pipe.recv, None):
        try:
            if question == "make":
                side = None  # the last one goes before the next one comes
                side = Side(rows(shrink)[argument[0]], argument[1])
                answer: Any = None
            elif side is not None:
                answer = side.seconds(argument) if question == "seconds" else getattr(side, question)()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


class Worker:
    """A process that serves."""

    def __init__(self, context: Any, shrink: int) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = context.Process(target=serve, args=(shrink, theirs), daemon=True)
        self.process.start()

    def ask(self, question: str, argument: Any = None) -> Any:
        """Return the answer.

        Raises:
            RuntimeError: If it is an error.
        """
        self.pipe.send((question, argument))
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest difference of two sides' results, as a share of the largest value."""
    assert one.keys() == other.keys()
    return max(float(abs(one[name] - other[name]).max() / abs(other[name]).max()) for name in one)


def timed(workers: Mapping[str, Worker], repeats: int) -> dict[str, list[float]]:
    """Return the best step of each turn, of each side; they take turns."""
    slowest = max(min(worker.ask("seconds", 2)) for worker in workers.values())
    count = min(MOST_STEPS, max(1, round(TURN_SECONDS / slowest)))
    found: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            found[name].append(min(worker.ask("seconds", count)))
    return found


def measured(index: int, row: Row, workers: Sequence[Worker], shrink: int, repeats: int) -> dict[str, Any]:
    """Measure one row; an error becomes part of the result."""
    names = dict.fromkeys(["veneer", row.peer, "bare"])  # each once
    sides = dict(zip(names, workers, strict=False))
    result: dict[str, Any] = {"row": row.name, "peer": row.peer, "asked_time_ratio": row.at_most}
    try:
        for name, worker in sides.items():
            worker.ask("make", (index, name))
        if row.peer != "bare":
            result["difference"] = difference(*(sides[name].ask("results") for name in ("veneer", row.peer)))
        seconds = timed(sides, repeats)
        context = multiprocessing.get_context("forkserver")
        for name in sides:
            result[name] = {"best_seconds": min(seconds[name]), "seconds": seconds[name]}
        for name in ("veneer", row.peer):
            fresh = Worker(context, shrink)
            fresh.ask("make", (index, name))
            memory = fresh.ask("memory")
            fresh.close()
            result[name] |= {"peak_bytes": memory["held_bytes"] + memory["step_bytes"], **memory}
    except RuntimeError as error:
        return result | {"error": str(error)}
    ours, theirs = result["veneer"], result[row.peer]
    for name, key in (("time", "best_seconds"), ("peak_memory", "peak_bytes"), ("step_memory", "step_bytes")):
        result[f"{name}_ratio"] = ours[key] / theirs[key] if theirs[key] else None  # tiny steps may take no page
    medians = [statistics.median(one["seconds"]) for one in (ours, theirs)]
    return result | {"median_time_ratio": medians[0] / medians[1], "remarks": remarks(row, result)}


def remarks(row: Row, result: Mapping[str, Any]) -> list[str]:
    """Return where a row falls short of what is asked."""
    found = []
    if row.peer == "peft" and result["difference"] > TOLERANCE:
        found.append(f"NOT THE SAME: differs by {result['difference']:.1e}")
    if row.storage:
        found.append(f"differs by {result['difference']:.1e}")
    if row.at_most is not None and result["time_ratio"] > row.at_most:
        found.append("time above")
    if row.peer == "peft" and result["peak_memory_ratio"] >= 1:
        found.append("memory not below")
    return found


def line(result: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of the printed table."""
    peer, asked = result["peer"], result["asked_time_ratio"]
    head = {"layer": result["row"]}
    names = ("bare", "Veneer", "peer", "time", "median", "asked", "Veneer MB", "peer MB", "memory", "step", "remarks")
    if "error" in result:
        return head | dict.fromkeys(names, "") | {"remarks": f"ERROR: {result['error'].splitlines()[0][:90]}"}
    sides = (result["veneer"], result[peer])
    times = [f"{one['best_seconds'] * 1e3:.2f} ms" for one in (result["bare"], *sides)]
    peaks = [f"{one['peak_bytes'] / 1e6:.1f}" for one in sides]
    keys = ("time_ratio", "median_time_ratio", "peak_memory_ratio", "step_memory_ratio")
    ratios = ["" if result[key] is None else f"{result[key]:.3f}" for key in keys]
    wanted = "" if asked is None else f"≤ {asked:g}"
    values = (*times, *ratios[:2], wanted, *peaks, *ratios[2:], ", ".join(result["remarks"]))
    return head | dict(zip(names, values, strict=True))


TITLES = {
    "peft": "Against PEFT",
    "bare": "Where PEFT has no such layer: against the bare layer",
    "float32": "Quantised weights: against float32 weights",
}


def report(results: Sequence[Mapping[str, Any]]) -> None:
    for peer, title in TITLES.items():
        lines = [line(one) for one in results if one["peer"] == peer]
        if lines:
            print(f"\n**{title}**\n\n{table(lines)}")
    print("\ntime, median: Veneer's share of the peer's best step, and of its median turn; MB: peak, layer and step;")
    print("memory, step: Veneer's share of the peer's peak, and of what the step adds to the layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows whose name holds one of these, in any case; not saved"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it runs; not saved")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each side")
    arguments = parser.parse_args()
    shrink = 8 if arguments.quick else 1
    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"something else runs here (load {load:.1f}): the figures will be wrong", file=sys.stderr)
    spawn = multiprocessing.get_context("spawn")
    workers = [Worker(spawn, shrink) for _ in range(3)]
    # From here on, for the processes that measure memory: what is freed goes back to the system at once.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["peft", "transformers", "veneer.nn.attach"])
    results = []
    for index, row in enumerate(rows(shrink)):
        if not arguments.only or any(part.lower() in row.name.lower() for part in arguments.only):
            start = time.perf_counter()
            results.append(measured(index, row, workers, shrink, arguments.repeats))
            print(f"{row.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for worker in workers:
        worker.close()
    report(results)
    if not (arguments.only or arguments.quick):
        path = save("layers", {"rank": RANK, "repeats": arguments.repeats, "load_before": load, "rows": results})
        print(f"\n{path}")


if __name__ == "__main__":
    main()
