"""Adapters of kohya's sd-scripts and of LyCORIS: one safetensors file, a module's path with `_` for `.`.

    leaf                  shape                                   meaning
    lora_down.weight      (R, I) or (R, I, k…)                    lora_A
    lora_up.weight        (O, R) or (O, R, 1…)                    lora_B
    lora_mid.weight       (R, R, k…), with a down of (R, I, 1…)   Tucker form: folded into lora_A, which is exact
    alpha                 one value                               scaling = alpha / R; without it, or 0: scaling 1
    dora_scale            (O, 1…)                                 magnitude; (1, I, 1…) is per input, and refused
    hada_…, lokr_…        see `kohya_other`                       LoHa, LoKr
    diff, diff_b, …       see `kohya_trained`                     parameters that trained whole, less the base's

rsLoRA's root stands in alpha already (LyCORIS). DyLoRA saves its full rank. (research: peft-format.md 13)
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.errors import AdapterError
from veneer.factors import conv_groups
from veneer.files.components import component_of, components_in, select, under
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
from veneer.files.kohya_fused import fused_parts
from veneer.files.kohya_names import PREFIXES, Names, flat, grammar_path, prefix_for, split_prefix
from veneer.files.kohya_originals import COMPONENT, FAMILIES, Layer, join, layers_named, split
from veneer.files.kohya_other import LEAVES as OTHER_LEAVES
from veneer.files.kohya_other import alpha_of, read_others
from veneer.files.kohya_trained import LEAVES as WHOLE_LEAVES
from veneer.files.kohya_trained import read_whole, write_whole
from veneer.files.patterns import alpha_giving
from veneer.files.peft_other import OtherAdapter
from veneer.files.strict_json import parse_json
from veneer.files.tensors import MAX_HEADER, non_finite, tensor_pieces
from veneer.files.translate import at_scaling
from veneer.names import did_you_mean

FILE = "lora.safetensors"
FORMS = ("linear", "transposed", "conv")

_DOWN, _UP, _MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
_NUMBERS = ("alpha", "dora_scale")
_LEAVES = (_DOWN, _UP, _MID, *_NUMBERS, *OTHER_LEAVES, *WHOLE_LEAVES)
_KEY = re.compile(
    rf"(?P<name>.+?)(?:[._](?P<low>lora_(?:down|up|mid)\.weight)|\.(?P<leaf>{'|'.join(map(re.escape, _LEAVES))}))"
)
_REFUSED = (
    (re.compile(r"^bundle_emb\."), "an embedding (textual inversion) bundled with the adapter"),
    (re.compile(r"\.(oft_\w+|rescale)$"), "OFT, which multiplies the weight"),
    (re.compile(r"\.(on_input|weight)$"), "(IA)³, which multiplies the output"),
    (re.compile(r"\.lokr_t1$"), "LoKr with a Tucker form of its first half"),
    (re.compile(r"\.(a|b)[12]\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_(down|up)\.bias$"), "a bias of the factors"),
)
_OURS = "veneer"
_BASE, _DROPOUT = "ss_sd_model_name", "ss_network_dropout"
_MOST_NAMES = 1000


@dataclass(frozen=True)
class _Noted:
    """What our own writer put into the header.

    Args:
        is_ours: Whether it did at all.
        paths: Name to path, where the grammar would not find it.
        transposed: Names of layers that store their weight as (in, out).
    """

    is_ours: bool
    paths: Mapping[str, str]
    transposed: frozenset[str]


def _recognise(sight: Sight) -> bool:
    """Tell by the leaves, and by names that hold no dot."""
    found = [one for key in sight.keys if (one := _KEY.fullmatch(key))]
    return bool(found) and any(split_prefix(one["name"]) or one["low"] for one in found)


def _read(path: Path, hints: Hints) -> Adapter | OtherAdapter:
    """Return the adapter in a file; see the module's docstring."""
    file = read_single(path)
    if hints.fused not in (None, "part", "whole"):
        raise AdapterError(f"fused: expected 'part' or 'whole', got {hints.fused!r}")
    problems: list[str] = []
    noted = _read_noted(file, problems)
    named = _by_name(file.tensors, problems)
    originals = _originals(named, noted)
    paths = _paths(named, hints, noted, originals, problems)
    refuse(file.path, "its tensors cannot be used", problems)
    modules = {paths[name]: parts for name, parts in named.items()}
    others = {path: parts for path, parts in modules.items() if set(parts) & set(OTHER_LEAVES)}
    if others:
        rest = [path for path in modules if path not in others]
        problems += [f"{path}: LoRA, or trained whole, in one file with LoHa or LoKr" for path in rest]
        refuse(file.path, "holds two kinds of adapters; split it by kind first", problems)
        return select(read_others(others, hints, file.path), hints.component, file.path)
    pairs: dict[str, LowRank] = {}
    for name, parts in named.items():
        if set(parts) & {_DOWN, _UP, _MID}:
            try:
                pair = _pair(parts, hints, noted)
            except AdapterError as error:
                problems.append(f"{name}: {error.message}")
                continue
            if name in originals and paths[name] == _original_path(originals[name]):
                pairs |= _split(name, originals[name], pair, problems)
                continue
            pairs[paths[name]] = replace(pair, form="transposed") if name in noted.transposed else pair
    trained, saved = read_whole(modules, hints, problems)
    problems += [
        f"{name}: has what trained whole, which is not read of a layer under its original name"
        for name, layer in originals.items()
        if set(named[name]) & set(WHOLE_LEAVES) and paths[name] == _original_path(layer)
    ]
    refuse(file.path, "its tensors cannot be used", problems)
    config = settings_for(pairs, saved=saved)
    if any(path.removesuffix(".bias") in pairs for path in trained):
        config = config.model_copy(update={"bias": "lora_only"})
    config = config.model_copy(update={"dropout": _dropout(file.metadata)})
    metadata = AdapterMetadata(base=file.metadata.get(_BASE) or None)
    return select(Adapter(pairs, config, trained, metadata), hints.component, file.path)


