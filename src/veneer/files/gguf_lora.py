"""LoRA adapters in GGUF, as llama.cpp loads them.

    layer          tensors behind GGUF's name T of the weight          shapes, the slowest axis first
    linear         T.lora_a, T.lora_b                                  (R, I), (O, R)
    token_embd     T.lora_a, T.lora_b                                  (N, R), (D, R)
    experts        ffn_gate_exps, ffn_up_exps, ffn_down_exps           (E, R, I), (E, O, R)

The scaling is alpha / R with the rank of each tensor and one alpha for the file; alpha 0 stands for a scaling of 1.
Names are llama.cpp's for the architecture; where it puts the rows of queries and keys in pairs (the llama family),
lora_b has them so too. Both need the base: its configuration, and the names and shapes of its tensors.

Source: llama.cpp of llama-cpp-python 0.3.36, `src/llama-adapter.cpp`, `convert_lora_to_gguf.py`, `conversion/*.py`
(research: peft-format.md 18). Its converter loses rsLoRA and `alpha_pattern`, and transposes the factors of GPT-2; both
come out right here.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.files.filesystem import REAL, Content
from veneer.files.foreign import foreign_adapter, refuse, unfit
from veneer.files.format import Format, Hints, Sight
from veneer.files.gguf_container import dump_gguf, gguf_package, parse_gguf
from veneer.files.rotary import Heads, heads_of, reordered
from veneer.files.shards import Checkpoint
from veneer.files.tensors import MAX_FILE, non_finite
from veneer.files.translate import (
    DOWN,
    GATE,
    GATE_UP,
    UP,
    at_scaling,
    join_gate_up,
    matrix_form,
    pair_problem,
    rank_problem,
    split_gate_up,
)
from veneer.names import did_you_mean

FILE = "lora.gguf"

_PROGRAM = "llama.cpp"
_ARCHITECTURE, _TYPE, _ADAPTER_TYPE = "general.architecture", "general.type", "adapter.type"
_ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_TABLE, _HEAD = "token_embd.weight", "lm_head"
_EXPERTS = "experts"


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a family of models.

    Args:
        architecture: Its name for it, of `gguf.MODEL_ARCH_NAMES`.
        pairs: Whether the rows of queries and keys are put in pairs.
        root: What the paths of modules begin with, where a checkpoint's names may lack it.
        norm_shift: What is added to the weights of norms.
        transposed: Layers whose weights lie the other way round, as transformers' Conv1D has them.
        ties: Whether a configuration that says nothing about it ties head and table.
        has_head: Whether it takes a head beside the table.
    """

    architecture: str
    pairs: bool = False
    root: str = ""
    norm_shift: float = 0.0
    transposed: tuple[str, ...] = ()
    ties: bool = False
    has_head: bool = True


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "mixtral": Family("llama", pairs=True),
    "smollm3": Family("smollm3", pairs=True, ties=True),
    "granite": Family("granite", pairs=True),
    "arcee": Family("arcee", pairs=True),
    "olmo2": Family("olmo2"),
    "olmoe": Family("olmoe"),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
    "gemma": Family("gemma", norm_shift=1.0, ties=True, has_head=False),
    "gemma2": Family("gemma2", norm_shift=1.0, ties=True, has_head=False),
    "gemma3_text": Family("gemma3", norm_shift=1.0, ties=True),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2", root="transformer.", transposed=("c_attn", "c_proj", "c_fc"), ties=True),
}
"""Families by transformers' `model_type`, proved by the logits of llama.cpp itself (tests/parity/test_gguf_lora.py);
gemma3_text alone is taken from its converter's source."""


def _recognise(sight: Sight) -> bool:
    return sight.path.suffix == ".gguf"


