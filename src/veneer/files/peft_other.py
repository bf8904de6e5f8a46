"""Adapters of PEFT's other methods: LoHa, LoKr, VeRA and AdaLoRA, read as strictly as LoRA.

Every key of the configuration is used, known to change nothing, or an error that names it; every tensor of the file
is used or listed. `veneer.tools.to_lora` makes a plain LoRA adapter of what is read here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import AdapterMetadata
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, shortened
from veneer.files.filesystem import REAL, FileSystem
from veneer.files.peft_adalora import ADALORA
from veneer.files.peft_folder import CONFIG, MAX_CONFIG, PREFIX, TENSORS, read_folder
from veneer.files.peft_keys import Parts as LoRAParts
from veneer.files.peft_keys import read_keys, trained_problems
from veneer.files.peft_loha import LOHA
from veneer.files.peft_lokr import LOKR
from veneer.files.peft_method import Layout, Method, ModuleUpdate, Parts, Raw, Shapes
from veneer.files.peft_other_config import read_config
from veneer.files.peft_vera import VERA
from veneer.files.strict_json import parse_json
from veneer.files.tensors import MAX_FILE, parse_tensors
from veneer.names import did_you_mean
from veneer.ops.sample import sample_digest

METHODS: Mapping[str, Method] = MappingProxyType({"LOHA": LOHA, "LOKR": LOKR, "VERA": VERA, "ADALORA": ADALORA})
"""The methods by PEFT's `peft_type`."""

MAX_DELTA = 1 << 32

_ROOT = "base_model."
_FAMILY = re.compile(r"\.(?P<leaf>(?:lora|hada|lokr|vera|ia3|oft)_\w+)(?:\.default)?(?:\.weight)?$")
_SHOWN = 50


@dataclass(frozen=True, eq=False)
class OtherAdapter:
    """An adapter of another method than LoRA, as its file holds it.

    Args:
        method: loha, lokr, vera or adalora.
        modules: Module path to what is added to its weight.
        settings: What the configuration says that matters to the method.
        config: What a LoRA adapter of the same layers would say: targets, dropout, bias, modules that trained whole.
        trained: Parameter path to values of whatever trained whole.
        metadata: What it was made for.
    """

    method: str
    modules: Mapping[str, ModuleUpdate]
    settings: Mapping[str, Any]
    config: LoRAConfig
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)


def read_other(
    folder: str | Path, *, shapes: Shapes | None = None, max_bytes: int = MAX_FILE, fs: FileSystem = REAL
) -> OtherAdapter:
    """Read the folder of a LoHa, LoKr, VeRA or AdaLoRA adapter as PEFT writes it.

    Args:
        folder: The folder.
        shapes: Module path to the shape of the base's weight, such as
            `{path: module.weight.shape for path, module in model.named_modules() if isinstance(module, nn.Linear)}`.
            VeRA needs it where it adapts several layers; with it, every method's shapes are checked against the base.
        max_bytes: Longest file that is read.
        fs: Where it lies.

    Raises:
        AdapterError: If anything in it is missing, unknown, unsupported or wrong; every problem is listed.
        DamagedArtefactError: If it has a manifest and does not match it.

    Example:
        >>> import tempfile, torch
        >>> from veneer.files.strict_json import dump_json
        >>> from veneer.files.tensors import dump_tensors
        >>> values = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1), "lora_E": torch.ones(1, 1)}
        >>> config = {"peft_type": "ADALORA", "target_modules": ["q"], "init_r": 1, "lora_alpha": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "adapter_config.json").write_bytes(dump_json(config))
        ...     tensors = dump_tensors({f"base_model.model.q.{name}": one for name, one in values.items()})
        ...     _ = (Path(folder) / "adapter_model.safetensors").write_bytes(tensors)
        ...     other = read_other(folder)
        >>> other.method, other.modules["q"].delta().mean().round(decimals=4)
        ('adalora', tensor(2., dtype=torch.float64))
    """
    files, _ = read_folder(folder, max_bytes=max_bytes, fs=fs)
    where = str(folder)
    raw = parse_json(files[CONFIG], f"{where}/{CONFIG}", max_bytes=MAX_CONFIG)
    name, config, settings, metadata = read_config(raw, METHODS, f"{where}/{CONFIG}")
    method, place = METHODS[name], f"{where}/{TENSORS}"
    tensors = parse_tensors(files[TENSORS], place)
    problems: list[str] = []
    found, shared, rest = _sort(tensors, method, problems)
    whole = _read_rest(rest, found, tensors, config, place)
    problems += whole.problems
    problems += trained_problems(config, set(found), whole.trained, metadata.task_type)
    if not found:
        problems.append(f"no tensor of {method.name} is there: expected {', '.join(method.tensors)} behind a path")
    modules = read_modules(method, Raw(found, shared, settings, shapes, problems))
    if problems:
        raise AdapterError(f"{place}: its tensors are not what {CONFIG} says", shortened(problems, _SHOWN))
    weights = tuple((path, sample_digest(tensors[key])) for path, key in sorted(whole.base_weights.items()))
    return OtherAdapter(
        method=name.lower(),
        modules=MappingProxyType(modules),
        settings=MappingProxyType(settings),
        config=config,
        trained=MappingProxyType({path: tensors[key] for path, key in sorted(whole.trained.items())}),
        metadata=replace(metadata, base_weights=weights),
    )


