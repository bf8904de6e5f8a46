"""VeRA: one pair of random matrices for all layers, two small vectors for each.

Shapes: O out, I in, R rank.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.files.peft_method import Method, Parts, Raw
from veneer.files.peft_values import choice, number, show
from veneer.ops.low_rank import Factors, require_affordable

_RANK = 256
_OWN = ("vera_lambda_b", "vera_lambda_d")
_CURE = 'shapes={"path.of.the.layer": (out, in), ...} of the base\'s weights'


def draw_projections(key: int, rank: int, out_size: int, in_size: int) -> tuple[Tensor, Tensor]:
    """Return the A and B that PEFT draws from a key where the file has none.

    A is drawn first, each from the uniform distribution within ±√(6 / columns), by PyTorch's generator of the CPU.

    Args:
        key: `projection_prng_key`.
        rank: VeRA's `r`.
        out_size: The largest of all adapted layers.
        in_size: The largest of all adapted layers.

    Example:
        >>> A, B = draw_projections(0, 2, 3, 4)
        >>> A.shape, B.shape, bool(A.abs().max() < 1.5**0.5)
        (torch.Size([2, 4]), torch.Size([3, 2]), True)

    Source:
        PEFT 0.21.2 `tuners/vera/model.py`; the same numbers only as long as PyTorch's generator stays the same.
    """
    require_affordable(rank, out_size, in_size)
    generator = torch.Generator(device="cpu").manual_seed(key)

    def uniform(rows: int, columns: int) -> Tensor:
        # Rounded in this order, so that the last bit is PEFT's too.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    return uniform(rank, in_size), uniform(out_size, rank)


def _settings(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    key = raw.get("projection_prng_key", 0)
    if type(key) is not int or not -(2**63) <= key < 2**64:
        problems.append(f"projection_prng_key: expected a 64-bit whole number, got {show(key)}")
        key = 0
    return {
        "r": number(raw, "r", _RANK, problems, whole=True),
        "projection_prng_key": key,
        "save_projection": choice(raw, "save_projection", (True, False), problems),
    }


def _numbers(settings: Mapping[str, Any], paths: Collection[str], _problems: list[str]) -> dict[str, tuple[int, float]]:
    return dict.fromkeys(paths, (settings["r"], 1.0))


def _complete(raw: Raw) -> Mapping[str, Parts]:
    """Give each module its rows of B and its columns of A."""
    modules = raw.modules.items()
    missing = [f"{path}: {name} is missing" for path, parts in modules for name in _OWN if name not in parts]
    if missing:
        raw.problems.extend(missing)
        return {}
    outs = {path: parts["vera_lambda_b"].numel() for path, parts in raw.modules.items()}
    shapes = {path: tuple(raw.shapes[path]) for path in raw.modules if path in raw.shapes} if raw.shapes else {}
    ins = {path: int(shape[1]) for path, shape in shapes.items() if len(shape) == 2}
    raw.problems.extend(
        f"{path}: VeRA adapts linear layers; `shapes` says {shape}" for path, shape in shapes.items() if path not in ins
    )
    shared = _shared(raw, outs, ins)
    if shared is None:
        return {}
    A, B = shared
    if raw.shapes is None and len(raw.modules) == 1:
        ins = dict.fromkeys(raw.modules, A.shape[1])  # A is as wide as the widest layer: this one
    if raw.shapes is None and len(raw.modules) > 1:
        raw.problems.append(
            f"the file does not say how wide the inputs of its {len(raw.modules)} layers are; give read_other {_CURE}"
        )
    if not raw.modules or len(ins) < len(raw.modules):
        return {}
    expected = (raw.settings["r"], max(ins.values())), (max(outs.values()), raw.settings["r"])
    for name, tensor, shape in zip(("vera_A", "vera_B"), shared, expected, strict=True):
        if tuple(tensor.shape) != shape:
            raw.problems.append(f"{name}: expected shape {shape}, as r and the layers say, got {tuple(tensor.shape)}")
            return {}
    return {
        path: {**parts, "vera_A": A[:, : ins[path]], "vera_B": B[: outs[path]]} for path, parts in raw.modules.items()
    }


def _shared(raw: Raw, outs: Mapping[str, int], ins: Mapping[str, int]) -> tuple[Tensor, Tensor] | None:
    """Return A and B, from the file or drawn again."""
    if raw.settings["save_projection"]:
        missing = [name for name in ("vera_A", "vera_B") if name not in raw.shared]
        raw.problems.extend(f"'base_model.{name}': missing, but save_projection=True" for name in missing)
        wrong = [name for name, one in raw.shared.items() if one.ndim != 2 or not one.is_floating_point()]
        raw.problems.extend(f"{name}: expected a matrix of floating numbers" for name in wrong)
        return None if missing or wrong else (raw.shared["vera_A"], raw.shared["vera_B"])
    if raw.shared:
        raw.problems.append("has projections, and save_projection=False says it has none; PEFT would not use them")
    elif raw.shapes is None:
        raw.problems.append(
            "save_projection=False: the projections are as large as the largest layer, which the file does not tell;"
            f" give read_other {_CURE}, or save it again from PEFT with save_projection=True"
        )
    elif ins:
        widest, highest = max(ins.values()), max(outs.values())
        return draw_projections(raw.settings["projection_prng_key"], raw.settings["r"], highest, widest)
    return None


def _fits(_parts: Parts, _rank: int, _settings: Mapping[str, Any]) -> list[str]:
    return []


def _shape(parts: Parts) -> tuple[int, ...]:
    return (parts["vera_B"].shape[0], parts["vera_A"].shape[1])


def _delta(parts: Parts, scaling: float) -> Tensor:
    """Return `(lambda_b ∘ B) (lambda_d ∘ A)`."""
    found = _factors(parts, scaling, None)
    return found.B_OR @ found.A_RI


def _factors(parts: Parts, scaling: float, most: int | None) -> Factors:  # noqa: ARG001
    B = parts["vera_lambda_b"].double()[:, None] * parts["vera_B"].double()
    A = parts["vera_lambda_d"].double()[:, None] * parts["vera_A"].double()
    return Factors(scaling * B, A)


VERA = Method(
    name="VeRA",
    layouts=(
        {"vera_lambda_b": ("out",), "vera_lambda_d": ("r",), "vera_A": ("r", "in"), "vera_B": ("out", "r")},
    ),
    keys=("r", "projection_prng_key", "save_projection", "vera_dropout", "bias"),
    ignored=("d_initial", "init_weights"),
    unsupported={"fan_in_fan_out": "weights stored transposed (Conv1D)"},
    settings=_settings,
    numbers=_numbers,
    fits=_fits,
    shape=_shape,
    delta=_delta,
    factors=_factors,
    dropout="vera_dropout",
    only="vera_only",
    shared=("vera_A", "vera_B"),
    complete=_complete,
)  # fmt: skip
"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454; PEFT 0.21.2 `tuners/vera`)."""
