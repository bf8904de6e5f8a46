"""Adapters of torchtune: `adapter_model.pt`, by names of its own and with rotary rows in pairs.

    torchtune                           transformers
    layers.N.attn.q_proj, k_proj        model.layers.N.self_attn.q_proj, k_proj    rows in pairs, see `files.rotary`
    layers.N.attn.v_proj, output_proj   model.layers.N.self_attn.v_proj, o_proj
    layers.N.mlp.w1, w2, w3             model.layers.N.mlp.gate_proj, down_proj, up_proj
    output                              lm_head

Tensors are `.lora_a.weight` (R, I), `.lora_b.weight` (O, R), and for DoRA `.magnitude` (O,). One rank holds for all;
alpha is not stored. torchtune's own export to PEFT leaves magnitudes of q and k in the order of pairs, and permutes the
rows of Qwen2, which has them in halves already: a file of torchtune's own says what was trained, its export may not.

Source: torchtune 0.6.1, `models/convert_weights.py`, `modules/peft` (research: peft-format.md 16).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.errors import AdapterError
from veneer.files.filesystem import REAL, Content
from veneer.files.foreign import foreign_adapter, refuse, unfit
from veneer.files.format import Format, Hints, Sight
from veneer.files.peft_folder import CONFIG, MAX_CONFIG
from veneer.files.peft_values import number
from veneer.files.pickles import SUFFIXES, read_pickle
from veneer.files.rotary import Heads, heads_of, is_rotated, reordered
from veneer.files.shards import Checkpoint
from veneer.files.strict_json import parse_json
from veneer.files.tensors import dump_tensors, non_finite, read_tensors
from veneer.files.translate import (
    alpha_hint,
    alpha_problem,
    at_rank,
    at_scaling,
    matrix_form,
    pair_problem,
    path_problem,
    rank_problem,
)
from veneer.names import did_you_mean

FILE = "torchtune_adapter.safetensors"

_PROGRAM = "torchtune"
_KEY = re.compile(r"(?P<path>.+)\.(?P<leaf>lora_a\.weight|lora_b\.weight|magnitude)")
_PAIRS = ("llama", "mistral", "gemma", "gemma2")
_HALVES = ("qwen2",)
"""Families of transformers that torchtune has by the same layers, and in which order their rotary rows are."""

_LEAVES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_FROM = {theirs: ours for ours, theirs in _LEAVES.items()}
_HEAD, _OUTPUT = "lm_head", "output"


def _recognise(sight: Sight) -> bool:
    found = (_KEY.fullmatch(key) for key in sight.keys)
    return any(one is not None and _to_ours(one["path"]) is not None for one in found)


def read_torchtune(path: str | Path, hints: Hints | None = None) -> Adapter:
    """Read torchtune's own tensors from a safetensors file.

    Args:
        path: The file.
        hints: `alpha`, which is not stored, unless torchtune's export for PEFT lies beside, whose `lora_alpha` it is;
            `base`, whose configuration says the heads, where q or k is adapted.

    Raises:
        AdapterError: If a tensor is not used, or does not fit; without an alpha, or a base that is needed.

    Example:
        >>> import tempfile, torch
        >>> path = "layers.0.mlp.w1"
        >>> tensors = {f"{path}.lora_a.weight": torch.ones(2, 3), f"{path}.lora_b.weight": torch.ones(4, 2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / FILE).write_bytes(dump_tensors(tensors))
        ...     list(read_torchtune(Path(folder) / FILE, Hints(alpha=16)).modules)
        ['model.layers.0.mlp.gate_proj']
    """
    path = Path(path)
    if path.suffix in SUFFIXES:
        raise AdapterError(f"{path}: looks like a pickle, which is opened only if asked for: --from {PICKLE.name}")
    return adapter_from_torchtune(read_tensors(path), _with_alpha(path, hints), str(path))


def read_torchtune_pickle(path: str | Path, hints: Hints | None = None) -> Adapter:
    """Read torchtune's `adapter_model.pt`, a pickle, which is opened by `read_pickle`.

    Raises:
        AdapterError: As `read_torchtune` and `read_pickle`.

    Example:
        read_torchtune_pickle("epoch_0/adapter_model.pt", Hints(alpha=16, base=read_checkpoint("llama")))
    """
    return adapter_from_torchtune(read_pickle(path), _with_alpha(Path(path), hints), str(path))


def adapter_from_torchtune(tensors: Mapping[str, Tensor], hints: Hints, where: str) -> Adapter:
    """Return the adapter in torchtune's tensors.

    Args:
        tensors: Tensors by key.
        hints: As for `read_torchtune`.
        where: What errors call the file.

    Raises:
        AdapterError: If a tensor is not used, or does not fit; all at once.
    """
    alpha = alpha_hint(hints, where, _PROGRAM)
    parts, problems = _sort(tensors)
    heads = _heads(hints.base, parts, where)
    modules: dict[str, LowRank] = {}
    for path, found in parts.items():
        A, B, m = found["lora_a.weight"], found["lora_b.weight"], found.get("magnitude")
        try:
            problem = pair_problem(A, B) or rank_problem(A.shape[0])
            if problem:
                raise AdapterError(f"{path}: {problem}")
            form = matrix_form(path, (B.shape[0], A.shape[1]), hints.base)
            pair = LowRank(A, B, alpha / A.shape[0], form, m)
            modules[path] = pair if heads is None else reordered(path, pair, heads, pairs=False)
        except AdapterError as error:
            problems.append(error.message if error.message.startswith(path) else f"{path}: {error.message}")
    with_m = [path for path, found in parts.items() if "magnitude" in found]
    if with_m and len(with_m) != len(parts):
        problems += [f"{path}: lacks a magnitude, others have one" for path in parts if path not in with_m]
    if not parts and not problems:
        problems.append("no key ends in .lora_a.weight or .lora_b.weight")
    refuse(where, f"cannot be read as {_PROGRAM}'s", problems)
    return foreign_adapter(modules, metadata=AdapterMetadata())


def write_torchtune(adapter: Adapter, hints: Hints | None = None) -> dict[str, Content]:
    """Return a safetensors file that torchtune loads as its `adapter_checkpoint`.

    All layers get one rank, filled with zeros, and the scaling alpha / rank; what differs is put into lora_b.

    Args:
        adapter: The adapter.
        hints: `alpha`, which the recipe will be given; `base`, whose configuration says the heads.

    Raises:
        AdapterError: If torchtune has no place for something, all at once; without an alpha or a base that is needed.

    Example:
        >>> import torch
        >>> pair = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)
        >>> adapter = foreign_adapter({"model.layers.0.mlp.up_proj": pair})
        >>> sorted(write_torchtune(adapter, Hints(alpha=2)))
        ['torchtune_adapter.safetensors']
    """
    hints = hints or Hints()
    problems = [problem] if (problem := alpha_problem(hints, _PROGRAM)) else []
    problems += unfit(adapter, ("linear",), _PROGRAM, dora=("linear",))
    names = {path: _to_theirs(path) for path in adapter.modules}
    problems += [f"{path}: no layer that {_PROGRAM} adapts" for path, name in names.items() if name is None]
    with_m = [path for path, pair in adapter.modules.items() if pair.magnitude is not None]
    if with_m and len(with_m) != len(adapter.modules):
        problems += [f"{path}: has no magnitude, others have one" for path in adapter.modules if path not in with_m]
    if not adapter.modules:
        problems.append("there is no adapted module")
    problems += non_finite(adapter.tensors())
    refuse("the adapter", f"{_PROGRAM}'s layout cannot carry it", problems)
    heads = _heads(hints.base, adapter.modules, "the adapter")
    alpha, rank = alpha_hint(hints, "the adapter", _PROGRAM), max(pair.rank for pair in adapter.modules.values())
    tensors: dict[str, Tensor] = {}
    for path, pair in adapter.modules.items():
        even = at_rank(at_scaling(replace(pair, frozen_rank=0), alpha / rank), rank)
        even = even if heads is None else reordered(path, even, heads, pairs=True)
        tensors |= {f"{names[path]}.lora_a.weight": even.lora_A, f"{names[path]}.lora_b.weight": even.lora_B}
        if even.magnitude is not None:
            tensors[f"{names[path]}.magnitude"] = even.magnitude
    return {FILE: dump_tensors(tensors)}


NEEDS = ("--alpha ALPHA", "--base BASE")
FORMAT = Format(_PROGRAM, _PROGRAM, _recognise, read_torchtune, write_torchtune, file=FILE, needs=NEEDS)
PICKLE = Format(
    f"{_PROGRAM}-pt",
    f"{_PROGRAM} in a pickle",
    lambda _: False,
    read_torchtune_pickle,
    is_pickle=True,
    needs=NEEDS,
)


def _with_alpha(path: Path, hints: Hints | None) -> Hints:
    """Return the hints with the alpha that the configuration beside a file says, where none was given."""
    hints, beside = hints or Hints(), path.parent / CONFIG
    if hints.alpha is not None or not REAL.exists(beside):
        return hints
    raw = parse_json(REAL.read_bytes(beside, MAX_CONFIG), str(beside), max_bytes=MAX_CONFIG)
    problems: list[str] = []
    alpha = number(raw, "lora_alpha", 0, problems) if isinstance(raw, dict) and "lora_alpha" in raw else None
    refuse(str(beside), "its alpha cannot be used", problems)
    return replace(hints, alpha=alpha)


def _to_theirs(path: str) -> str | None:
    if path == _HEAD:
        return _OUTPUT
    found = re.fullmatch(r"model\.layers\.(?P<layer>\d+)\.(?P<leaf>.+)", path)
    return f"layers.{found['layer']}.{_LEAVES[found['leaf']]}" if found and found["leaf"] in _LEAVES else None


def _to_ours(path: str) -> str | None:
    if path == _OUTPUT:
        return _HEAD
    found = re.fullmatch(r"layers\.(?P<layer>\d+)\.(?P<leaf>.+)", path)
    return f"model.layers.{found['layer']}.{_FROM[found['leaf']]}" if found and found["leaf"] in _FROM else None


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return each module's tensors by leaf, under transformers' path, and the keys that are none."""
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    known = [f"layers.0.{theirs}" for theirs in _FROM] + [_OUTPUT]
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        path = _to_ours(found["path"]) if found else None
        if found is None:
            problems.append(f"{key!r}: expected a key that ends in .lora_a.weight, .lora_b.weight or .magnitude")
        elif path is None or path_problem(path):
            problems.append(f"{key!r}: no layer that is known{did_you_mean(found['path'], known)}")
        else:
            parts.setdefault(path, {})[found["leaf"]] = tensor
    for path, found_parts in parts.items():
        problems += [f"{path}: lacks {leaf}" for leaf in ("lora_a.weight", "lora_b.weight") if leaf not in found_parts]
    whole = {path: one for path, one in parts.items() if {"lora_a.weight", "lora_b.weight"} <= set(one)}
    return whole, problems


def _heads(base: Checkpoint | None, paths: Mapping[str, object], where: str) -> Heads | None:
    """Return the heads by which rows are put in order; None where none are to be.

    Raises:
        AdapterError: If that needs a base, or a family that is known.
    """
    if not any(is_rotated(path) for path in paths):
        return None
    if base is None:
        raise AdapterError(
            f"{where}: {_PROGRAM} has rows of q_proj and k_proj in an order by heads; give the base: --base"
        )
    family = base.config.get("model_type")
    if family in _HALVES:
        return None
    if family not in _PAIRS:
        known = (*_PAIRS, *_HALVES)
        near = did_you_mean(str(family), known)
        raise AdapterError(
            f"{base.folder}: expected a model_type that {_PROGRAM} has by the same layers, {', '.join(known)}; got"
            f" {str(family)[:80]!r}{near}"
        )
    return heads_of(base.config, f"{base.folder / 'config.json'}")