def read_gguf_lora(path: str | Path, hints: Hints | None = None) -> Adapter:
    """Read a LoRA adapter that llama.cpp loads.

    Args:
        path: The file.
        hints: `base`, without which names and the order of rows are not known.

    Raises:
        AdapterError: If it is no such file, does not fit the base, or a tensor is not used.
        MissingDependencyError: If the `gguf` package is not installed, which holds the names.

    Example:
        read_gguf_lora("lora.gguf", Hints(base=read_checkpoint("models/smollm2"))).config.rank
    """
    path, where = Path(path), str(path)
    try:
        held = parse_gguf(REAL.read_bytes(path, MAX_FILE), where)
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    base, family = _family(hints, where)
    alpha, tokens = _settings(held.fields, family, where)
    names = _names_back(base, family)
    parts, problems = _sort(held.tensors, names)
    heads = heads_of(base.config, str(base.folder)) if family.pairs else None
    modules: dict[str, LowRank] = {}
    for module, (name, A, B) in parts.items():
        try:
            modules[module] = _read_pair(module, name, A, B, alpha, base, heads)
        except AdapterError as error:
            problems.append(error.message if error.message.startswith(module) else f"{module}: {error.message}")
    try:
        modules = _joined(modules)
    except AdapterError as error:
        problems.append(error.message)
    if not parts and not problems:
        problems.append("it holds no factors")
    refuse(where, "cannot be read as an adapter of the base", problems)
    return foreign_adapter(modules, settings={"invocation_tokens": tokens})


def write_gguf_lora(adapter: Adapter, hints: Hints | None = None) -> dict[str, Content]:
    """Return the GGUF file that llama.cpp loads to do what an adapter does.

    Where one alpha gives every module its scaling it is written; otherwise scalings are put into lora_b, and alpha
    is 0.

    Args:
        adapter: The adapter.
        hints: `base`, without which names and the order of rows are not known.

    Raises:
        AdapterError: If llama.cpp has no place for something, all at once.
        MissingDependencyError: If the `gguf` package is not installed, which holds the names.

    Example:
        write_gguf_lora(load_adapter("mine"), Hints(base=read_checkpoint("models/smollm2")))["lora.gguf"]
    """
    problems = unfit(adapter, ("linear", "transposed", "embedding", "experts"), _PROGRAM, invocation=True)
    problems += non_finite(adapter.tensors())
    modules, more = _parted(adapter.modules)
    problems += more
    if not modules:
        problems.append("there is no adapted module")
    try:
        base, family = _family(hints, "the adapter")
    except AdapterError as error:
        raise AdapterError(error.message, problems) from None
    names, more = _names_for(modules, base, family)
    problems += more
    refuse("the adapter", f"{_PROGRAM} cannot carry it", problems)
    heads = heads_of(base.config, str(base.folder)) if family.pairs else None
    alpha = _common_alpha(modules)
    tensors: dict[str, Tensor] = {}
    for path, pair in modules.items():
        even = replace(pair, frozen_rank=0) if alpha else at_scaling(replace(pair, frozen_rank=0), 1.0)
        if heads is not None and even.form == "linear":
            even = reordered(path, even, heads, pairs=True)
        A, B = (even.lora_A.T if names[path] == _TABLE else even.lora_A), even.lora_B
        if A.dtype == torch.float64:  # ggml multiplies none
            A, B = A.float(), B.float()
        tensors |= {f"{names[path]}.lora_a": A, f"{names[path]}.lora_b": B}
    fields: dict[str, str | float | tuple[int, ...]] = {
        _ARCHITECTURE: family.architecture,
        _TYPE: "adapter",
        _ADAPTER_TYPE: "lora",
        _ALPHA: alpha,
    }
    if adapter.config.invocation_tokens:
        fields[_TOKENS] = adapter.config.invocation_tokens
    return {FILE: dump_gguf(fields, tensors)}


FORMAT = Format(
    "gguf",
    "GGUF LoRA for llama.cpp",
    _recognise,
    read_gguf_lora,
    write_gguf_lora,
    file=FILE,
    needs=("--base BASE",),
)


