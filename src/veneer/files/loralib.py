"""State dicts of Microsoft's loralib, and those of minLoRA: factors behind the paths of a model, and nothing else.

    layer          tensors behind its path P                              update of the weight
    Linear         lora_A (R, I), lora_B (O, R)                           B · A
    Embedding      lora_A (R, N), lora_B (D, R)                           (B · A)ᵀ
    MergedLinear   lora_A (k·R, I), lora_B (k·O/n, R)                     k of n parts of the outputs, each B_i · A_i
    Conv2d, k × k  lora_A (R·k, I·k), lora_B (O·k, R·k)                   (B · A) as (O, I, k, k), whatever that means
    minLoRA        parametrizations.weight.0.lora_A, .lora_B              B · A; for an embedding A · B

All times alpha / R, where neither is stored: the rank is seen by the shapes, alpha must be said. A file does not tell
its kinds of layers either, so what is no plain linear layer or known table is told by the base: without one, a
convolution would be taken for a linear layer.

Files of theirs are pickles (`loralib-pt`); the same keys in a safetensors file are `loralib`, which is what is written.

Source: loralib 0.1.2, `layers.py`, `utils.py` (research: peft-format.md 11 and 12).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.factors import conv_groups
from veneer.files.filesystem import Content
from veneer.files.foreign import foreign_adapter, refuse, unfit
from veneer.files.format import Format, Hints, Sight
from veneer.files.pickles import SUFFIXES, read_pickle
from veneer.files.tensors import dump_tensors, non_finite, read_tensors
from veneer.files.translate import (
    alpha_hint,
    alpha_problem,
    at_scaling,
    matrix_form,
    pair_problem,
    path_problem,
    rank_problem,
    weight_shape,
)
from veneer.names import did_you_mean

FILE = "lora.safetensors"
NEEDS = ("--alpha ALPHA",)

_PROGRAM = "loralib"
_KEY = re.compile(r"(?P<path>.+?)(?P<stacked>\.parametrizations\.weight\.(?P<place>\d+))?\.lora_(?P<side>[AB])")
_MASK = re.compile(r".+\.parametrizations\.weight\.\d+\.lora_dropout_mask")
_CONV = ".conv.bias"


def _recognise(sight: Sight) -> bool:
    return any(_KEY.fullmatch(key) for key in sight.keys) and not any(key.endswith(".lora_E") for key in sight.keys)


def read_loralib(path: str | Path, hints: Hints | None = None) -> Adapter:
    """Read the factors of loralib or minLoRA in a safetensors file.

    Args:
        path: The file.
        hints: `alpha`, which is not stored; `base` for convolutions, MergedLinear and transformers' Conv1D; `enabled`
            for MergedLinear of which only some of the equal parts of the outputs have factors.

    Raises:
        AdapterError: If a tensor is not used, or does not fit its layer; without an alpha.

    Example:
        >>> import tempfile
        >>> tensors = {"layers.0.q.lora_A": torch.ones(2, 3), "layers.0.q.lora_B": torch.ones(4, 2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / FILE).write_bytes(dump_tensors(tensors))
        ...     read_loralib(Path(folder) / FILE, Hints(alpha=16)).modules["layers.0.q"].scaling
        8.0
    """
    path = Path(path)
    if path.suffix in SUFFIXES:
        raise AdapterError(f"{path}: looks like a pickle, which is opened only if asked for: --from {PICKLE.name}")
    return adapter_from_loralib(read_tensors(path), hints or Hints(), str(path))


def read_loralib_pickle(path: str | Path, hints: Hints | None = None) -> Adapter:
    """Read the factors of loralib or minLoRA in a pickle, as `torch.save(lora.lora_state_dict(model), path)` wrote it.

    Args:
        path: The file; it is opened by `read_pickle`.
        hints: As for `read_loralib`.

    Raises:
        AdapterError: As `read_loralib` and `read_pickle`.

    Example:
        read_loralib_pickle("gpt2_md_lora.pt", Hints(alpha=32, enabled=(True, False, True)))
    """
    return adapter_from_loralib(read_pickle(path), hints or Hints(), str(path))


def adapter_from_loralib(tensors: Mapping[str, Tensor], hints: Hints, where: str) -> Adapter:
    """Return the adapter in a state dict of loralib's or minLoRA's.

    Args:
        tensors: Tensors by key.
        hints: As for `read_loralib`.
        where: What errors call the file.

    Raises:
        AdapterError: If a tensor is not used, or does not fit its layer; all at once.
    """
    alpha = alpha_hint(hints, where, _PROGRAM)
    parts, biases, problems = _sort(tensors)
    modules: dict[str, LowRank] = {}
    for path, (A, B, is_minimal) in parts.items():
        try:
            if problem := pair_problem(A, B):
                raise AdapterError(f"{path}: {problem}")
            read = _read_minimal(path, A, B, hints) if is_minimal else _read_pair(path, A, B, hints)
        except AdapterError as error:
            problems += error.problems or [
                error.message if error.message.startswith(path) else f"{path}: {error.message}"
            ]
            continue
        pair, rank = read
        if problem := rank_problem(rank):
            problems.append(f"{path}: {problem}")
        modules[path] = replace(pair, scaling=alpha / rank)
    trained, more = _trained(biases, modules)
    problems += more
    if not parts and not problems:
        problems.append("no key ends in .lora_A or .lora_B; was the model merged (`.eval()`) before it was saved?")
    refuse(where, f"cannot be read as {_PROGRAM}'s", problems)
    return foreign_adapter(modules, trained=trained)


def write_loralib(adapter: Adapter, hints: Hints | None = None) -> dict[str, Content]:
    """Return a safetensors file that loralib's layers load: `model.load_state_dict(load_file(path), strict=False)`.

    Every layer is one of `lora.Linear`, `lora.Embedding` or `lora.Conv2d`, made with the hinted alpha and its own rank;
    other scalings are put into lora_B.

    Args:
        adapter: The adapter.
        hints: `alpha`, which the layers will be made with.

    Raises:
        AdapterError: If loralib has no place for something, all at once; without an alpha.

    Example:
        >>> pair = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)
        >>> adapter = foreign_adapter({"layers.0.q": pair})
        >>> sorted(write_loralib(adapter, Hints(alpha=2)))
        ['lora.safetensors']
    """
    hints = hints or Hints()
    problems = [problem] if (problem := alpha_problem(hints, _PROGRAM)) else []
    problems += unfit(adapter, ("linear", "transposed", "embedding", "conv"), _PROGRAM, trained=True)
    problems += [
        f"{path}: {_PROGRAM} has no place for a parameter that trained whole but for biases"
        for path in adapter.trained
        if not path.endswith(".bias")
    ]
    problems += [
        f"{path}: {_PROGRAM}'s convolutions are right for square kernels in two directions without groups alone"
        for path, pair in adapter.modules.items()
        if pair.form == "conv" and not _is_square(pair)
    ]
    problems += non_finite(adapter.tensors())
    refuse("the adapter", f"{_PROGRAM}'s keys cannot carry it", problems)
    alpha = alpha_hint(hints, "the adapter", _PROGRAM)
    tensors: dict[str, Tensor] = {}
    for path, pair in adapter.modules.items():
        even = at_scaling(pair, alpha / pair.rank)
        A, B = _from_conv(even) if even.form == "conv" else (even.lora_A, even.lora_B)
        tensors |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
    for path, bias in adapter.trained.items():
        module = path.removesuffix(".bias")
        is_conv = module in adapter.modules and adapter.modules[module].form == "conv"
        tensors[f"{module}{_CONV}" if is_conv else path] = bias
    return {FILE: dump_tensors(tensors)}


FORMAT = Format(_PROGRAM, "loralib, minLoRA", _recognise, read_loralib, write_loralib, file=FILE, needs=NEEDS)
PICKLE = Format(
    f"{_PROGRAM}-pt",
    "loralib, minLoRA in a pickle",
    lambda _: False,
    read_loralib_pickle,
    is_pickle=True,
    needs=NEEDS,
)


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor, bool]], dict[str, Tensor], list[str]]:
    """Return each module's factors and whether they are minLoRA's, the biases, and the keys that are neither."""
    sides: dict[str, dict[str, tuple[Tensor, bool]]] = {}
    biases: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is not None:
            if problem := path_problem(found["path"]):
                problems.append(f"{key!r}: {problem}")
            elif found["stacked"] and found["place"] != "0":
                problems.append(f"{key!r}: a second adapter stacked on the first; keep one of them")
            else:
                side = sides.setdefault(found["path"], {})
                if found["side"] in side:
                    problems.append(f"{key!r}: {found['path']} has such factors twice")
                side[found["side"]] = (tensor, found["stacked"] is not None)
        elif key.endswith(".bias") or key == "bias":
            biases[key] = tensor
        elif _MASK.fullmatch(key) is None:  # a buffer of ones, drawn anew in each step
            problems.append(f"{key!r}: expected .lora_A, .lora_B or a bias{did_you_mean(key, list(sides))}")
    parts = {}
    for path, side in sides.items():
        if set(side) != {"A", "B"}:
            problems.append(f"{path}: lora_{next(iter(side))} without the other factor")
            continue
        (A, is_minimal), (B, is_other) = side["A"], side["B"]
        if is_minimal != is_other:
            problems.append(f"{path}: one factor of {_PROGRAM} and one of minLoRA")
            continue
        parts[path] = (A, B, is_minimal)
    return parts, biases, problems


def _trained(biases: Mapping[str, Tensor], modules: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the biases by the model's own names, and those that do not fit."""
    trained: dict[str, Tensor] = {}
    problems = []
    for key, bias in biases.items():
        module = key.removesuffix(_CONV)
        path = f"{module}.bias" if key.endswith(_CONV) and module in modules else key
        pair = modules.get(path.removesuffix(".bias"))
        expected = None if pair is None else (pair.sizes[0],)
        if not bias.is_floating_point() or bias.ndim != 1 or (expected is not None and bias.shape != expected):
            problems.append(f"{key!r}: expected a bias of shape {expected or '(out,)'}, got {tuple(bias.shape)}")
        elif path in trained:
            problems.append(f"{key!r}: a second bias of {path.removesuffix('.bias')}")
        trained[path] = bias
    return trained, problems


