"""What the readers and writers of other people's formats share: a single file, settings from factors, what fits.

What changes factors themselves is `translate`'s.

An adapter's meaning is its effective delta in each module. So a scaling that a format has no place for is folded into
lora_B, and settings are made from what the factors are (research: peft-format.md 20).
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.patterns import scales_for
from veneer.files.peft_layout import targets_of
from veneer.files.peft_values import MAX_RANK
from veneer.files.tensors import MAX_FILE, parse_header, parse_tensors

SUFFIX = ".safetensors"
ENOUGH = 100
"""After so many problems a reader looks for no more: near misses among thousands of names take long."""
_SHOWN = 50


@dataclass(frozen=True, eq=False)
class Single:
    """A safetensors file.

    Args:
        path: Where it lies.
        tensors: Its tensors by key.
        metadata: What its header says besides.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def single_file(path: Path, *, fs: FileSystem = REAL) -> Path:
    """Return the safetensors file that is meant: the path itself, or the only one in the folder that it is.

    Raises:
        AdapterError: If there is none, or several.

    Example:
        >>> single_file(Path("a.safetensors")).name
        'a.safetensors'
    """
    if not fs.is_folder(path):
        return path
    files = [name for name in fs.list_folder(path) if name.endswith(SUFFIX)]
    if len(files) != 1:
        what = f"it holds {', '.join(files)}; name the one that is meant" if files else "it holds none"
        raise AdapterError(f"{path}: expected a safetensors file, or a folder with one; {what}")
    return path / files[0]


def read_single(path: Path, *, max_bytes: int = MAX_FILE, fs: FileSystem = REAL) -> Single:
    """Read a safetensors file, checked as `files.tensors` does.

    Raises:
        AdapterError: If it cannot be read, or anything in it is wrong.
    """
    path = single_file(path, fs=fs)
    try:
        data = fs.read_bytes(path, max_bytes)
    except OSError as cause:
        raise AdapterError(f"{path}: cannot be read: {cause}") from cause
    header, _ = parse_header(data, str(path), len(data))
    return Single(path, parse_tensors(data, str(path)), header.get("__metadata__") or {})


def refuse(where: object, message: str, problems: Iterable[str]) -> None:
    """Raise for a list of problems, if there are any.

    Raises:
        AdapterError: With the first fifty of them.

    Example:
        >>> refuse("a.safetensors", "cannot be read", [])
    """
    if lines := list(problems):
        count = f"{len(lines) - _SHOWN}" if len(lines) < ENOUGH else "many"
        more = [f"... and {count} more"] if len(lines) > _SHOWN else []
        raise AdapterError(f"{where}: {message}", lines[:_SHOWN] + more)


def pair_from(A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None = None) -> LowRank:
    """Return the factors of a linear layer or a convolution; of two dtypes the wider is taken.

    Args:
        A: Shape (rank, in) or (rank, in, k…).
        B: Shape (out, rank) or (out, rank, 1…).
        scaling: The factor that is applied.
        magnitude: DoRA's, of any shape with `out` values.

    Raises:
        AdapterError: If they do not fit each other, or a rank is larger than any that is read.

    Example:
        >>> pair_from(torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1), 1.0).form
        'conv'
    """
    if not A.is_floating_point() or not B.is_floating_point():
        raise AdapterError(f"expected floating numbers, got {A.dtype} and {B.dtype}")
    if A.ndim < 2 or B.ndim < 2 or 0 in (*A.shape, *B.shape):
        raise AdapterError(f"expected matrices or kernels, got {tuple(A.shape)} and {tuple(B.shape)}")
    form = "linear" if A.ndim == 2 else "conv"
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"ranks differ: {A.shape[0]} of {tuple(A.shape)} and {B.shape[1]} of {tuple(B.shape)}")
    if A.shape[0] > MAX_RANK:
        raise AdapterError(f"rank {A.shape[0]}; at most {MAX_RANK} is read")
    if not math.isfinite(scaling):
        raise AdapterError(f"its scaling is not finite: {scaling}")
    dtype = torch.promote_types(A.dtype, B.dtype)
    flat = None if magnitude is None else magnitude.reshape(-1)
    return LowRank(A.to(dtype), B.to(dtype), scaling, form, flat)


