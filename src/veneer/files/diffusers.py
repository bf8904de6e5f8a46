"""Adapters of diffusers: one safetensors file for the parts of a pipeline.

The update of a layer is `lora_B · lora_A`: scaling 1, unless the header holds `lora_adapter_metadata`, the settings of
PEFT for each part. Newer diffusers writes and reads it, most other loaders do not. So we write factors whose scaling is
1, and the header besides: every loader gets the same. (research: peft-format.md 14)
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError, several
from veneer.factors import conv_groups
from veneer.files.components import COMPONENTS, component_of, likely_component, select, under
from veneer.files.diffusers_keys import STYLES, Key, old_key, oldest_key, parse_key
from veneer.files.filesystem import Content
from veneer.files.foreign import (
    ENOUGH,
    Single,
    pair_from,
    read_single,
    refuse,
    settings_for,
    unfit,
)
from veneer.files.format import Format, Hints, Sight
from veneer.files.kohya_other import alpha_of
from veneer.files.peft import adapter_from_files
from veneer.files.peft_config import config_to_peft
from veneer.files.peft_folder import CONFIG, PREFIX, TENSORS
from veneer.files.peft_layout import write_factors
from veneer.files.strict_json import dump_json, parse_json
from veneer.files.tensors import MAX_HEADER, dump_tensors, non_finite, tensor_pieces
from veneer.files.translate import at_scaling
from veneer.names import did_you_mean

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

_NEW_FORMS = ("linear", "transposed", "conv", "conv_across")
_OLD_FORMS = ("linear", "conv")
_LEAVES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora.down.weight", "lora.up.weight", "alpha")


def _recognise(sight: Sight) -> bool:
    """Tell by keys that are all of this format, behind the name of a part, or with what only this format has."""
    if "peft_type" in sight.config or not sight.keys:
        return False
    found = [parse_key(key) for key in sight.keys]
    if not all(found):
        return False
    named = all(component_of(key) for key in sight.keys)
    return named or METADATA in sight.metadata or likely_component(one.path for one in found if one) is not None


def _read(path: Path, hints: Hints) -> Adapter:
    """Return the adapter in a file; see the module's docstring."""
    file = read_single(path)
    problems: list[str] = []
    parts = _sort(file, problems)
    refuse(file.path, "its tensors cannot be used", problems)
    settings = _settings(file, list(parts))
    pieces = {
        component: _with_settings(file, component, found, settings[component])
        if component in settings
        else _without(file, component, found, problems)
        for component, found in parts.items()
    }
    refuse(file.path, "its tensors cannot be used", problems)
    if list(pieces) == [None]:
        alone = pieces[None]
        if hints.component is not None and likely_component(alone.modules) not in (None, hints.component):
            raise AdapterError(f"{file.path}: names no component, and its paths are not those of {hints.component!r}")
        return alone
    modules = {path: pair for part, one in pieces.items() for path, pair in under(part, one.modules).items()}
    first = next(iter(pieces.values()))
    base = first.config if len(pieces) == 1 else None
    whole = Adapter(modules, settings_for(modules, base=base), metadata=first.metadata)
    return select(whole, hints.component, file.path)