def _read_pair(path: str, A: Tensor, B: Tensor, hints: Hints) -> tuple[LowRank, int]:
    """Return loralib's factors in our form, and the rank that its scaling divides by."""
    shape = weight_shape(hints.base, path)
    if shape is not None and len(shape) == 4:
        return _to_conv(path, A, B, shape)
    rank = B.shape[1]
    count, rest = divmod(A.shape[0], rank)
    if rest or not count:
        raise AdapterError(f"{path}: lora_A has {A.shape[0]} ranks, no multiple of lora_B's {rank}")
    parts = tuple(map(bool, hints.enabled or ()))
    if count == 1 and (sum(parts) != 1 or shape is None or B.shape[0] in shape):
        form = matrix_form(path, (B.shape[0], A.shape[1]), hints.base)
        return LowRank(A, B, 1.0, form), rank
    return _merged(path, A, B, hints, parts if sum(parts) == count else (True,) * count), rank


def _merged(path: str, A: Tensor, B: Tensor, hints: Hints, enabled: Sequence[bool]) -> LowRank:
    """Return the factors of a MergedLinear as one pair: parts side by side, lora_B zero outside of each one's rows."""
    rank, count, shape = B.shape[1], sum(enabled), weight_shape(hints.base, path)
    if B.shape[0] % count:
        raise AdapterError(f"{path}: {count} parts of a fused layer (MergedLinear) do not divide {B.shape[0]} outputs")
    each = B.shape[0] // count
    outputs = each * len(enabled)
    if shape is None:
        raise AdapterError(f"{path}: {count} parts of a fused layer (MergedLinear); which ones, its size tells: --base")
    if outputs not in shape:
        raise AdapterError(
            f"{path}: its {count} parts with factors are not all of a weight of shape {shape}; which of its"
            f" {max(shape) // each if each else 0} parts they are is not stored; say what the"
            " layer's enable_lora was, such as --enabled yes,no,yes"
        )
    wide = B.new_zeros(outputs, count * rank)
    places = [place for place, on in enumerate(enabled) if on]
    for index, place in enumerate(places):
        ranks = slice(index * rank, (index + 1) * rank)
        wide[place * each : (place + 1) * each, ranks] = B[index * each : (index + 1) * each]
    return LowRank(A, wide, 1.0, matrix_form(path, (outputs, A.shape[1]), hints.base))


