"""The arithmetic of a merge on files: float64's result, most of it computed in float32 and proved to be the same.

Shapes: O out, I in, R rank, M matrices of a weight, P a run of its rows.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.factors import as_matrices
from veneer.nn.kinds import KINDS
from veneer.nn.targets import Target
from veneer.tools.merge_weights import CHUNK, Change, merge_weight, require_finite, round_once

SAMPLED = 8
"""Of every so many runs of rows, one is looked at for what rounding lost and what stayed as it was."""

_RUN = 1 << 20
"""How many weights are added at a time: with 4 MiB, Python hinders two threads less than memory does (measured)."""
_UNIT = 2.0**-24
_TINY = 2.0**-120
_SWAPPED = ("transposed", "embedding")


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that each compute with one; torch's own, which wait for each other in every operation, rest.

    Measured: where another process takes one of two cores, an operation that torch divides takes 20 times as long.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(1)
            yield pool
    finally:
        torch.set_num_threads(before)


def add_update(
    weight: Tensor, out: Tensor, pair: LowRank, path: str, pool: ThreadPoolExecutor, *, swapped: bool = False
) -> Change:
    """Write a weight with its update: what float64 gives, rounded once.

    Equals `merge_weight`, every element. For 16-bit results it is computed in float32 with a bound of the error: where
    both ends of what the sum can be round to the same number, that is the one that float64 gives; the others, some
    thousandths, are computed in float64.

    Args:
        weight: What is stored.
        out: What is written, of the same shape; it may be `weight` itself.
        pair: The update.
        path: What errors call it.
        pool: Threads to compute in.
        swapped: Whether stacked experts are stored (E, I, O).

    Raises:
        AdapterError: If a merged value is not finite, or leaves the range of the dtype.

    Cost:
        2·O·I·R operations and some passes over blocks of 4 MiB: a fifth of `merge_weight`'s time for 16 bits.
    """
    narrow = out.dtype in (torch.bfloat16, torch.float16) and weight.dtype != torch.float64
    provable = narrow and torch.get_float32_matmul_precision() == "highest"
    if not provable or pair.magnitude is not None or pair.form == "conv_transpose" or not weight.numel():
        view, into = (weight.mT, out.mT) if swapped else (weight, out)
        return merge_weight(view, view if out is weight else into, nn.Module(), _target(path, pair), pair)
    A_MRI, B_MOR = as_matrices(pair.form, pair.lora_A, pair.lora_B)
    if swapped or pair.form in _SWAPPED:  # the weight is the other way round, so its rows are the inputs
        A_MRI, B_MOR = B_MOR.mT, A_MRI.mT
    stacks = [one.reshape(len(A_MRI), -1, A_MRI.shape[2]) for one in (weight, out)]
    blocks = [
        _block(W_OI, out_OI, A_RI, B_OR, pair.scaling)
        for W_OI, out_OI, A_RI, B_OR in zip(*stacks, A_MRI, B_MOR, strict=True)
    ]
    runs = [(block, rows) for block in blocks for rows in _runs(*block.W_OI.shape)]

    def add(number: int) -> _Sums:
        return _add_run(*runs[number], path, sampled=number % SAMPLED == 0)

    sums = pool.map(add, range(len(runs)))
    return _change(list(sums), sum(block.update2 for block in blocks))


@dataclass(frozen=True)
class _Block:
    """A part of a weight that is a plain product, and its factors in both precisions.

    In float32 `B` holds the scaling; in float64 it is applied to the product, as `merge_weight` does: beside a tie the
    order of two roundings decides. `reach` is the largest norm of a column of A: with the norm of a row of B it bounds
    every product of both.
    """

    W_OI: Tensor
    out_OI: Tensor
    A_RI: Tensor
    B_OR: Tensor
    exact_A_IR: Tensor
    exact_B_OR: Tensor
    scaling: float
    reach: float
    update2: float


@dataclass(frozen=True)
class _Sums:
    """What a run of rows adds to a `Change`."""

    weight2: float
    largest: float
    sampled: tuple[float, float, int, int] | None


def _block(W_OI: Tensor, out_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> _Block:
    A, B = A_RI.double(), B_OR.double()
    update2 = scaling**2 * ((B.T @ B) * (A @ A.T)).sum().item()  # ‖s B A‖² by the small Gram matrices
    reach = torch.linalg.vector_norm(A, dim=0).max().item()
    return _Block(
        W_OI, out_OI, A.float(), (scaling * B).float(), A.T.contiguous(), B, scaling, reach, max(0.0, update2)
    )


def _runs(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _RUN // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _add_run(block: _Block, rows: slice, path: str, *, sampled: bool) -> _Sums:
    """Write some rows with their update."""
    W_PI, B_PR, dtype = block.W_OI[rows], block.B_OR[rows], block.out_OI.dtype
    x_PI, d_PI = W_PI.to(torch.float32, copy=True), B_PR @ block.A_RI
    weight2 = torch.linalg.vector_norm(x_PI).item() ** 2
    widest, largest = _largest(x_PI), _largest(d_PI)
    x_PI += d_PI
    # |x - exact| is at most: the factors and the product's sums rounded, then this sum, and once more for what rounding
    # to float32 before rounding to 16 bits can do to a value beside a tie.
    longest_P = torch.linalg.vector_norm(B_PR, dim=1) * block.reach
    bound_P1 = (_UNIT * ((B_PR.shape[1] + 8) * longest_P + 4 * widest) + _TINY)[:, None]
    end_PI = x_PI + bound_P1
    high_PI = end_PI.to(dtype)
    places = _unlike(torch.sub(x_PI, bound_P1, out=end_PI).to(dtype), high_PI)
    fits = widest + longest_P.max().item() < torch.finfo(dtype).max * (1 - 2.0**-7)  # not where there is NaN
    if not fits or len(places[0]) * 4 > x_PI.numel():
        exact = W_PI.double() + block.scaling * (block.exact_B_OR[rows] @ block.exact_A_IR.T)
        high_PI = round_once(exact, dtype)
        require_finite(exact, high_PI, path)
    else:
        update = block.scaling * (block.exact_B_OR[rows][places[0]] * block.exact_A_IR[places[1]]).sum(1)
        high_PI[places] = round_once(W_PI[places].double() + update, dtype)
    found = None
    if sampled:
        touched = d_PI != 0
        unchanged = int((touched & (high_PI == W_PI)).sum())
        error = torch.linalg.vector_norm(high_PI.float() - x_PI).item() ** 2
        found = error, torch.linalg.vector_norm(d_PI).item() ** 2, unchanged, int(touched.sum())
    block.out_OI[rows] = high_PI
    return _Sums(weight2, largest, found)


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())


def _unlike(low_PI: Tensor, high_PI: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the 16-bit numbers that differ.

    Equals `(low != high).nonzero(as_tuple=True)` for bits; four numbers are compared at a time.
    """
    low, high = low_PI.view(torch.int16).flatten(), high_PI.view(torch.int16).flatten()
    if len(low) % 4:
        found = (low != high).nonzero()[:, 0]
    else:
        fours = (low.view(torch.int64) ^ high.view(torch.int64)).nonzero()
        near = (4 * fours + torch.arange(4)).flatten()
        found = near[low[near] != high[near]]
    columns = low_PI.shape[1]
    return found // columns, found % columns


