"""What trained whole in files of LyCORIS: stored as the difference from the base, which is needed to read or write it.

leaf      of what                              parameter
diff      a linear layer or a convolution      its weight
diff_b    the same                             its bias
w_norm    a normalisation                      its weight
b_norm    the same                             its bias
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.errors import VeneerError
from veneer.files.components import base_name
from veneer.files.format import Hints
from veneer.files.shards import read_tensor

LEAVES = ("diff", "diff_b", "w_norm", "b_norm")
_PARAMETERS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def read_whole(
    modules: Mapping[str, Mapping[str, Tensor]], hints: Hints, problems: list[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the values of parameters that trained whole by path, and the modules that did so.

    The base's value plus the difference, rounded once to the wider of their dtypes.

    Args:
        modules: Module path to its tensors by leaf.
        hints: Its base holds what the differences are from.
        problems: Where to note what is wrong.
    """
    trained: dict[str, Tensor] = {}
    saved: set[str] = set()
    for path, parts in modules.items():
        for leaf in LEAVES:
            if leaf not in parts:
                continue
            name = f"{path}.{_PARAMETERS[leaf]}"
            base = _base_value(name, parts[leaf], hints, problems)
            if base is not None:
                dtype = torch.promote_types(base.dtype, parts[leaf].dtype)
                trained[name] = (base.double() + parts[leaf].double()).to(dtype)
            if "lora_up.weight" not in parts:
                saved.add(path)
    return trained, saved


def write_whole(
    trained: Mapping[str, Tensor], modules: Mapping[str, object], hints: Hints, problems: list[str]
) -> dict[str, tuple[str, Tensor]]:
    """Return the leaf and the difference from the base of each parameter that trained whole.

    Args:
        trained: Parameter path to its values.
        modules: The adapted modules by path; a bias of one of them is `diff_b`.
        hints: Its base holds what the differences are from.
        problems: Where to note what is wrong.
    """
    written: dict[str, tuple[str, Tensor]] = {}
    for name, value in trained.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or not path:
            problems.append(f"{name}: trained whole, and neither a weight nor a bias")
            continue
        base = _base_value(name, value, hints, problems)
        if base is None:
            continue
        weight = trained.get(f"{path}.weight")
        is_norm = path not in modules and (weight.ndim == 1 if weight is not None else _is_vector(path, hints))
        kind = ("w_norm" if is_norm else "diff") if leaf == "weight" else ("b_norm" if is_norm else "diff_b")
        written[name] = (kind, (value.double() - base.double()).float())
    return written


def _base_value(name: str, like: Tensor, hints: Hints, problems: list[str]) -> Tensor | None:
    if hints.base is None:
        problems.append(f"{name}: trained whole, stored as the difference from the base; give --base")
        return None
    try:
        value = read_tensor(hints.base, base_name(name, hints.base.tensors))
    except VeneerError as error:
        problems.append(f"{name}: {error.message}")
        return None
    if value.shape != like.shape:
        problems.append(f"{name}: expected the base's shape {tuple(value.shape)}, got {tuple(like.shape)}")
        return None
    return value


def _is_vector(path: str, hints: Hints) -> bool:
    known = {} if hints.base is None else hints.base.shapes
    return len(known.get(base_name(f"{path}.weight", known), ())) == 1