def _read_minimal(path: str, A: Tensor, B: Tensor, hints: Hints) -> tuple[LowRank, int]:
    """Return minLoRA's factors in our form; those of an embedding stand the other way round."""
    if A.shape[0] != B.shape[1] and A.shape[1] == B.shape[0]:
        return LowRank(A.T, B.T, 1.0, "embedding"), A.shape[1]
    shape = weight_shape(hints.base, path)
    if shape is not None and len(shape) > 2:
        expected = (shape[0], torch.Size(shape[1:]).numel())
        if (B.shape[0], A.shape[1]) != expected:
            raise AdapterError(f"{path}: expected factors for the base's weight of shape {shape}, got {expected}")
        return LowRank(A.unflatten(1, shape[1:]), B[(...,) + (None,) * (len(shape) - 2)], 1.0, "conv"), A.shape[0]
    return LowRank(A, B, 1.0, matrix_form(path, (B.shape[0], A.shape[1]), hints.base)), A.shape[0]


def _to_conv(path: str, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[LowRank, int]:
    """Return the factors of (B · A) viewed as a kernel.

    Row o·k + a of the product holds values a·I·k to (a + 1)·I·k of the kernel of output o, so each of the k rows has
    ranks of its own.
    """
    outputs, inputs, k, other = shape
    rank, rest = divmod(A.shape[0], k)
    if k != other or A.shape[1] != inputs * k or B.shape[0] != outputs * k or rest or A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"{path}: expected factors (r·k, {inputs}·k) and ({outputs}·k, r·k) for a square kernel without groups of"
            f" shape {shape}, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    wide = A.new_zeros(k, A.shape[0], k, A.shape[1])
    for row in range(k):
        wide[row, :, row] = A
    kernels = wide.reshape(k * A.shape[0], inputs, k, k)
    weights = B.reshape(outputs, k * A.shape[0])[..., None, None]
    return LowRank(kernels, weights, 1.0, "conv"), rank


def _from_conv(pair: LowRank) -> tuple[Tensor, Tensor]:
    """Return factors of the kernel viewed as (O·k, I·k): the rank is the pair's own times k."""
    A, B = pair.lora_A, pair.lora_B
    rank, inputs, k = A.shape[0], A.shape[1], A.shape[2]
    wide = B.new_zeros(B.shape[0], k, rank, k)
    for row in range(k):
        wide[:, row, :, row] = B[:, :, 0, 0]
    return A.reshape(rank * k, inputs * k), wide.reshape(B.shape[0] * k, rank * k)


def _is_square(pair: LowRank) -> bool:
    A = pair.lora_A
    return A.ndim == 4 and A.shape[2] == A.shape[3] and conv_groups(A, pair.lora_B) == 1
