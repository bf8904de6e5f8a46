"""The arithmetic of a merge on files, a piece of a weight at a time: float64's result, rounded once.

Shapes: O out, I in, R rank, M matrices of a weight, P some of its rows.
"""

import math
from collections.abc import Iterator, Sequence
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
from veneer.ops.native import add_low_rank
from veneer.tools.merge_weights import CHUNK, Change, merge_weight, require_finite, round_once

SAMPLED = 8
"""One of so many pieces, and one of so many of its rows, is looked at for the figures of a `Change`."""
PIECE = 1 << 20
"""How many weights are taken at a time: with fewer, two threads wait for Python longer than for memory (measured)."""
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


def add_update(weight: Tensor, out: Tensor, pair: LowRank, path: str, *, swapped: bool = False) -> Change:
    """Write a weight with its update: what float64 gives, rounded once.

    Equals `merge_weight`, every element.

    Args:
        weight: What is stored.
        out: What is written, of the same shape; it may be `weight` itself.
        pair: The update.
        path: What errors call it.
        swapped: Whether stacked experts are stored (E, I, O).

    Raises:
        AdapterError: If a merged value is not finite, or leaves the range of the dtype.

    Cost:
        That of `Update`, where there is one; else that of `merge_weight`.
    """
    update = plan_update(weight.shape, weight.dtype, out.dtype, pair, path, swapped=swapped)
    if update is None:
        view, into = (weight.mT, out.mT) if swapped else (weight, out)
        return merge_weight(view, view if out is weight else into, nn.Module(), _target(path, pair), pair)
    flat, into = weight.reshape(-1), out.view(-1)
    for start in range(0, len(flat), update.step):
        piece = slice(start, start + update.step)
        into[piece] = update.add(flat[piece], start)
    return update.change()