def _originals(named: Mapping[str, Mapping[str, Tensor]], noted: _Noted) -> dict[str, Layer]:
    """Return the layers of the names that are Flux's or Stable Diffusion 3's own, where all of a model's are."""
    starts = {name: found[2] for name in named if (found := split_prefix(name)) and found[1] == "unet"}
    if noted.paths.keys() & starts.keys() or any(set(parts) & set(OTHER_LEAVES) for parts in named.values()):
        return {}
    layers = layers_named(starts.values())
    return {name: layers[rest] for name, rest in starts.items() if rest in layers}


def _original_path(layer: Layer) -> str:
    return f"{COMPONENT}.{layer.original}"


def _split(name: str, layer: Layer, pair: LowRank, problems: list[str]) -> dict[str, LowRank]:
    """Return the factors by diffusers' paths."""
    try:
        return under(COMPONENT, split(layer, pair))
    except AdapterError as error:
        problems.append(f"{name}: {error.message}")
        return {}


def _dropout(metadata: Mapping[str, str]) -> float:
    """Return the dropout that sd-scripts noted; none where it noted none, or nothing that is one."""
    try:
        value = float(metadata.get(_DROPOUT, 0))
    except ValueError:
        return 0.0
    return value if 0 <= value < 1 else 0.0


def _by_name(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each name by their leaves."""
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if len(problems) >= ENOUGH:
            return named
        found = _KEY.fullmatch(key)
        if found is None:
            refused = next((what for pattern, what in _REFUSED if pattern.search(key)), None)
            near = did_you_mean(key.rpartition(".")[2], _LEAVES)
            problems.append(f"{key!r}: {refused + ' is not read' if refused else 'not a tensor of this format' + near}")
            continue
        leaf, parts = found["low"] or found["leaf"], named.setdefault(found["name"], {})
        if leaf in parts:
            problems.append(f"{key!r}: stands for the same tensor as another key")
        parts[leaf] = tensor
    whole = [name for name, parts in named.items() if not set(parts) <= set(_NUMBERS)]
    for name, parts in named.items():
        if set(parts) <= set(_NUMBERS) and len(problems) < ENOUGH:
            near = did_you_mean(name, whole[:_MOST_NAMES])
            problems.append(f"{name}: {' and '.join(sorted(parts))} without factors{near}")
    return named


def _paths(
    named: Mapping[str, Mapping[str, Tensor]],
    hints: Hints,
    noted: _Noted,
    originals: Mapping[str, Layer],
    problems: list[str],
) -> dict[str, str]:
    """Return the path of each name, the part of the pipeline first; two names of one path are a problem."""
    base = Names(hints.base.tensors) if hints.base else None
    paths: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in named:
        if len(problems) >= ENOUGH:
            break
        prefixed = split_prefix(name)
        if prefixed is None and "." not in name:
            near = did_you_mean(name, [f"{prefix}_{name}" for prefix in PREFIXES])
            problems.append(f"{name!r}: expected a name that begins with {', '.join(PREFIXES)}{near}")
            continue
        _, component, rest = prefixed or ("", None, name)
        try:
            if name in originals and not (base is not None and base.has(rest, component)):
                component, path = COMPONENT, originals[name].original
            elif base is not None:
                path = base.path(rest, component)
            elif name in noted.paths:
                path = noted.paths[name]
            else:
                path = rest if "." in rest else grammar_path(rest)
        except AdapterError as error:
            problems.append(f"{name!r}: {error.message}")
            continue
        path = path if component is None else f"{component}.{path}"
        if path in owners:
            problems.append(f"{name!r}: stands for {path}, as {owners[path]!r} does")
        owners[path], paths[name] = name, path
    return paths


def _pair(parts: Mapping[str, Tensor], hints: Hints, noted: _Noted) -> LowRank:
    """Return the factors of one name."""
    if missing := [leaf for leaf in (_DOWN, _UP) if leaf not in parts]:
        raise AdapterError(f"{' and '.join(missing)} missing")
    if both := set(parts) - {_DOWN, _UP, _MID, *_NUMBERS} - {"diff_b"}:
        raise AdapterError(f"{', '.join(sorted(both))} cannot stand beside factors")
    A, B = parts[_DOWN], parts[_UP]
    if _MID in parts:
        A = _fold(A, parts[_MID])
    pair = pair_from(A, B, 1.0)
    magnitude = _magnitude(parts["dora_scale"], pair) if "dora_scale" in parts else None
    return pair_from(A, B, _scaling(parts, pair, hints, noted), magnitude)


def _fold(down: Tensor, mid: Tensor) -> Tensor:
    """Return `mid · down` as a kernel (R, I, k…): in Tucker form down looks at one point, mid has the kernel."""
    fits = mid.ndim >= 3 and down.ndim == mid.ndim and mid.shape[1] == down.shape[0]
    if not fits or any(size != 1 for size in down.shape[2:]):
        raise AdapterError(f"lora_mid {tuple(mid.shape)} and lora_down {tuple(down.shape)} are no Tucker form")
    wide = torch.promote_types(torch.promote_types(down.dtype, mid.dtype), torch.float32)
    return torch.einsum("pq...,qi->pi...", mid.double(), down.flatten(1).double()).to(wide)


def _magnitude(scale: Tensor, pair: LowRank) -> Tensor:
    """Return a magnitude of each output.

    Raises:
        AdapterError: If it is one of each input, which no layer here has.
    """
    out_size, in_size = pair.sizes
    shape = tuple(scale.shape)
    if scale.ndim and shape[0] == out_size and scale.numel() == out_size:
        return scale
    if scale.ndim > 1 and shape[0] == 1 and shape[1] * pair.lora_A[0, 0].numel() == in_size:
        raise AdapterError(
            f"dora_scale {shape} is per input (LyCORIS with wd_on_output=False), which plain DoRA has not;"
            " merge it with LyCORIS and extract a LoRA"
        )
    raise AdapterError(f"dora_scale: expected shape ({out_size}, 1…), got {shape}")


def _scaling(parts: Mapping[str, Tensor], pair: LowRank, hints: Hints, noted: _Noted) -> float:
    alpha = alpha_of(parts)
    if alpha is None:
        return 1.0
    count = 0 if noted.is_ours else fused_parts(pair)
    if count and hints.fused is None:
        whole, part = alpha / pair.rank, alpha * count / pair.rank
        raise AdapterError(
            f"lora_up is zero but for {count} blocks, as where {count} layers that trained apart are stored as one;"
            f" whether alpha {alpha:g} counts for each of them (scaling {part:g}, what sd-scripts trained with) or for"
            f" the whole (scaling {whole:g}, what most loaders apply) the file does not tell."
            " Say --fused part or --fused whole"
        )
    return alpha * (count if count and hints.fused == "part" else 1) / pair.rank


def _read_noted(file: Single, problems: list[str]) -> _Noted:
    """Return what our own writer said in the header; a path must be what its name stands for."""
    text = file.metadata.get(_OURS)
    if text is None:
        return _Noted(False, {}, frozenset())
    held: Any = parse_json(text.encode(), f"{file.path} (header: {_OURS})", max_bytes=MAX_HEADER)
    paths = held.get("paths", {}) if isinstance(held, dict) else None
    transposed = held.get("transposed", []) if isinstance(held, dict) else None
    if not isinstance(paths, dict) or not isinstance(transposed, list):
        problems.append(f"header: {_OURS}: expected `paths` from names to paths and a list `transposed`")
        return _Noted(True, {}, frozenset())
    for name, path in paths.items():
        prefixed = split_prefix(name)
        if not isinstance(path, str) or prefixed is None or flat(path) != prefixed[2]:
            problems.append(f"header: {_OURS}: {name!r} does not stand for {path!r}")
    return _Noted(True, paths, frozenset(str(name) for name in transposed))


def _write(adapter: Adapter, hints: Hints) -> dict[str, Content]:
    """Return the file that says what an adapter does; what this format has no place for is refused."""
    advice = {
        "embedding": "kohya's and LyCORIS's loaders know linear layers and convolutions",
        "experts": "kohya's and LyCORIS's loaders know no stacked experts",
    }
    problems = unfit(adapter, FORMS, "kohya", dora=FORMS, trained=True, advice=advice)
    problems += [
        f"{path}: a convolution in {conv_groups(pair.lora_A, pair.lora_B)} groups"
        for path, pair in adapter.modules.items()
        if pair.form == "conv" and conv_groups(pair.lora_A, pair.lora_B) != 1
    ]
    if hints.style is not None and hints.style not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise AdapterError(f"style: expected one of {known}, got {hints.style!r}{did_you_mean(hints.style, FAMILIES)}")
    placed = under(hints.component, adapter.modules)
    if hints.style is not None:
        placed = _under_originals(placed, adapter, hints.style, problems)
    alpha = _common_alpha(placed)
    modules = {path: _at_alpha(pair, alpha) for path, pair in placed.items()}
    named = _names(modules, under(hints.component, adapter.trained), problems)
    tensors: dict[str, Tensor] = {}
    for path, pair in modules.items():
        if path in named:
            tensors |= {f"{named[path]}.{leaf}": one for leaf, one in _leaves(pair, alpha).items()}
    for path, (leaf, one) in write_whole(under(hints.component, adapter.trained), modules, hints, problems).items():
        module = path.rpartition(".")[0]
        if module in named:
            tensors[f"{named[module]}.{leaf}"] = one
    problems += non_finite(tensors)
    refuse("kohya", "the format cannot carry this adapter", problems)
    return {FILE: tensor_pieces(tensors, _metadata(modules, named, alpha, hints.style) | _origin(adapter))}


def _under_originals(
    modules: Mapping[str, LowRank], adapter: Adapter, family: str, problems: list[str]
) -> dict[str, LowRank]:
    """Return the modules with those of the transformer under a family's own names, which sd-scripts calls `unet`."""
    ours = {path: pair for path, pair in modules.items() if component_of(path) == COMPONENT}
    if not ours:
        problems.append(f"nothing is of the {COMPONENT}, which {family} has names for; say so with --component")
    if any(component_of(path) in (COMPONENT, None) for path in adapter.trained):
        problems.append(f"{next(iter(adapter.trained))}: trained whole, which {family}'s own names are not written for")
    try:
        joined = join({path.removeprefix(f"{COMPONENT}."): pair for path, pair in ours.items()}, family)
    except AdapterError as error:
        problems += error.problems
        return dict(modules)
    return under("unet", joined) | {path: pair for path, pair in modules.items() if path not in ours}


def _origin(adapter: Adapter) -> dict[str, str]:
    """Return what sd-scripts notes of the base and of training, as far as it is known."""
    base, dropout = adapter.metadata.base, adapter.config.dropout
    return ({_BASE: base} if base else {}) | ({_DROPOUT: f"{dropout:g}"} if dropout else {})


def _common_alpha(modules: Mapping[str, LowRank]) -> float:
    """Return the alpha of the file: that of most modules.

    A file could hold one for each module, but diffusers (0.42.1) loses those of attentions that are not like most.
    """
    alphas = [alpha_giving(pair.scaling, pair.rank, False) for pair in modules.values() if pair.scaling > 0]
    return Counter(sorted(alphas)).most_common(1)[0][0] if alphas else 1.0


def _at_alpha(pair: LowRank, alpha: float) -> LowRank:
    """Return the pair with the scaling that an alpha gives; as it is where that is but for the last digit."""
    scaling = alpha / pair.rank
    return pair if math.isclose(pair.scaling, scaling, rel_tol=1e-12) else at_scaling(pair, scaling)


def _leaves(pair: LowRank, alpha: float) -> dict[str, Tensor]:
    exact = torch.tensor(alpha, dtype=torch.float64)
    number = exact.float() if exact.float().double() == exact else exact
    leaves = {_DOWN: pair.lora_A, _UP: pair.lora_B, "alpha": number.clone()}
    if pair.magnitude is not None:
        leaves["dora_scale"] = pair.magnitude.reshape(-1, *(1,) * (pair.lora_A.ndim - 1))
    return leaves


def _names(modules: Mapping[str, Any], trained: Mapping[str, Tensor], problems: list[str]) -> dict[str, str]:
    """Return the name of each module; two modules of one name are a problem."""
    paths = dict.fromkeys([*modules, *(path.rpartition(".")[0] for path in trained)])
    components = components_in(paths)
    named: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in paths:
        try:
            prefix, rest = prefix_for(path, components)
        except AdapterError as error:
            problems.append(error.message)
            continue
        name = f"{prefix}_{flat(rest)}"
        if name in owners:
            problems.append(f"{path}: has the name {name!r}, as {owners[name]} has")
        named[path], owners[name] = name, path
    return named


def _metadata(
    modules: Mapping[str, LowRank], named: Mapping[str, str], alpha: float, family: str | None
) -> dict[str, str]:
    """Return sd-scripts' metadata, and what names alone would not tell."""
    paths = {}
    for path, name in named.items():
        found = split_prefix(name)
        if found is None:
            continue
        rest = path if found[1] is None else path.removeprefix(f"{found[1]}.")
        is_original = found[1] == "unet" and bool(layers_named([found[2]]))
        try:
            told = is_original if family and found[1] == "unet" else not is_original and grammar_path(found[2]) == rest
        except AdapterError:
            told = False
        if not told:
            paths[name] = rest
    transposed = sorted(named[path] for path, pair in modules.items() if pair.form == "transposed")
    metadata = {_OURS: json.dumps({"paths": paths, "transposed": transposed}, sort_keys=True)}
    if not modules:
        return metadata
    pairs = modules.values()
    rank = Counter(sorted(one.rank for one in pairs)).most_common(1)[0][0]
    convolutions, magnitudes = any(one.form == "conv" for one in pairs), any(one.magnitude is not None for one in pairs)
    arguments: dict[str, str] = {}
    if convolutions or magnitudes:
        arguments = {"algo": "lora", "conv_dim": str(rank), "conv_alpha": f"{alpha:g}"}
    if magnitudes:
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    return metadata | {
        "ss_network_module": "lycoris.kohya" if arguments else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments, sort_keys=True),
    }


FORMAT = Format(
    name="kohya",
    title="sd-scripts and LyCORIS: lora_unet_…, lora_te_…, lycoris_… names in one file",
    recognise=_recognise,
    read=_read,
    write=_write,
    file=FILE,
    has_components=True,
)
"""kohya's sd-scripts (February 2026) and LyCORIS (4.1.3)."""