def _sort(file: Single, problems: list[str]) -> dict[str | None, dict[str, dict[str, Tensor]]]:
    """Return the tensors by part, path and side."""
    parts: dict[str | None, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in file.tensors.items():
        if len(problems) >= ENOUGH:
            return parts
        found: Key | None = parse_key(key)
        if found is None:
            near = did_you_mean(key.rpartition(".")[2], _LEAVES) or "; expected " + ", ".join(_LEAVES)
            problems.append(f"{key!r}: not a tensor of this format{near}")
            continue
        sides = parts.setdefault(found.component, {}).setdefault(found.path, {})
        if found.side in sides:
            problems.append(f"{key!r}: stands for the same tensor as another key")
        sides[found.side] = tensor
    if None in parts and len(parts) > 1:
        problems += [
            f"{path!r}: does not begin with a component{did_you_mean(path.partition('.')[0], COMPONENTS)}"
            for path in parts[None]
        ]
    for component, modules in parts.items():
        for path, sides in modules.items():
            if missing := [f"lora_{side}" for side in "AB" if side not in sides]:
                where = under(component, {path: None})
                problems.append(f"{next(iter(where))}: {' and '.join(missing)} missing")
    return parts


def _settings(file: Single, components: list[str | None]) -> dict[str | None, dict[str, Any]]:
    """Return PEFT's settings of each part, as the header says them; empty where it does not."""
    text = file.metadata.get(METADATA)
    if text is None:
        return {}
    where = f"{file.path} (header: {METADATA})"
    held = parse_json(text.encode(), where, max_bytes=MAX_HEADER)
    if not isinstance(held, dict):
        raise AdapterError(f"{where}: expected an object of JSON, got {type(held).__name__}")
    if components == [None]:
        return {None: held}
    settings: dict[str | None, dict[str, Any]] = {}
    problems = []
    for key, value in held.items():
        component, _, name = key.partition(".")
        if component in components and name:
            settings.setdefault(component, {})[name] = value
        else:
            problems.append(f"{key!r}: of no component that has tensors{did_you_mean(component, map(str, components))}")
    problems += [f"nothing is said of {component!r}" for component in components if component not in settings]
    refuse(where, "does not fit the tensors", problems)
    return settings


def _with_settings(
    file: Single, component: str | None, modules: Mapping[str, Mapping[str, Tensor]], raw: Mapping[str, Any]
) -> Adapter:
    """Read a part as the PEFT adapter that it is."""
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    if "alpha" in {side for sides in modules.values() for side in sides}:
        raise AdapterError(
            f"{file.path}: alphas stand both beside the tensors and in {METADATA}; which count is not told"
        )
    tensors = {f"{PREFIX}{path}.{names[side]}": one for path, sides in modules.items() for side, one in sides.items()}
    config = {"peft_type": "LORA", **raw}
    try:
        files = {CONFIG: dump_json(config), TENSORS: dump_tensors(tensors)}
        return adapter_from_files(files, f"{file.path} ({component or 'the model'})")
    except AdapterError as error:
        start = "" if component is None else f"{component}."
        refuse(file.path, "its tensors are not what its header says", [
            line.replace(PREFIX, start) for line in error.problems or (error.message,)
        ])  # fmt: skip
        raise


def _without(
    file: Single, component: str | None, modules: Mapping[str, Mapping[str, Tensor]], problems: list[str]
) -> Adapter:
    """Read a part without settings: the scaling is 1, or `alpha / rank` where alphas stand beside the tensors."""
    pairs: dict[str, LowRank] = {}
    for path, sides in modules.items():
        try:
            A, B, alpha = sides["A"], sides["B"], alpha_of(sides)
            scaling = 1.0 if alpha is None else alpha / A.shape[0]
            pairs[path] = pair_from(A, B, scaling, sides.get("magnitude"))
        except AdapterError as error:
            problems.append(f"{next(iter(under(component, {path: None})))}: {error.message}")
    if not pairs:
        refuse(file.path, "its tensors cannot be used", problems or ["it holds none"])
    return Adapter(pairs, settings_for(pairs))


def _write(adapter: Adapter, hints: Hints) -> dict[str, Content]:
    """Return the file that says what an adapter does; what this format has no place for is refused."""
    style = hints.style or "new"
    if style not in STYLES:
        raise AdapterError(f"style: expected one of {', '.join(STYLES)}, got {style!r}{did_you_mean(style, STYLES)}")
    forms = _NEW_FORMS if style == "new" else _OLD_FORMS
    problems = unfit(adapter, forms, "diffusers", dora=forms if style == "new" else ())
    modules = under(hints.component, adapter.modules)
    if lost := [path for path in modules if component_of(path) is None]:
        problems.append(
            f"{several(lost)}: begin with no component ({', '.join(COMPONENTS)}); say which they"
            " are of with --component"
        )
    problems += [
        f"{path}: a convolution in groups, in the {style} style"
        for path, pair in modules.items()
        if style != "new" and pair.form == "conv" and conv_groups(pair.lora_A, pair.lora_B) != 1
    ]
    refuse("diffusers", "the format cannot carry this adapter", problems)
    parts: dict[str, dict[str, LowRank]] = {}
    for path, pair in modules.items():
        component, _, rest = path.partition(".")
        parts.setdefault(component, {})[rest] = at_scaling(pair, 1.0)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, pairs in parts.items():
        if style != "new":
            tensors |= _old(component, pairs, style, problems)
            continue
        part = Adapter(pairs, settings_for(pairs), metadata=replace(adapter.metadata, task_type=None))
        tensors |= {f"{component}.{name}": one for name, one in write_factors(pairs).items()}
        metadata |= {f"{component}.{key}": value for key, value in config_to_peft(part).items()}
    problems += non_finite(tensors)
    refuse("diffusers", "the format cannot carry this adapter", problems)
    header = {METADATA: json.dumps(metadata, indent=2, sort_keys=True)} if metadata else {}
    return {FILE: tensor_pieces(tensors, header)}


def _old(component: str, pairs: Mapping[str, LowRank], style: str, problems: list[str]) -> dict[str, torch.Tensor]:
    name = old_key if style == "old" else oldest_key
    tensors = {}
    for path, pair in pairs.items():
        for side, one in (("A", pair.lora_A), ("B", pair.lora_B)):
            key = name(component, path, side)
            if key is None:
                problems.append(f"{component}.{path}: the oldest style has names for attentions of a U-Net alone")
                break
            tensors[key] = one
    return tensors


FORMAT = Format(
    name="diffusers",
    title="unet.…, transformer.…, text_encoder.… names in one file",
    recognise=_recognise,
    read=_read,
    write=_write,
    file=FILE,
    has_components=True,
)
"""diffusers (0.42.1): reads all three of its styles, writes the newest unless another is asked for."""
