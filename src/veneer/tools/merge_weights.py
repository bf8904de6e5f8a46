"""The arithmetic of a merge: a weight and its update added in float64 and rounded once, a few outputs at a time.

Shapes: O out, I in, R rank, g groups, E experts, N rows of a table, k… a kernel, P some of the outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.factors import conv_groups
from veneer.nn.experts import StackedExperts
from veneer.nn.targets import Target
from veneer.ops.dora import magnitude_ratio

CHUNK = 1 << 17
"""How many weights are added at a time: a handful of float64 temporaries of 1 MiB, whatever the weight's size."""


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values as the nearest of a dtype, ties to even; torch itself goes through float32 to 16 bits.

    Equals rounding the exact value. Rounding twice differs where the float32 between lies on a tie that the value
    does not: 1 + 2⁻⁸ + 2⁻³⁰ is above the middle of two bfloat16 values, its float32 is the middle.

    Example:
        >>> x = torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64)
        >>> round_once(x, torch.bfloat16).item(), x.to(torch.bfloat16).item()
        (1.0078125, 1.0)

    Source:
        Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums", IEEE Transactions on Computers 57(4).
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    # To odd: toward zero, and the last bit set where something was cut off; from there 16 bits are rounded right.
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    return (bits | (back != values).to(torch.int32)).view(torch.float32).to(dtype)


@dataclass(frozen=True)
class Change:
    """What an update does to one weight.

    Args:
        largest: Largest absolute value of the update.
        relative: ‖update‖ / ‖weight‖, Frobenius norms; None for an update of a weight that is zero.
        rounding_loss: ‖stored change − update‖ / ‖update‖; 0 where there is no update.
        unchanged: Share of the weights with an update that are stored as they were before.
    """

    largest: float = 0.0
    relative: float | None = 0.0
    rounding_loss: float = 0.0
    unchanged: float = 0.0


@dataclass(frozen=True)
class _Block:
    """A part of a weight that is a plain product: outputs first in views of what is read and written."""

    source: Tensor
    out: Tensor
    A_RI: Tensor
    B_OR: Tensor
    magnitude_O: Tensor | None