def settings_for(
    modules: Mapping[str, LowRank], *, saved: Iterable[str] = (), base: LoRAConfig | None = None
) -> LoRAConfig:
    """Return settings that give every module the rank and the scaling that it has.

    Args:
        modules: Module path to its factors.
        saved: Paths of modules that trained whole.
        base: Settings whose other values are kept.

    Raises:
        AdapterError: If a scaling is not positive and finite.

    Example:
        >>> pair = LowRank(torch.zeros(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> config = settings_for({"layers.0.q": pair, "layers.1.q": pair})
        >>> config.rank, config.alpha, config.target_modules
        (2, 4.0, ('layers.0.q', 'layers.1.q'))
    """
    start = base or LoRAConfig()
    layers, parameters = targets_of(modules)
    config = start.model_copy(
        update={
            # In full: a name alone could stand for layers of the base that are not adapted.
            "target_modules": tuple(layers),
            "target_parameters": tuple(parameters),
            "exclude_modules": (),
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": tuple(sorted(set(saved))),
            "use_dora": any(pair.magnitude is not None for pair in modules.values()),
            "use_rslora": False,
            "parts": {},
        }
    )
    if not modules:
        return config
    positive = {
        path: pair if pair.scaling > 0 else replace(pair, scaling=1.0) for path, pair in modules.items()
    }  # a sign or a zero is folded into lora_B where it is written
    return scales_for(Adapter(positive, config)).within(config)


def foreign_adapter(
    modules: Mapping[str, LowRank],
    *,
    trained: Mapping[str, Tensor] | None = None,
    metadata: AdapterMetadata | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return an adapter of modules that were read from files without PEFT's settings, with settings that fit them.

    Args:
        modules: Module path to factors.
        trained: Parameter path to values that trained whole.
        metadata: What it was made for.
        settings: Further settings, such as the dropout.

    Example:
        >>> pair = LowRank(torch.zeros(2, 3), torch.zeros(3, 2), scaling=2.0)
        >>> foreign_adapter({"layers.0.q_proj": pair}).config.alpha
        4.0
    """
    whole = dict(trained or {})
    biases = {path.removesuffix(".bias") for path in whole if path.endswith(".bias")}
    bias = "none" if not biases else "lora_only" if biases <= set(modules) else "all"
    saved = {path.rpartition(".")[0] for path in whole if not path.endswith(".bias")}
    base = LoRAConfig(**{"bias": bias, **(settings or {})})
    config = settings_for(modules, saved=saved, base=base)
    return Adapter(modules, config, whole, metadata or AdapterMetadata())


def unfit(
    adapter: Adapter,
    forms: Collection[str],
    program: str,
    *,
    dora: Collection[str] = (),
    trained: bool = False,
    invocation: bool = False,
    advice: Mapping[str, str] | None = None,
) -> list[str]:
    """Return a line for all that an adapter holds and a format does not carry.

    Args:
        adapter: The adapter.
        forms: The forms of factors that the format has.
        program: Whose format it is.
        dora: The forms that it has with magnitudes.
        trained: Whether it has parameters that trained whole.
        invocation: Whether it has the tokens after which alone an adapter acts.
        advice: Form to what to do about it.

    Example:
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, "transposed")
        >>> unfit(foreign_adapter({"a": pair}), ("linear",), "mlx-lm")
        ["a: mlx-lm has no factors of form 'transposed'"]
    """
    problems = []
    for path, pair in adapter.modules.items():
        if pair.form not in forms:
            said = (advice or {}).get(pair.form)
            problems.append(f"{path}: {program} has no factors of form {pair.form!r}" + (f"; {said}" if said else ""))
        elif pair.magnitude is not None and pair.form not in dora:
            problems.append(
                f"{path}: {program} has no magnitudes (DoRA) for form {pair.form!r}; make plain LoRA of it first"
            )
    if not trained:
        problems += [f"{path}: {program} has no place for a parameter that trained whole" for path in adapter.trained]
    problems += [f"{path}: {program} has no place for rows of tokens" for path in adapter.tokens]
    if adapter.config.invocation_tokens and not invocation:
        problems.append(f"{program} has no invocation tokens (activated LoRA)")
    return problems
