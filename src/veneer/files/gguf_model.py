"""A checkpoint's tensors as llama.cpp has them in a GGUF file: names, order of rows, stacks of experts.

What llama.cpp must know besides, above all the tokenizer in its own words, comes from a GGUF file of the same base: its
converter tells pre-tokenizers apart by hashes of what they make of a text, a table that the `gguf` package has not.

Source: llama.cpp's converter as of llama-cpp-python 0.3.36, `conversion/*.py`; proved by llama.cpp's own logits
(tests/parity/test_gguf_model.py). Differs from it in what is not there: no metadata of our own, no quantised types.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, BaseModelError
from veneer.files.gguf_container import Head, packed_count
from veneer.files.gguf_lora import Family, family_of, name_map
from veneer.files.rotary import Heads, heads_of, is_rotated, to_halves, to_pairs
from veneer.files.shards import Checkpoint
from veneer.files.tensors import DTYPES
from veneer.files.translate import DOWN, GATE, GATE_UP, UP
from veneer.names import did_you_mean

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""What `general.file_type` says of files whose matrices are of a dtype."""

CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that llama.cpp makes of a configuration: no checkpoint holds them."""

_HEAD, _OUTPUT, _TABLE = "lm_head.weight", "output.weight", "token_embd.weight"
_MASKS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_SUFFIXES = (".weight", ".bias")
_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,4})\.(\w+\.weight)")
_STACK = re.compile(rf"(.+\.experts)\.({GATE_UP}|{DOWN})")
_WIDE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")
_DROPPED = ("general.alignment", "general.file_type", "split.", "quantize.")
_TIES = "tie_word_embeddings"
_SAME = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "rope.freq_base": ("rope_theta",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
}
"""What a GGUF file says of a model, and what `config.json` calls it."""


@dataclass(frozen=True)
class Laid:
    """A tensor of a GGUF file, and what it is made of.

    Args:
        sources: The stored tensors that it holds one after another: one, or a stack of experts.
        shape: Its shape, the slowest axis first.
        dtype: What it is stored in.
        heads: How many heads its rows are of, where they are put in pairs.
        transposed: Whether it lies the other way round.
        shift: What is added.
        half: Which half of the rows of each expert it is, of the two that are stored as one.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int | None = None
    transposed: bool = False
    shift: float = 0.0
    half: int | None = None

    def lay(self, stored: Tensor) -> Tensor:
        """Return what GGUF has of one of the sources, which is in its dtype already."""
        if self.half is not None:
            stored = stored.chunk(2, 1)[self.half]
        if self.transposed:
            stored = stored.T
        if self.heads is not None:
            stored = to_pairs(stored, self.heads)
        return stored + self.shift if self.shift else stored

    def lift(self, laid: Tensor) -> Tensor:
        """Return what GGUF has of one of the sources in a checkpoint's order; half and shift stay as they are."""
        if self.heads is not None:
            laid = to_halves(laid, self.heads)
        return laid.T if self.transposed else laid