def plan_update(
    shape: Sequence[int], stored: torch.dtype, dtype: torch.dtype, pair: LowRank, path: str, *, swapped: bool = False
) -> "Update | None":
    """Return what adds an update to a weight a few rows at a time, or None where that cannot be.

    It cannot for float32 and float64 results, magnitudes and transposed convolutions; an update of zero leaves every
    bit. `add_update` does those as well.

    Args:
        shape: The weight's.
        stored: Its dtype.
        dtype: The result's.
        pair: The update.
        path: What errors call it.
        swapped: Whether stacked experts are stored (E, I, O).
    """
    narrow = dtype in (torch.bfloat16, torch.float16) and stored != torch.float64
    if not narrow or pair.magnitude is not None or pair.form == "conv_transpose" or not math.prod(shape):
        return None
    if not (pair.lora_A.any() and pair.lora_B.any()):
        return None
    A_MRI, B_MOR = as_matrices(pair.form, pair.lora_A, pair.lora_B)
    if swapped or pair.form in _SWAPPED:  # the weight is the other way round, so its rows are the inputs
        A_MRI, B_MOR = B_MOR.mT, A_MRI.mT
    return Update(path, dtype, A_MRI, B_MOR, pair.scaling, math.prod(shape) // (len(A_MRI) * A_MRI.shape[2]))


@dataclass(frozen=True)
class _Matrix:
    """The factors of a part of a weight that is a plain product, in float64, and the squared norm of what they add.

    The scaling is applied to the product, as `merge_weight` does: beside a tie the order of two roundings decides.
    """

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    update2: float


@dataclass(frozen=True)
class _Sums:
    """What was seen of some rows."""

    size: int
    weight2: float
    largest: float
    error2: float
    update2: float
    unchanged: int
    touched: int


class Update:
    """Adds an update to a weight, a piece at a time: float64's result, rounded once to 16 bits.

    Args:
        path: What errors call it.
        dtype: What is written.
        A_MRI: Factors of the matrices that the weight is made of, one below the other.
        B_MOR: The others.
        scaling: Of all.
        rows: How many rows each matrix has.

    Cost:
        2·O·I·R operations in float64, one pass over the weights with the kernels in C (`ops.native`); a dozen times as
        long without. The factors of one matrix are held in float64.
    """

    def __init__(self, path: str, dtype: torch.dtype, A_MRI: Tensor, B_MOR: Tensor, scaling: float, rows: int) -> None:
        self._path, self._dtype, self._scaling, self._rows = path, dtype, scaling, rows
        self._A_MRI, self._B_MOR, self._columns = A_MRI, B_MOR, A_MRI.shape[2]
        self._current: tuple[int, _Matrix] | None = None
        self._outs: tuple[Tensor, Tensor] | None = None
        self._turn, self._update2, self._seen = 0, 0.0, list[_Sums]()

    @property
    def step(self) -> int:
        """How many elements a piece has."""
        return self._columns * max(1, PIECE // self._columns)

    def add(self, piece: Tensor, start: int) -> Tensor:
        """Return a piece of the weight with its update, in memory that the call after the next writes to.

        Args:
            piece: Whole rows, flat; no call gets more than the first.
            start: The number of its first element.

        Raises:
            AdapterError: If a merged value is not finite, or leaves the range of the dtype.
        """
        W_PI = piece.view(-1, self._columns)
        if self._outs is None:  # used again and again: fresh memory costs more than a pass over it
            self._outs = (torch.empty_like(W_PI, dtype=self._dtype), torch.empty_like(W_PI, dtype=self._dtype))
        self._turn += 1
        out_PI = self._outs[self._turn % 2][: len(W_PI)]
        first, done = start // self._columns, 0
        while done < len(W_PI):  # in one matrix after another
            number, row = divmod(first + done, self._rows)
            count = min(len(W_PI) - done, self._rows - row)
            matrix, rows, part = self._matrix(number), slice(row, row + count), slice(done, done + count)
            _add_rows(matrix, rows, W_PI[part], out_PI[part], self._path)
            if row == 0 or self._turn % SAMPLED == 0:
                self._seen.append(_look(matrix, rows, W_PI[part], out_PI[part]))
            done += count
        return out_PI.view(-1)

    def change(self) -> Change:
        """Return what was changed, once every piece is: by the rows that were looked at, but for the update's norm."""
        self._current = self._outs = None
        if not self._update2:
            return Change()
        seen, size = self._seen, self._A_MRI.shape[0] * self._rows * self._columns
        seen2, touched = sum(one.update2 for one in seen), sum(one.touched for one in seen)
        weight2 = sum(one.weight2 for one in seen) * size / sum(one.size for one in seen)
        return Change(
            max(one.largest for one in seen),
            math.sqrt(self._update2 / weight2) if weight2 else None,
            math.sqrt(sum(one.error2 for one in seen) / seen2) if seen2 else 0.0,
            sum(one.unchanged for one in seen) / touched if touched else 0.0,
        )

    def _matrix(self, number: int) -> _Matrix:
        if self._current is None or self._current[0] != number:
            self._current = number, _matrix(self._A_MRI[number], self._B_MOR[number], self._scaling)
            self._update2 += self._current[1].update2
        return self._current[1]


def _matrix(A_RI: Tensor, B_OR: Tensor, scaling: float) -> _Matrix:
    A, B = A_RI.double().contiguous(), B_OR.double().contiguous()
    update2 = scaling**2 * ((B.T @ B) * (A @ A.T)).sum().item()  # ‖s B A‖² by the small Gram matrices
    return _Matrix(A, B, scaling, max(0.0, update2))


def _add_rows(matrix: _Matrix, rows: slice, W_PI: Tensor, out_PI: Tensor, path: str) -> None:
    """Write some rows with their update."""
    A_RI, B_PR = matrix.A_RI, matrix.B_OR[rows]
    if add_low_rank(W_PI, A_RI, B_PR, matrix.scaling, out_PI):
        return
    step = max(1, CHUNK // len(A_RI.T))
    for W_CI, B_CR, out_CI in zip(W_PI.split(step), B_PR.split(step), out_PI.split(step), strict=True):
        exact_CI = W_CI.double() + matrix.scaling * (B_CR @ A_RI)
        out_CI.copy_(round_once(exact_CI, out_CI.dtype))
        require_finite(exact_CI, out_CI, path)


def _look(matrix: _Matrix, rows: slice, W_PI: Tensor, out_PI: Tensor) -> _Sums:
    """Look at some of the rows: how much there is, changed and lost."""
    W_QI, out_QI = W_PI[::SAMPLED], out_PI[::SAMPLED]
    before, update = W_QI.float(), matrix.scaling * (matrix.B_OR[rows][::SAMPLED].float() @ matrix.A_RI.float())
    touched, (low, high) = update != 0, torch.aminmax(update)
    weight2, update2, error2 = (
        torch.linalg.vector_norm(one).item() ** 2 for one in (before, update, out_QI.float() - before - update)
    )
    unchanged = int((touched & (out_QI == W_QI)).sum())
    return _Sums(W_QI.numel(), weight2, max(-low.item(), high.item()), error2, update2, unchanged, int(touched.sum()))


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
