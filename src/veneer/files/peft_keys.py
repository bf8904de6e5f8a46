"""The names of an adapter's tensors: every one is used, or is a problem with its name.

Loaders that skip what they do not know give adapters without effect (vllm#34186, #48019; peft#1932, #2118).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.patterns import MAX_PATH
from veneer.files.peft_layout import Keys
from veneer.names import did_you_mean

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_TABLE_FACTOR = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<side>[AB])(?:\.default)?")
_TOKENS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_UNSUPPORTED = (
    (re.compile(r"\.lora_B(\.default)?\.bias$"), "a bias of lora_B (lora_bias)"),
    (re.compile(r"\.(lora_E|(hada|lokr)_[wt]\d(_[ab])?|vera_lambda_[bd]|ia3_l)$"), "another method than LoRA"),
)
# PEFT adds both to these tasks, and a model has one of them.
_EITHER = ("classifier", "score")
_TABLES = ("embed_tokens", "lm_head")
_BASE_WEIGHT = ".base_layer.weight"
_CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Parts:
    """What the keys of a file stand for.

    Args:
        modules: What stands before the factors' names, to their keys; `peft_layout.place_factors` tells what it is.
        trained: Parameter path to its key.
        tokens: Path of an embedding table to the key of its trained rows.
        base_weights: Module path to the key of its base weight, as PEFT writes for embeddings and heads.
        problems: Keys that stand for nothing that can be used.
    """

    modules: Mapping[str, Keys]
    trained: Mapping[str, str]
    base_weights: Mapping[str, str]
    tokens: Mapping[str, str]
    problems: tuple[str, ...]


def read_keys(
    tensors: Mapping[str, Tensor], prefix: str, saved: Sequence[str], where: str, *, rows: re.Pattern[str] = _TOKENS
) -> Parts:
    """Sort the tensors of a file into factors and parameters that trained whole.

    Args:
        tensors: The tensors by key.
        prefix: What every key begins with.
        saved: `modules_to_save` of the configuration.
        where: What errors call the file.
        rows: What a key of a table's trained rows looks like.

    Raises:
        AdapterError: If no key has the prefix.
    """
    if not any(key.startswith(prefix) for key in tensors):
        first = f"the first is {min(tensors)!r}" if tensors else "it holds none"
        raise AdapterError(
            f"{where}: expected keys that begin with {prefix!r}, {first}; PEFT would load nothing from it."
            " If it is a state dict of the model, save it with PEFT's save_pretrained()"
        )
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    magnitudes: dict[str, str] = {}
    tokens: dict[str, str] = {}
    rest: dict[str, str] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        problem = _key_problem(key, tensor, prefix)
        if problem:
            problems.append(f"{key!r}: {problem}")
        elif found := _factor(key, len(prefix)):
            path, side = found
            is_table = _TABLE_FACTOR.fullmatch(key) is not None
            sides = factors.setdefault((path, is_table), {}) if side != "magnitude" else magnitudes
            side = path if side == "magnitude" else side
            if side in sides:
                problems.append(f"{key!r}: stands for the same factor as {sides[side]!r}")
            sides[side] = key
        elif table := rows.fullmatch(key, len(prefix)):
            tokens[table["path"]] = key
        else:
            rest[key.removeprefix(prefix)] = key
    modules: dict[str, Keys] = {}
    for (path, is_table), sides in factors.items():
        if len(sides) == 1:
            (side, key), other = next(iter(sides.items())), "B" if "A" in sides else "A"
            known = [name for name, _ in factors]
            problems.append(f"{key!r}: lora_{side} without lora_{other}{did_you_mean(path, known)}")
        elif path in modules:
            problems.append(f"{sides['A']!r}: stands for the same factor as {modules[path].A!r}")
        else:
            modules[path] = Keys(sides["A"], sides["B"], magnitudes.pop(path, None), is_table)
    problems += [
        f"{key!r}: a magnitude without factors{did_you_mean(path, modules)}" for path, key in magnitudes.items()
    ]
    base_weights = _base_weights(rest, modules, saved, problems)
    trained = _trained(rest, modules, tensors, problems)
    return Parts(modules, trained, base_weights, tokens, tuple(problems))


def trained_problems(
    config: LoRAConfig, modules: Collection[str], trained: Iterable[str], task_type: str | None
) -> list[str]:
    """Return where what trained whole is not what `bias` and `modules_to_save` say.

    Args:
        config: The settings.
        modules: Paths of adapted modules.
        trained: Paths of parameters that trained whole.
        task_type: PEFT's word for the head.

    Example:
        >>> trained_problems(LoRAConfig(bias="lora_only"), {"q"}, ["q.bias"], None)
        []
        >>> trained_problems(LoRAConfig(), {"q"}, ["q.bias"], None)
        ["'q.bias': trained whole, but neither bias='none' nor modules_to_save=[] says so"]
    """
    problems, used = [], set()
    for path in trained:
        entries = {entry for entry in config.modules_to_save if _lies_under(path, entry)}
        used |= entries
        is_bias = path == "bias" or path.endswith(".bias")
        by_bias = is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and path.removesuffix(".bias") in modules)
        )
        if not entries and not by_bias:
            saved = list(config.modules_to_save)
            problems.append(
                f"{path!r}: trained whole, but neither bias={config.bias!r} nor modules_to_save={saved} says so"
                f"{did_you_mean(path, [f'{module}.lora_A.weight' for module in modules])}"
            )
    unused = set(config.modules_to_save) - used
    if task_type in _CLASSIFICATION and used & set(_EITHER):
        unused -= set(_EITHER)
    problems += [f"modules_to_save={entry!r}: no parameter of such a module is there" for entry in sorted(unused)]
    for path in sorted(modules):
        problems += [
            f"{path!r}: adapted, and trained whole by modules_to_save={entry!r}; it can be only one"
            for entry in config.modules_to_save
            if f".{entry}." in f".{path}."
        ]
    return problems


def _factor(key: str, start: int) -> tuple[str, str] | None:
    """Return the path and the side, A, B or magnitude, that a key stands for."""
    for pattern in (_FACTOR, _TABLE_FACTOR):
        if found := pattern.fullmatch(key, start):
            return found["path"], found["side"]
    found = _MAGNITUDE.fullmatch(key, start)
    return None if found is None else (found["path"], "magnitude")


def _key_problem(key: str, tensor: Tensor, prefix: str) -> str | None:
    """Return what is wrong with a key and its tensor taken alone."""
    if not key.startswith(prefix):
        return f"expected a key that begins with {prefix!r}"
    name = key.removeprefix(prefix)
    # A module is only ever looked up by its path, but no path that a model can have looks like this.
    if len(name) > MAX_PATH + 32 or not name.isprintable() or not all(name.split(".")):
        return f"not the path of a parameter (empty or unprintable parts, or longer than {MAX_PATH})"
    for pattern, what in _UNSUPPORTED:
        if pattern.search(key):
            return f"{what} is not supported"
    found = _factor(name, 0)
    if found is None:
        return None
    shape = tuple(tensor.shape)
    least = 1 if found[1] == "magnitude" else 2
    if tensor.ndim < least or tensor.ndim > 5 or 0 in shape:
        what = "a vector" if least == 1 else "a matrix or a kernel"
        return f"expected {what}, got shape {shape}; were sharded weights (ZeRO-3, FSDP) not gathered before saving?"
    return None


def _base_weights(
    rest: dict[str, str], modules: Collection[str], saved: Sequence[str], problems: list[str]
) -> dict[str, str]:
    """Take the base's own weights out of the rest; `attach` compares them with the model's.

    PEFT writes the table and the head along where one of them is adapted, the tied other one by its plain name.
    """
    keys = {}
    for name, key in list(rest.items()):
        wrapped = name.endswith(_BASE_WEIGHT)
        path = name.removesuffix(_BASE_WEIGHT if wrapped else ".weight")
        plain = name.endswith(".weight") and path.rpartition(".")[2] in _TABLES
        if wrapped and path not in modules:
            problems.append(f"{key!r}: the weight of a layer that is not adapted{did_you_mean(path, modules)}")
        if wrapped or (plain and not any(_lies_under(name, entry) for entry in saved)):
            keys[path] = rest.pop(name)
    return keys


def _trained(
    rest: Mapping[str, str], modules: Collection[str], tensors: Mapping[str, Tensor], problems: list[str]
) -> dict[str, str]:
    """Return the parameters that trained whole, the biases of adapted layers by the layer's own name."""
    trained: dict[str, str] = {}
    for name, key in rest.items():
        path = name
        if name.endswith(".base_layer.bias"):
            path = name.removesuffix(".base_layer.bias") + ".bias"
            module = path.removesuffix(".bias")
            if module not in modules:
                problems.append(f"{key!r}: the bias of a layer that is not adapted{did_you_mean(module, modules)}")
                continue
        elif _is_copy(name, rest, tensors, problems):
            continue
        if path in trained:
            problems.append(f"{key!r}: stands for the same parameter as {trained[path]!r}")
        trained[path] = key
    return trained


def _is_copy(name: str, rest: Mapping[str, str], tensors: Mapping[str, Tensor], problems: list[str]) -> bool:
    """Tell whether a key repeats a bias: with `bias="all"` PEFT writes those of saved modules three times."""
    for infix in (".modules_to_save.bias", ".original_module.bias"):
        plain = name.removesuffix(infix) + ".bias"
        if name.endswith(infix) and plain in rest:
            # The one of the original module is the base's own and has no effect.
            if infix == ".modules_to_save.bias" and not torch.equal(tensors[rest[name]], tensors[rest[plain]]):
                problems.append(f"{rest[name]!r}: differs from {rest[plain]!r}, of which it should be a copy")
            return True
    return False


def _lies_under(path: str, entry: str) -> bool:
    """Tell whether a parameter belongs to a module that `modules_to_save` names, by PEFT's rule: its path ends so."""
    parts = path.split(".")
    return any(".".join(parts[:count]).endswith(entry) for count in range(1, len(parts)))