def _sort(
    tensors: Mapping[str, Tensor], method: Method, problems: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Sort the tensors into those of modules, shared ones, and the rest."""
    leaf = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<leaf>{'|'.join(method.tensors)})(?:\.default)?")
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_ROOT).removesuffix(".default")
        if found := leaf.fullmatch(key):
            target, name = modules.setdefault(found["path"], {}), found["leaf"]
        elif name in method.shared and key.startswith(_ROOT):
            target = shared
        elif other := _FAMILY.search(key):
            near = did_you_mean(other["leaf"], method.tensors)
            problems.append(f"{key!r}: not a tensor that {method.name} has{near}")
            continue
        else:
            rest[key] = tensor
            continue
        if name in target:
            problems.append(f"{key!r}: stands for the same tensor as another key, but for '.default'")
        target[name] = tensor
    return modules, shared, rest


def _read_rest(
    rest: Mapping[str, Tensor],
    modules: Mapping[str, Parts],
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    place: str,
) -> LoRAParts:
    """Read what trained whole, and base weights, by the rules of a LoRA file.

    The adapted modules stand among them as factors of LoRA, so that those rules know them.
    """
    if not any(key.startswith(PREFIX) for key in tensors):
        return read_keys(tensors, PREFIX, config.modules_to_save, place)  # says what is wrong
    stand_in = torch.zeros(1, 1)
    known = {f"{PREFIX}{path}.lora_{side}.weight": stand_in for path in modules for side in "AB"}
    if not known and not rest:
        return LoRAParts({}, {}, {}, {}, ())
    return read_keys({**rest, **known}, PREFIX, config.modules_to_save, place)


def read_modules(method: Method, raw: Raw) -> dict[str, ModuleUpdate]:
    """Check each module's tensors against the layouts and the configuration, and against the base's shapes."""
    numbers = method.numbers(raw.settings, raw.modules, raw.problems)
    shapes = raw.shapes
    if shapes is not None:
        raw.problems.extend(
            f"{path}: `shapes` has no such module{did_you_mean(path, shapes)}"
            for path in raw.modules
            if path not in shapes
        )
    modules = {}
    for path, parts in method.complete(raw).items():
        if path not in numbers:
            continue
        rank, scaling = numbers[path]
        problems = _layout_problems(parts, method, rank) or method.fits(parts, rank, raw.settings)
        if not problems:
            shape = method.shape(parts)
            given = tuple(int(size) for size in shapes[path]) if shapes and path in shapes else shape
            if given[:1] != shape[:1] or prod(given) != prod(shape):
                problems = [f"expected an update for the base's weight of shape {given}, got one of {shape}"]
            elif prod(shape) > MAX_DELTA:
                problems = [f"stands for an update of shape {shape}; at most {MAX_DELTA} values are read"]
            else:
                modules[path] = ModuleUpdate(method, MappingProxyType(dict(parts)), scaling, given)
        raw.problems.extend(f"{path}: {problem}" for problem in problems)
    return modules


def _layout_problems(parts: Parts, method: Method, rank: int) -> list[str]:
    """Return how a module's tensors differ from the layout that is nearest."""
    bad = [f"{name}: expected floating numbers, got {one.dtype}" for name, one in parts.items() if not _floats(one)]
    if bad:
        return bad
    near = min(method.layouts, key=lambda layout: (len(set(layout) ^ set(parts)), _misfits(layout, parts)))
    missing = [f"{name} is missing" for name in near if name not in parts]
    extra = [f"{name} cannot stand beside {', '.join(sorted(set(parts) - {name}))}" for name in set(parts) - set(near)]
    if missing or extra:
        return sorted([*missing, *extra])
    sizes = {"r": rank, "1": 1}
    problems = []
    for name, dimensions in near.items():
        shape = tuple(parts[name].shape)
        expected = tuple(sizes.get(one, size) for one, size in zip(dimensions, shape, strict=False))
        if len(shape) != len(dimensions) or shape != expected or (0 in shape and rank > 0):
            words = ", ".join(f"{one}={sizes[one]}" if one in sizes else one for one in dimensions)
            problems.append(
                f"{name}: expected shape ({words}), got {shape}"
                + ("; were sharded weights not gathered before saving?" if 0 in shape else "")
            )
        else:
            sizes |= dict(zip(dimensions, shape, strict=True))
    return problems


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _misfits(layout: Layout, parts: Parts) -> int:
    return sum(name in parts and len(dimensions) != parts[name].ndim for name, dimensions in layout.items())
