"""Adapters in mlx-lm's layout: `adapters.safetensors` and an `adapter_config.json` of its own.

    layer         tensors behind its path P                     update of the weight
    Linear        lora_a (I, R), lora_b (R, O)                  scale · (lora_a · lora_b)ᵀ
    Embedding     lora_a (N, R), lora_b (R, D)                  scale · lora_a · lora_b
    SwitchLinear  lora_a (E, R, I), lora_b (E, O, R)            scale · lora_b · lora_a, for each expert
    DoRA          m (O,) besides                                m / ‖W + update‖ for each row

One file has one rank, one scale, and magnitudes for all layers or none; there is no alpha. Experts have a projection
for gate and up each, where transformers has one parameter for both.

Source: mlx-lm 0.32.2, `tuner/lora.py`, `tuner/dora.py`, `tuner/utils.py` (research: peft-format.md 15).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.errors import AdapterError
from veneer.files.filesystem import REAL, Content
from veneer.files.foreign import foreign_adapter, refuse, unfit
from veneer.files.format import Format, Hints, Sight
from veneer.files.peft_folder import CONFIG, MAX_CONFIG
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import MAX_FILE, dump_tensors, non_finite, parse_tensors
from veneer.files.translate import (
    DOWN,
    GATE,
    GATE_UP,
    UP,
    at_rank,
    at_scaling,
    common_scaling,
    join_gate_up,
    matrix_form,
    pair_problem,
    path_problem,
    rank_problem,
    split_gate_up,
)
from veneer.names import did_you_mean, layer_index

TENSORS = "adapters.safetensors"

_PROGRAM = "mlx-lm"
_KEY = re.compile(r"(?P<path>.+)\.(?P<leaf>lora_a|lora_b|m)")
_LEAVES = ("lora_a", "lora_b", "m")
_SWITCH, _EXPERTS = "switch_mlp", "experts"
_ROOTS = {"gpt2": ("transformer.", "model.")}
"""Model types whose modules have another root in mlx-lm: transformers' and its own."""
_OWN_EXPERTS = ("gpt_oss", "llama4_text")
"""Model types whose experts lie another way in transformers than gate before up."""


def _recognise(sight: Sight) -> bool:
    return TENSORS in sight.files or ("lora_parameters" in sight.config and "peft_type" not in sight.config)


def read_mlx(folder: str | Path, hints: Hints | None = None) -> Adapter:
    """Read an adapter that mlx-lm wrote.

    Args:
        folder: The folder.
        hints: With `base`, square matrices of tables and of Conv1D are told apart by it, and shapes are checked.

    Raises:
        AdapterError: If a tensor is not used, a rank is not what the configuration says, or it is no LoRA or DoRA.

    Example:
        read_mlx("mlx_adapters").config.rank
    """
    folder, hints = Path(folder), hints or Hints()
    raw, where = _read_config(folder), f"{folder / TENSORS}"
    tensors = _read_tensors(folder)
    fine_tune_type, rank, scale, dropout = _settings(raw, f"{folder / CONFIG}")
    parts, problems = _sort(tensors)
    roots = _ROOTS.get(_model_type(hints), ("", ""))[::-1]
    modules: dict[str, LowRank] = {}
    for path, found in parts.items():
        try:
            pair = _read_pair(_moved(path, *roots), found, scale, hints)
        except AdapterError as error:
            problems += error.problems or [error.message if path in error.message else f"{path}: {error.message}"]
            continue
        if pair.rank != rank:
            problems.append(f"{path}: expected rank {rank}, as lora_parameters says, got {pair.rank}")
        modules[_moved(path, *roots)] = pair
    if fine_tune_type == "dora":
        problems += [f"{path}: fine_tune_type is 'dora', but there is no m" for path in _without_magnitude(modules)]
    else:
        problems += [
            f"{path}: there is an m (DoRA), but fine_tune_type is 'lora'" for path in parts if "m" in parts[path]
        ]
    refuse(where, f"its tensors are not what {CONFIG} says", problems)
    if not modules:
        raise AdapterError(f"{where}: holds no factors; expected keys that end in .lora_a and .lora_b")
    base = raw.get("model")
    metadata = AdapterMetadata(base=base if isinstance(base, str) else None)
    return foreign_adapter(_from_switches(modules, hints), metadata=metadata, settings={"dropout": dropout})