def _change(sums: list[_Sums], update2: float) -> Change:
    if not update2:
        return Change()
    weight2 = sum(one.weight2 for one in sums)
    sampled = [one.sampled for one in sums if one.sampled is not None]
    error, sampled2, unchanged, touched = (sum(values) for values in zip(*sampled, strict=True))
    return Change(
        max(one.largest for one in sums),
        math.sqrt(update2 / weight2) if weight2 else None,
        math.sqrt(error / sampled2) if sampled2 else 0.0,
        unchanged / touched if touched else 0.0,
    )


def _target(path: str, pair: LowRank) -> Target:
    """Return what `merge_weight` asks of a layer for a weight that has none."""
    kind = next(kind for kind in KINDS if kind.form == pair.form)
    shapes = (tuple(pair.lora_A.shape), tuple(pair.lora_B.shape))
    return Target(path, path, "", kind, *pair.sizes, shapes, pair.rank, pair.scaling)


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in another floating dtype, each value rounded once.

    Raises:
        AdapterError: If a finite value leaves the range of the dtype.

    Example:
        >>> converted(torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64), torch.bfloat16, "x").item()
        1.0078125
    """
    if tensor.dtype == dtype:
        return tensor
    out = torch.empty(tensor.shape, dtype=dtype)
    source, flat = tensor.reshape(-1), out.view(-1)
    for start in range(0, len(flat), CHUNK):
        part = source[start : start + CHUNK]
        rounded = round_once(part, dtype) if part.dtype == torch.float64 else part.to(dtype)
        if not bool((torch.isfinite(rounded) | ~torch.isfinite(part)).all()):
            raise AdapterError(
                f"{name}: reaches {part.abs().max().item():.6g}, and {dtype} ends at {torch.finfo(dtype).max:.6g}; "
                "choose bfloat16 or float32"
            )
        flat[start : start + CHUNK] = rounded
    return out