def _family(hints: Hints | None, where: str) -> tuple[Checkpoint, Family]:
    """Return the base, and how llama.cpp has its family."""
    base = hints.base if hints is not None else None
    if base is None:
        raise AdapterError(f"{where}: GGUF's names and the order of its rows depend on the base; give it: --base")
    return base, family_of(base)


def family_of(base: Checkpoint) -> Family:
    """Return how llama.cpp has the family of a base.

    Raises:
        AdapterError: If that is not known.

    Example:
        family_of(read_checkpoint("models/llama")).architecture
    """
    kind = str(base.config.get("model_type"))
    if kind not in FAMILIES:
        raise AdapterError(
            f"{base.folder}: expected a model_type of which it is known how {_PROGRAM} has it, one of"
            f" {', '.join(sorted(FAMILIES))}; got {kind[:80]!r}{did_you_mean(kind, FAMILIES)}"
        )
    return FAMILIES[kind]


def _settings(fields: Mapping[str, Any], family: Family, where: str) -> tuple[float, tuple[int, ...]]:
    """Return alpha and the invocation tokens that a file's fields say."""
    problems = [
        f"{key}: expected {expected!r}, got {str(fields.get(key))[:80]!r}"
        for key, expected in ((_TYPE, "adapter"), (_ADAPTER_TYPE, "lora"), (_ARCHITECTURE, family.architecture))
        if fields.get(key) != expected
    ]
    alpha, tokens = fields.get(_ALPHA, 0.0), fields.get(_TOKENS, ())
    if type(alpha) is not float or not 0 <= alpha < math.inf:
        problems.append(f"{_ALPHA}: expected a float32 from 0, got {str(alpha)[:80]}")
    if type(tokens) is not tuple or any(type(one) is not int or one < 0 for one in tokens):
        problems.append(f"{_TOKENS}: expected an array of token ids, got {str(tokens)[:80]}")
    refuse(where, "not a LoRA adapter of this base", problems)
    return alpha, tokens


def name_map(base: Checkpoint, family: Family) -> Any:
    """Return gguf's map from transformers' names to its own, for the layers that a base has.

    Raises:
        AdapterError: If its configuration does not say how many there are.
        MissingDependencyError: If the `gguf` package is not installed.

    Example:
        name_map(base, family_of(base)).get_name("lm_head.weight", (".weight",))
    """
    gguf = gguf_package()
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(architecture, _num_blocks(base))


def _num_blocks(base: Checkpoint) -> int:
    count = base.config.get("num_hidden_layers", base.config.get("n_layer"))
    if type(count) is not int or not 1 <= count <= 1000:
        raise AdapterError(f"{base.folder}: config.json says no num_hidden_layers, got {str(count)[:80]}")
    return count


def _names_for(modules: Mapping[str, LowRank], base: Checkpoint, family: Family) -> tuple[dict[str, str], list[str]]:
    """Return GGUF's name of each module's weight, and the modules that have none or do not fit the base."""
    known, names, problems = name_map(base, family), {}, []
    tied = bool(base.config.get("tie_word_embeddings")) or f"{_HEAD}.weight" not in base.tensors
    for path, pair in modules.items():
        name = known.get_name(f"{path}.weight", (".weight",))
        if name is None:
            problems.append(f"{path}: {_PROGRAM} has no such weight in architecture {family.architecture!r}")
        elif path == _HEAD and tied:
            problems.append(f"{path}: the base's head is its embedding table, which {_PROGRAM} has once")
        elif (pair.form == "embedding") != (name == _TABLE):
            problems.append(f"{path}: {_PROGRAM} adapts the token embedding as a table, and no other one")
        elif name == _TABLE and tied:
            problems.append(f"{path}: {_PROGRAM} would apply it to the tied head too, and stop the process there")
        else:
            names[path] = name
        if pair.form != "experts":
            try:
                matrix_form(path, pair.sizes, base)
            except AdapterError as error:
                problems.append(error.message)
    return names, problems


