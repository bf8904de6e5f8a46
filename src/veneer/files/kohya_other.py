"""LoHa and LoKr in files of LyCORIS: the leaves of PEFT's methods, with alpha and no configuration.

What PEFT's configuration says stands in the shapes here: the rank, and how LoKr is cut. LyCORIS takes a scaling of 1
for LoKr whose halves are both whole matrices.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.components import base_name
from veneer.files.foreign import refuse
from veneer.files.format import Hints
from veneer.files.peft_loha import LOHA
from veneer.files.peft_lokr import LOKR
from veneer.files.peft_method import ModuleUpdate, Parts, Raw
from veneer.files.peft_other import OtherAdapter, read_modules
from veneer.files.shards import Checkpoint

LEAVES = (*LOHA.tensors, *LOKR.tensors)
"""Names of the tensors of both."""

_NUMBERS = ("alpha", "dora_scale")
_RANKED = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first size is the rank."""


def read_others(modules: Mapping[str, Mapping[str, Tensor]], hints: Hints, where: Path) -> OtherAdapter:
    """Return the LoHa or LoKr adapter of a file.

    Args:
        modules: Module path to its tensors by leaf.
        hints: With a base, shapes are checked against it, and convolutions get theirs.
        where: What errors call the file.

    Raises:
        AdapterError: If shapes do not fit the method, or there are magnitudes (DoRA); every problem is listed.
    """
    problems = [
        f"{path}: dora_scale on LoHa or LoKr is not read" for path, one in modules.items() if "dora_scale" in one
    ]
    updates: dict[str, ModuleUpdate] = {}
    names = []
    for method in (LOHA, LOKR):
        own = {path: parts for path, parts in modules.items() if set(parts) & set(method.tensors)}
        if own:
            names.append(method.name.lower())
            numbers = _numbers(own, problems)
            by_shape = replace(method, numbers=lambda *_, numbers=numbers: numbers, fits=lambda *_: [])
            shapes = None if hints.base is None else _shapes(own, hints.base)
            plain = {path: _plain(path, parts, shapes, problems) for path, parts in own.items()}
            raw = Raw(plain, {}, {}, shapes, problems)
            updates.update(read_modules(by_shape, raw))
    refuse(where, "its tensors cannot be used", problems)
    return OtherAdapter(
        method=" and ".join(names),
        modules=MappingProxyType(dict(sorted(updates.items()))),
        settings=MappingProxyType({}),
        config=LoRAConfig(target_modules=tuple(sorted(updates))),
    )


def alpha_of(parts: Mapping[str, Tensor]) -> float | None:
    """Return a module's alpha; None where it has none, or zero: its scaling is then 1.

    Raises:
        AdapterError: If it is not one finite number.

    Example:
        >>> alpha_of({"alpha": torch.tensor(4.0)}), alpha_of({})
        (4.0, None)
    """
    held = parts.get("alpha")
    if held is None:
        return None
    if held.numel() != 1 or not bool(torch.isfinite(held.double()).all()):
        raise AdapterError(f"alpha: expected one finite number, got shape {tuple(held.shape)}")
    return float(held.double().item()) or None


def _plain(
    path: str, parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None, problems: list[str]
) -> dict[str, Tensor]:
    """Return the method's own tensors, laid out so that PEFT's order of multiplying them out is LyCORIS's.

    PEFT takes the product with a flat kernel (or a kernel of one dimension) in another order than LyCORIS, which
    unfolds the kernel first. With a w2 of four dimensions both are the same; how a flat one unfolds only the base tells.
    """
    plain = {leaf: one for leaf, one in parts.items() if leaf not in _NUMBERS}
    w2, a, b = (plain.get(leaf) for leaf in ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))
    if w2 is not None and w2.ndim == 3:
        plain["lokr_w2"] = w2[..., None]
    if "lokr_t2" in plain or a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        return plain
    if shapes is None and "conv" in path:
        problems.append(f"{path}: a convolution of LoKr whose kernel the file keeps flat; give --base")
    kernel = (shapes or {}).get(path, ())[2:]
    if prod(kernel) > 1 and b.shape[1] % prod(kernel) == 0:
        whole = (a.double() @ b.double()).unflatten(1, (-1, *kernel))
        del plain["lokr_w2_a"], plain["lokr_w2_b"]
        plain["lokr_w2"] = whole if whole.ndim == 4 else whole[..., None]
    return plain


def _shapes(paths: Iterable[str], base: Checkpoint) -> dict[str, tuple[int, ...]]:
    known = base.shapes
    names = {path: base_name(f"{path}.weight", known) for path in paths}
    return {path: known[name] for path, name in names.items() if name in known}


def _numbers(modules: Mapping[str, Parts], problems: list[str]) -> dict[str, tuple[int, float]]:
    """Return the rank and the scaling of each module by its shapes; 1 and 1 where no half is a product."""
    numbers = {}
    for path, parts in modules.items():
        held = next((parts[name] for name in _RANKED if name in parts and parts[name].ndim), None)
        rank = held.shape[0] if held is not None else None
        try:
            alpha = alpha_of(parts)
        except AdapterError as error:
            problems.append(f"{path}: {error.message}")
            continue
        numbers[path] = (rank, alpha / rank if alpha is not None else 1.0) if rank else (1, 1.0)
    return numbers