def lay_out(checkpoint: Checkpoint, like: Head, where: str, dtype: torch.dtype) -> dict[str, Laid]:
    """Return what a GGUF file is to hold of a checkpoint, in the order of a file of the same base.

    Args:
        checkpoint: What is written.
        like: A GGUF file of the same base; its types do not matter.
        where: What errors call that file.
        dtype: Of matrices. Vectors, routers and tables of positions are float32, as llama.cpp's converter has them.

    Raises:
        AdapterError: If the family is not known, a tensor has no place, or the two are not of one base; every problem
            is listed.
        MissingDependencyError: If the `gguf` package is not installed, which holds the names.

    Example:
        lay_out(read_checkpoint("models/llama"), read_gguf_head("llama.gguf"), "llama.gguf", torch.bfloat16)
    """
    family = family_of(checkpoint)
    problems = [*_unlike(checkpoint, like, family)]
    heads = heads_of(checkpoint.config, str(checkpoint.folder)) if family.pairs else None
    laid: dict[str, Laid] = {}
    for name, one in _named(checkpoint, family, like, problems):
        if name in laid:
            problems.append(f"{one.sources[0]!r}: {laid[name].sources[0]!r} has the same name in llama.cpp, {name!r}")
        try:
            laid[name] = _turned(one, name, family, heads, dtype)
        except AdapterError as error:
            problems.append(error.message)
    expected = {name: entry.shape for name, entry in like.tensors.items() if name not in CONSTANTS}
    problems += [f"{name!r}: {where} holds it, the checkpoint has none" for name in expected if name not in laid]
    for name, one in laid.items():
        if name not in expected:
            if name != _OUTPUT:  # a head that was untied
                problems.append(f"{one.sources[0]!r}: {where} holds no {name!r}{did_you_mean(name, expected)}")
        elif _bare(one.shape) != _bare(expected[name]):
            problems.append(f"{one.sources[0]!r}: is {one.shape} as {name!r}, in {where} {expected[name]}")
    if problems:
        raise AdapterError(f"{checkpoint.folder}: cannot be written as GGUF with what {where} says", problems)
    order = [name for name in expected if name in laid] + [name for name in laid if name not in expected]
    return {name: replace(laid[name], shape=expected.get(name, laid[name].shape)) for name in order}


def model_fields(like: Head, dtype: torch.dtype) -> dict[str, bytes]:
    r"""Return the fields of a file like another one, whose matrices are of a dtype.

    Example:
        >>> model_fields(Head({}, {"general.file_type": b""}, {}, 0), torch.float16)["general.file_type"][4:]
        b'\x01\x00\x00\x00'
    """
    kept = {key: value for key, value in like.packed.items() if not key.startswith(_DROPPED)}
    return {**kept, "general.file_type": packed_count(FILE_TYPES[dtype])}


def matrix_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return what most numbers of a checkpoint's matrices are stored in; float32 for float64.

    Raises:
        BaseModelError: If that is no floating dtype.
    """
    sizes: dict[torch.dtype, int] = {}
    for place in checkpoint.tensors.values():
        if len(place.shape) > 1:
            kind = DTYPES[place.dtype]
            sizes[kind] = sizes.get(kind, 0) + math.prod(place.shape)
    found = max(sizes, key=lambda kind: sizes[kind], default=torch.float32)
    found = torch.float32 if found == torch.float64 else found
    if found not in FILE_TYPES:
        raise BaseModelError(f"{checkpoint.folder}: its matrices are {found}; expected float32, bfloat16 or float16")
    return found


def _unlike(checkpoint: Checkpoint, like: Head, family: Family) -> Iterator[str]:
    """Yield what a GGUF file says otherwise than a checkpoint's configuration."""
    fields, config = like.fields, checkpoint.config
    found = fields.get("general.architecture")
    if found != family.architecture:
        yield f"general.architecture: expected {family.architecture!r}, got {str(found)[:80]!r}"
        return
    if fields.get("general.type", "model") != "model":
        yield f"general.type: expected 'model', got {str(fields['general.type'])[:80]!r}"
    if fields.get("split.count", 0) not in (0, 1):
        yield f"split.count: it is one of {str(fields['split.count'])[:80]} files; join them: llama-gguf-split --merge"
    rotary = config.get("rope_parameters")
    config = {**(rotary if isinstance(rotary, Mapping) else {}), **config}
    for key, names in _SAME.items():
        value = _number(fields.get(f"{family.architecture}.{key}"))
        said = next((one for name in names if (one := _number(config.get(name))) is not None), None)
        if value is not None and said is not None and not math.isclose(value, said, rel_tol=1e-6):
            yield f"{family.architecture}.{key}: is {value}, config.json says {said}"