def merge_weight(source: Tensor, out: Tensor, module: nn.Module, target: Target, pair: LowRank) -> Change:
    """Write a weight with its update: float64, rounded once.

    Equals, and is tested against:

        total = source.double() + pair.delta()
        total *= magnitude / norm(total)        # with a magnitude (DoRA); norms over the inputs
        out.copy_(round_once(total, out.dtype))

    Args:
        source: The weight that the update is added to.
        out: What is written, of the same shape; it may be `source` itself.
        module: The layer, which knows how it stores its weight.
        target: What is adapted of it.
        pair: The update.

    Raises:
        AdapterError: If a merged value is not finite, or not as the stored dtype; `out` is written in part then.

    Cost:
        2·O·I·R operations in float64, and a few temporaries of 1 MiB.
    """
    if pair.magnitude is None and not (pair.lora_A.any() and pair.lora_B.any()):
        if out is not source:
            _copy_rounded(source, out, target.path)
        return Change()
    sums = {"weight": 0.0, "update": 0.0, "error": 0.0, "largest": 0.0, "touched": 0.0, "unchanged": 0.0}
    for block in _blocks(source, out, module, target, pair):
        rows = max(1, CHUNK // max(1, block.A_RI.shape[1]))
        A_RI = _wide(block.A_RI, out.device)
        for start in range(0, block.source.shape[0], rows):
            part = slice(start, start + rows)
            before = _wide(block.source[part], out.device)
            exact = before + (pair.scaling * (_wide(block.B_OR[part], out.device) @ A_RI)).view_as(before)
            if block.magnitude_O is not None:
                norm_P = torch.linalg.vector_norm(exact.flatten(1), dim=1)
                ratio_P = magnitude_ratio(_wide(block.magnitude_O[part], out.device), norm_P)
                exact.mul_(ratio_P.view(-1, *(1,) * (exact.ndim - 1)))
            rounded = round_once(exact, out.dtype)
            require_finite(exact, rounded, target.path)
            _count(sums, before, exact, rounded)
            block.out[part] = rounded.to(out.device)
    return _change(sums)


def _copy_rounded(source: Tensor, out: Tensor, path: str) -> None:
    rows = max(1, CHUNK // max(1, source[0].numel()))
    for start in range(0, source.shape[0], rows):
        exact = _wide(source[start : start + rows], out.device)
        rounded = round_once(exact, out.dtype)
        require_finite(exact, rounded, path)
        out[start : start + rows] = rounded.to(out.device)


def _wide(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in float64, on the CPU for devices that have none."""
    return tensor.to("cpu" if device.type == "mps" else device, torch.float64)


def require_finite(exact: Tensor, rounded: Tensor, path: str) -> None:
    """Raise where a merged value is not finite, or leaves the range of its dtype.

    Raises:
        AdapterError: Then.
    """
    if bool(torch.isfinite(rounded).all()):
        return
    if bool(torch.isfinite(exact).all()):
        largest = exact.abs().max().item()
        raise AdapterError(
            f"{path}: the merged weight reaches {largest:.6g}, and {rounded.dtype} ends at "
            f"{torch.finfo(rounded.dtype).max:.6g}; load the base model in bfloat16 or float32 and merge there"
        )
    raise AdapterError(
        f"{path}: the merged weight is not finite: check the base model's weight and the adapter's factors"
    )


def _count(sums: dict[str, float], before: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Add some weights to the sums that a `Change` is made of."""
    stored, update = rounded.to(torch.float64), exact - before
    for name, one in (("weight", before), ("update", update), ("error", stored - exact)):
        sums[name] += torch.linalg.vector_norm(one).item() ** 2
    sums["largest"] = max(sums["largest"], torch.linalg.vector_norm(update, torch.inf).item())
    touched = update != 0
    sums["touched"] += touched.sum().item()
    sums["unchanged"] += touched.logical_and_(stored == before).sum().item()


def _change(sums: Mapping[str, float]) -> Change:
    if not sums["update"]:
        return Change()
    return Change(
        sums["largest"],
        math.sqrt(sums["update"] / sums["weight"]) if sums["weight"] else None,
        math.sqrt(sums["error"] / sums["update"]),
        sums["unchanged"] / sums["touched"],
    )


def stored_change(before: Tensor, exact: Tensor, stored: Tensor, change: Change) -> Change:
    """Return a change with the losses of a stored form other than rounding to a dtype.

    Args:
        before: The weight.
        exact: With its update.
        stored: What the stored form makes of that.
        change: What the update is.
    """
    update, touched = torch.linalg.vector_norm(exact - before, dtype=torch.float64).item(), exact != before
    if not update:
        return change
    error = torch.linalg.vector_norm(stored - exact, dtype=torch.float64).item()
    unchanged = (touched & (stored == before)).sum().item() / touched.sum().item()
    return Change(change.largest, change.relative, error / update, unchanged)


def _blocks(source: Tensor, out: Tensor, module: nn.Module, target: Target, pair: LowRank) -> Iterator[_Block]:
    """Yield the products that a weight is made of: one, or one for each group or expert."""
    form, A, B, magnitude = target.kind.form, pair.lora_A, pair.lora_B, pair.magnitude
    if form == "experts":
        stored_I_first = isinstance(module, StackedExperts) and module.is_transposed
        view: Callable[[Tensor], Tensor] = (lambda one: one.T) if stored_I_first else (lambda one: one)
        for expert in range(A.shape[0]):
            yield _Block(view(source[expert]), view(out[expert]), A[expert], B[expert], None)
    elif form in ("conv", "conv_transpose"):
        groups = conv_groups(A, B)
        # A transposed convolution stores its inputs first, a group's together.
        view = (lambda one: one.transpose(0, 1)) if form == "conv_transpose" else (lambda one: one)
        split = [one.unflatten(0, (groups, -1)) for one in (source, out, A, B)]
        for group in range(groups):
            source_g, out_g, A_g, B_g = (one[group] for one in split)
            magnitude_g = None if magnitude is None else magnitude.unflatten(0, (groups, -1))[group]
            yield _Block(view(source_g), view(out_g), A_g.flatten(1), B_g.flatten(1), magnitude_g)
    elif form in ("transposed", "embedding"):
        yield _Block(source.T, out.T, A, B, magnitude)
    else:
        yield _Block(source, out, A, B, magnitude)