def _names_back(base: Checkpoint, family: Family) -> dict[str, str]:
    """Return the module of each of GGUF's names that the base has, experts' stacks included."""
    known = name_map(base, family)
    paths = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    paths = [path if path.startswith(family.root) else f"{family.root}{path}" for path in paths]
    found = {}
    for path in paths:
        name = known.get_name(f"{path}.weight", (".weight",))
        if name is not None:
            found[name] = path
    for block in range(_num_blocks(base)):
        for leaf in (GATE, UP, DOWN):
            path = f"model.layers.{block}.mlp.experts.{leaf}"
            name = known.get_name(f"{path}.weight", (".weight",))
            if name is not None:
                found[name] = path
    return found


def _sort(
    tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, tuple[str, Tensor, Tensor]], list[str]]:
    """Return each module's name in GGUF and its factors, and the tensors that are not used."""
    sides: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".")
        if side not in ("lora_a", "lora_b"):
            what = f", which {_PROGRAM} leaves out silently" if key.endswith("_norm.weight") else ""
            problems.append(f"{key[:80]!r}: expected a name that ends in .lora_a or .lora_b{what}")
        elif name not in names:
            problems.append(f"{key[:80]!r}: the base has no such weight{did_you_mean(name[:80], names)}")
        else:
            sides.setdefault(name, {})[side] = tensor
    problems += [f"{name}: {next(iter(one))} without the other factor" for name, one in sides.items() if len(one) == 1]
    return {names[name]: (name, one["lora_a"], one["lora_b"]) for name, one in sides.items() if len(one) == 2}, problems


def _read_pair(
    path: str, name: str, A: Tensor, B: Tensor, alpha: float, base: Checkpoint, heads: Heads | None
) -> LowRank:
    stacked = path.rpartition(".")[0].endswith(_EXPERTS)
    if A.dtype != B.dtype:  # llama.cpp takes any two
        A, B = A.float(), B.float()
    if problem := pair_problem(A, B, 3 if stacked else 2) or rank_problem(B.shape[-1]):
        raise AdapterError(f"{path}: {problem}")
    scaling = alpha / B.shape[-1] if alpha else 1.0
    if stacked:
        return LowRank(A, B, scaling, "experts")
    if name == _TABLE:
        A = A.T
    form = matrix_form(path, (B.shape[0], A.shape[1]), base)
    pair = LowRank(A, B, scaling, form)
    return reordered(path, pair, heads, pairs=False) if heads is not None and form == "linear" else pair


def _parted(modules: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], list[str]]:
    """Return the modules with gate and up projections of experts apart, as GGUF has them."""
    named: dict[str, LowRank] = {}
    problems = []
    for path, pair in modules.items():
        owner, _, leaf = path.rpartition(".")
        if pair.form == "experts" and leaf == GATE_UP:
            try:
                named[f"{owner}.{GATE}"], named[f"{owner}.{UP}"] = split_gate_up(pair, path)
            except AdapterError as error:
                problems.append(error.message)
        else:
            named[path] = pair
    return named, problems


def _joined(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return the modules with gate and up projections of experts in one, as transformers has them."""
    named: dict[str, LowRank] = {}
    halves: dict[str, dict[str, LowRank]] = {}
    for path, pair in modules.items():
        owner, _, leaf = path.rpartition(".")
        if pair.form == "experts" and leaf in (GATE, UP):
            halves.setdefault(owner, {})[leaf] = pair
        else:
            named[path] = pair
    for owner, found in halves.items():
        named[f"{owner}.{GATE_UP}"] = join_gate_up(found.get(GATE), found.get(UP), owner)
    return named


def _common_alpha(modules: Mapping[str, LowRank]) -> float:
    """Return the alpha, exact in float32, that gives every module its scaling; 0 if there is none."""
    alphas = {pair.scaling * pair.rank for pair in modules.values()}
    alpha = alphas.pop()
    fits = not alphas and all(alpha / pair.rank == pair.scaling for pair in modules.values())
    try:
        return alpha if fits and struct.unpack("<f", struct.pack("<f", alpha))[0] == alpha else 0.0
    except OverflowError:
        return 0.0