def write_mlx(adapter: Adapter, hints: Hints | None = None) -> dict[str, Content]:
    """Return the files that mlx-lm loads to do what an adapter does.

    Scalings that differ are put into lora_b, ranks that differ are filled with zeros; `keys` name each layer by its
    whole path, so that no other layer becomes one of LoRA.

    Args:
        adapter: The adapter.
        hints: Only `base` is looked at: the family decides where its experts lie, and what GPT-2's layers are called.

    Raises:
        AdapterError: If mlx-lm has no place for something, all at once.

    Example:
        >>> pair = LowRank(torch.zeros(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> sorted(write_mlx(foreign_adapter({"model.layers.0.self_attn.q_proj": pair})))
        ['adapter_config.json', 'adapters.safetensors']
    """
    hints = hints or Hints()
    problems = unfit(adapter, ("linear", "transposed", "embedding", "experts"), _PROGRAM, dora=("linear", "transposed"))
    modules, more = _to_switches(adapter.modules, hints)
    problems += more
    magnitudes = [path for path, pair in modules.items() if pair.magnitude is not None]
    if magnitudes and len(magnitudes) != len(modules):
        problems += [
            f"{path}: has no magnitude, others have: {_PROGRAM} has DoRA in all layers or in none"
            for path in _without_magnitude(modules)
        ]
    if not modules:
        problems.append("there is no adapted module")
    problems += non_finite(adapter.tensors())
    refuse("the adapter", f"{_PROGRAM}'s layout cannot carry it", problems)
    rank, scale = max(pair.rank for pair in modules.values()), common_scaling(modules)
    tensors: dict[str, Tensor] = {}
    for path, pair in modules.items():
        tensors |= _write_pair(path, at_rank(at_scaling(pair, scale), rank))
    layers = {layer_index(path) for path in modules} - {None}
    raw = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": max(1, len(layers)),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.config.dropout,
            "keys": sorted(modules),
        },
    }
    if adapter.metadata.base is not None:
        raw["model"] = adapter.metadata.base
    return {CONFIG: dump_json(raw), TENSORS: dump_tensors(tensors)}


FORMAT = Format("mlx", "mlx-lm", _recognise, read_mlx, write_mlx)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        raw = parse_json(REAL.read_bytes(path, MAX_CONFIG), str(path), max_bytes=MAX_CONFIG)
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    try:
        return parse_tensors(REAL.read_bytes(path, MAX_FILE), str(path))
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause


def _settings(raw: Mapping[str, Any], where: str) -> tuple[str, int, float, float]:
    """Return the kind of training, rank, scale and dropout."""
    problems = []
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{where}: expected fine_tune_type 'lora' or 'dora', got {str(kind)[:80]!r}; whole weights are no adapter:"
            " extract one from the two checkpoints"
        )
    if not isinstance(parameters, dict):
        raise AdapterError(f"{where}: expected lora_parameters, an object of rank, scale and dropout")
    known = ("rank", "scale", "dropout", "keys")
    problems += [f"lora_parameters.{key}: unknown{did_you_mean(key, known)}" for key in parameters if key not in known]
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    if type(rank) is not int or rank_problem(rank):
        problems.append(f"lora_parameters.rank: expected a whole number from 1, got {str(rank)[:80]}")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < float("inf"):
        problems.append(f"lora_parameters.scale: expected a positive, finite number, got {str(scale)[:80]}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        problems.append(f"lora_parameters.dropout: expected a number from 0 to below 1, got {str(dropout)[:80]}")
    refuse(where, "cannot be read exactly as it is meant", problems)
    return kind, int(rank), float(scale), float(dropout)  # type: ignore[arg-type]


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return each module's tensors by leaf, and the keys that are none."""
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            leaf = key.rpartition(".")[2]
            problems.append(f"{key!r}: expected a key that ends in {', '.join(_LEAVES)}{did_you_mean(leaf, _LEAVES)}")
        elif problem := path_problem(found["path"]):
            problems.append(f"{key!r}: {problem}")
        else:
            parts.setdefault(found["path"], {})[found["leaf"]] = tensor
    for path, one in parts.items():
        problems += [f"{path}: lacks {leaf}" for leaf in _LEAVES[:2] if leaf not in one]
    return {path: one for path, one in parts.items() if {"lora_a", "lora_b"} <= set(one)}, problems


def _read_pair(path: str, parts: Mapping[str, Tensor], scale: float, hints: Hints) -> LowRank:
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if problem := pair_problem(a, b, 3 if a.ndim == 3 else 2):
        raise AdapterError(f"{path}: {problem}")
    if a.ndim == 3:
        if m is not None:
            raise AdapterError(f"{path}: experts with an m (DoRA), which mlx-lm itself does not have")
        return LowRank(a, b, scale, "experts")
    A, B = a.T, b.T
    form = matrix_form(path, (B.shape[0], A.shape[1]), hints.base)
    if m is not None and form == "embedding":
        raise AdapterError(f"{path}: an embedding's m is a norm for each token in mlx-lm, for each column in PEFT")
    return LowRank(A, B, scale, form, m)


def _write_pair(path: str, pair: LowRank) -> dict[str, Tensor]:
    A, B = pair.lora_A, pair.lora_B
    if A.dtype == torch.float64:  # mlx has none
        A, B = A.float(), B.float()
    if pair.form == "experts":
        return {f"{path}.lora_a": A, f"{path}.lora_b": B}
    named = {f"{path}.lora_a": A.T, f"{path}.lora_b": B.T}
    if pair.magnitude is not None:
        named[f"{path}.m"] = pair.magnitude.float() if pair.magnitude.dtype == torch.float64 else pair.magnitude
    return named


def _without_magnitude(modules: Mapping[str, LowRank]) -> list[str]:
    return [path for path, pair in modules.items() if pair.magnitude is None]


def _model_type(hints: Hints) -> str:
    return str(hints.base.config.get("model_type", "")) if hints.base is not None else ""


def _from_switches(modules: Mapping[str, LowRank], hints: Hints) -> dict[str, LowRank]:
    """Return the modules with experts as transformers names and joins them."""
    named: dict[str, LowRank] = {}
    switches: dict[str, dict[str, LowRank]] = {}
    for path, pair in modules.items():
        if pair.form == "experts":
            owner, _, leaf = path.rpartition(".")
            switches.setdefault(owner, {})[leaf] = pair
        else:
            named[path] = pair
    problems = []
    if switches and _model_type(hints) in _OWN_EXPERTS:
        problems.append(f"the experts of {_model_type(hints)} lie another way in transformers; they are not converted")
    for owner, pairs in switches.items():
        parent, _, last = owner.rpartition(".")
        if last != _SWITCH or not set(pairs) <= {GATE, UP, DOWN}:
            known = f"expected {_SWITCH} with {GATE}, {UP} and {DOWN}"
            problems.append(f"{owner}: experts of {', '.join(sorted(pairs))}; {known}")
            continue
        if _model_type(hints) == "mixtral":
            parent = re.sub(r"(^|\.)block_sparse_moe$", r"\1mlp", parent)
        place = f"{parent}.{_EXPERTS}"
        if DOWN in pairs:
            named[f"{place}.{DOWN}"] = pairs[DOWN]
        if GATE in pairs or UP in pairs:
            named[f"{place}.{GATE_UP}"] = join_gate_up(pairs.get(GATE), pairs.get(UP), place)
    refuse("the adapter's experts", "cannot be named as transformers does", problems)
    return named


def _to_switches(modules: Mapping[str, LowRank], hints: Hints) -> tuple[dict[str, LowRank], list[str]]:
    """Return the modules with experts as mlx-lm names and parts them, and what it has no place for."""
    named: dict[str, LowRank] = {}
    problems = []
    kind = _model_type(hints)
    for path, pair in modules.items():
        if pair.form != "experts":
            if re.search(rf"\.{_EXPERTS}\.\d+\.", path):
                problems.append(f"{path}: a matrix of one expert; {_PROGRAM} has the stack of all")
            named[path] = pair
            continue
        owner, _, leaf = path.rpartition(".")
        parent, _, last = owner.rpartition(".")
        if last != _EXPERTS or leaf not in (GATE_UP, DOWN) or kind in _OWN_EXPERTS:
            problems.append(f"{path}: how {_PROGRAM} names and parts these experts is not known")
            continue
        if kind == "mixtral":
            parent = re.sub(r"(^|\.)mlp$", r"\1block_sparse_moe", parent)
        place = f"{parent}.{_SWITCH}"
        if leaf == DOWN:
            named[f"{place}.{DOWN}"] = pair
            continue
        try:
            named[f"{place}.{GATE}"], named[f"{place}.{UP}"] = split_gate_up(pair, path)
        except AdapterError as error:
            problems.append(error.message)
    root, own = _ROOTS.get(kind, ("", ""))
    if not root:
        problems += [
            f"{path}: a layer of transformers' Conv1D; how {_PROGRAM} names it, the base tells: --base"
            for path, pair in named.items()
            if pair.form == "transposed"
        ]
    return {_moved(path, root, own): replace(pair, frozen_rank=0) for path, pair in named.items()}, problems


def _moved(path: str, root: str, other: str) -> str:
    """Return a path with another root."""
    return f"{other}{path.removeprefix(root)}" if root and path.startswith(root) else path