def _number(value: Any) -> float | None:
    """Return a number as it is; None for anything else, such as a list with one for each layer."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _named(checkpoint: Checkpoint, family: Family, like: Head, problems: list[str]) -> Iterator[tuple[str, Laid]]:
    """Yield GGUF's name of each stored tensor or stack of them, in the dtype and the order of rows it is stored in."""
    known, table = name_map(checkpoint, family), ""
    experts: dict[str, dict[int, str]] = {}
    for name, place in checkpoint.tensors.items():
        full = name if name.startswith(family.root) or name == _HEAD else f"{family.root}{name}"
        if name.endswith(_MASKS):
            continue
        if not DTYPES[place.dtype].is_floating_point:
            problems.append(f"{name!r}: is {place.dtype}; quantised checkpoints cannot be written")
            continue
        if found := _EXPERT.fullmatch(full):
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = name
            continue
        laid = Laid((name,), place.shape, DTYPES[place.dtype])
        parts = {full: laid}
        if (found := _STACK.fullmatch(full)) and len(place.shape) == 3:
            parts = {f"{full}.weight": laid}
            if found[2] == GATE_UP:
                count, rows, columns = place.shape
                if rows % 2:
                    problems.append(f"{name!r}: is {place.shape}, which has no two halves")
                    continue
                halves = (replace(laid, shape=(count, rows // 2, columns), half=half) for half in (0, 1))
                parts = {f"{found[1]}.{leaf}.weight": half for leaf, half in zip((GATE, UP), halves, strict=True)}
        for key, one in parts.items():
            target = known.get_name(key, _SUFFIXES)
            if target is None:
                problems.append(f"{name!r}: llama.cpp has no such tensor in architecture {family.architecture!r}")
            elif target != _OUTPUT:
                table = name if target == _TABLE else table
                yield target, one
    for key, found_experts in experts.items():
        target = known.get_name(key, _SUFFIXES)
        sources = tuple(found_experts[one] for one in sorted(found_experts))
        shapes = {checkpoint.tensors[one].shape for one in sources}
        if target is None or len(shapes) > 1 or sorted(found_experts) != list(range(len(sources))):
            problems.append(f"{sources[0]!r}: it and the other {len(sources) - 1} like it are no stack of experts")
        else:
            place = checkpoint.tensors[sources[0]]
            yield target, Laid(sources, (len(sources), *place.shape), DTYPES[place.dtype])
    tied = bool(checkpoint.config.get(_TIES, family.ties))
    if not tied or _OUTPUT in like.tensors:
        yield from _head(checkpoint, family, table if tied else _HEAD, problems)


def _head(checkpoint: Checkpoint, family: Family, name: str, problems: list[str]) -> Iterator[tuple[str, Laid]]:
    """Yield the head: a tensor of its own, or the table once more."""
    if not family.has_head:
        problems.append(
            f"{_HEAD!r}: was untied from the table; in architecture {family.architecture!r} llama.cpp has one tensor"
            " for both; merge an adapter that changes neither"
        )
    elif (place := checkpoint.tensors.get(name)) is None:
        problems.append(f"{name!r}: config.json says that it is not the table, and the checkpoint has none")
    else:
        yield _OUTPUT, Laid((name,), place.shape, DTYPES[place.dtype])


def _turned(one: Laid, name: str, family: Family, heads: Heads | None, dtype: torch.dtype) -> Laid:
    """Return it in llama.cpp's dtype and order of rows."""
    path, _, leaf = one.sources[0].rpartition(".")
    flat = len(_bare(one.shape)) < 2 or name.endswith(_WIDE)
    one = replace(one, dtype=torch.float32 if flat else dtype)
    if heads is not None and is_rotated(path):
        count = heads.queries if path.endswith("q_proj") else heads.keys
        if one.shape[0] != count * heads.size:
            raise AdapterError(f"{path}: expected {count} heads of {heads.size} outputs, got {one.shape[0]} outputs")
        return replace(one, heads=count)
    if leaf == "weight" and path.endswith(family.transposed) and len(one.shape) == 2:
        return replace(one, transposed=True, shape=one.shape[::-1])
    if family.norm_shift and one.sources[0].endswith("norm.weight"):
        return replace(one, shift=family.norm_shift, dtype=torch.float32)
    return one


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of one: llama.cpp counts them as it likes."""
    return tuple(size for size in shape if size != 1)
