"""Products with a frozen weight and its update, whatever the weight is stored in.

Shapes: N rows, I in, O out, R rank, P a panel of the O rows of the weight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.dropout import Dropout
from veneer.ops.keeping import Keep, room
from veneer.ops.lora import merged_weight
from veneer.ops.product import BY_ITSELF, IN_PASSING, merging_pays, product, product_onto

Panels = Callable[[torch.dtype], Iterator[tuple[slice, Tensor]]]
"""Yields runs of rows and those rows of the weight in a dtype; they may be written into until the next is asked for."""


class Update(NamedTuple):
    """A low-rank update `scaling · B A` of a weight; with dropout, of the inputs that are kept.

    Args:
        A_RI: Down projection.
        B_OR: Up projection.
        scaling: Its factor, that of dropout included.
        kept_NI: One for each input that is left and zero for the others, or None for all.
    """

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    kept_NI: Tensor | None = None

    def inputs(self, x_NI: Tensor) -> Tensor:
        """Return the inputs of the update, zeros where they were dropped."""
        return x_NI if self.kept_NI is None else x_NI * self.kept_NI

    def down(self, x_NI: Tensor) -> Tensor:
        """Return `x Aᵀ` of the inputs that are left."""
        return product(self.inputs(x_NI), self.A_RI)


def update_of(x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, dropout: Dropout | None) -> Update:
    """Return the update for some inputs; which of them dropout leaves is drawn anew, and is the same each time.

    Example:
        >>> update_of(torch.ones(1, 2), torch.ones(1, 2), torch.ones(3, 1), 0.5, Dropout(32768, seed=0)).scaling
        1.0
    """
    if dropout is None:
        return Update(A_RI, B_OR, scaling)
    return Update(A_RI, B_OR, scaling * dropout.factor, dropout.kept(x_NI))


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """A weight (O, I) that gets no gradient: a tensor, or decoded panel by panel.

    Args:
        shape: (O, I).
        dense: The weight itself.
        panels: What decodes it, where it is not.
        ratio_O: What its rows are multiplied by, or None; the update, whose factor is scaled likewise, is not.
    """

    shape: tuple[int, int] | torch.Size
    dense: Tensor | None = None
    panels: Panels | None = None
    ratio_O: Tensor | None = None

    def merging_pays(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Tell whether the update is cheaper merged into the weight than applied beside it."""
        written = self.panels is not None or self.ratio_O is not None
        return merging_pays(num_rows, self.shape, dtype, IN_PASSING if written else BY_ITSELF)

    def walk(self, dtype: torch.dtype, update: Update | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of `ratio · W + s B A`, all at once where nothing needs decoding.

        In 16 bits decoded numbers are scaled before they are rounded: else a ratio within half a digit of 1 is none.

        Example:
            >>> scaled = FrozenWeight(torch.Size([2, 1]), torch.ones(2, 1), ratio_O=torch.tensor([2.0, 3.0]))
            >>> [W_PI.tolist() for _, W_PI in scaled.walk(torch.float32, None)]
            [[[2.0], [3.0]]]
        """
        ratio_O = self.ratio_O
        if self.dense is not None:
            W_OI = self.dense
            if update is not None:
                W_OI = merged_weight(W_OI, *update[:3], ratio_O)
            elif ratio_O is not None:
                W_OI = (W_OI * ratio_O[:, None]).to(dtype)
            yield slice(0, self.shape[0]), W_OI
        elif self.panels is not None:
            for rows, W_PI in self.panels(dtype if ratio_O is None else ratio_O.dtype):
                part_PI = W_PI if ratio_O is None else W_PI.mul_(ratio_O[rows, None]).to(dtype)
                if update is not None:
                    part_PI.addmm_(update.B_OR[rows], update.A_RI, alpha=update.scaling)
                yield rows, part_PI


def weight_product(weight: FrozenWeight, A_RI: Tensor) -> Tensor:
    """Return `W Aᵀ`, shape (O, R), in the dtype of A; no gradient of its own.

    Example:
        >>> weight_product(FrozenWeight(torch.Size([2, 3]), torch.ones(2, 3)), torch.ones(1, 3)).tolist()
        [[3.0], [3.0]]
    """
    return torch.cat([product(W_PI, A_RI) for _, W_PI in weight.walk(A_RI.dtype, None)])


def down_products(
    x_NI: Tensor, weights: Sequence[FrozenWeight], updates: Sequence[Update | None]
) -> list[Tensor | None]:
    """Return `x Aᵀ` of each layer whose update is applied beside its weight; None of the others.

    One product gives all that read the same inputs; what dropout left of them is each layer's own.

    Example:
        >>> weight = FrozenWeight(torch.Size([9, 3]), torch.ones(9, 3))
        >>> update = Update(torch.ones(1, 3), torch.ones(9, 1), 1.0)
        >>> down_products(torch.ones(1, 3), [weight, weight], [update, None])
        [tensor([[3.]]), None]
    """
    ways = [_ways(x_NI, weight, update)[1] for weight, update in zip(weights, updates, strict=True)]
    alike = [update.A_RI for update in ways if update is not None and update.kept_NI is None]
    parts: Iterator[Tensor] = iter(())
    if alike:
        z_NQ = product(x_NI, alike[0] if len(alike) == 1 else torch.cat(alike))
        parts = iter(z_NQ.split([len(A_RI) for A_RI in alike], dim=1))
    return [None if update is None else next(parts) if update.kept_NI is None else update.down(x_NI) for update in ways]


def apply_weight(
    x_NI: Tensor,
    weight: FrozenWeight,
    bias_O: Tensor | None,
    update: Update | None,
    keep: Keep | None = None,
    z_NR: Tensor | None = None,
) -> Tensor:
    """Return `x (W + s B A)ᵀ + bias`, in the cheaper order, where `keep` gives room; no gradient of its own.

    Equals `ops.reference.lora_linear` for a dense weight. In 16 bits the sum is rounded once, see `product_onto`.
    `z` is `x Aᵀ` where it was formed already, by `down_products`.

    Example:
        >>> weight = FrozenWeight(torch.Size([2, 3]), torch.ones(2, 3))
        >>> apply_weight(torch.ones(1, 3), weight, None, Update(torch.ones(1, 3), torch.ones(2, 1), 0.5)).tolist()
        [[4.5, 4.5]]
    """
    merged, beside = _ways(x_NI, weight, update)
    first_NO = None
    if beside is not None and z_NR is None:
        z_NR = beside.down(x_NI)
    if beside is not None and z_NR is not None and x_NI.dtype.itemsize < 4:
        # With a bias, oneDNN writes a whole sum where it likes; panels of it are written into these rows.
        first_keep = keep if bias_O is None or weight.dense is None else None
        first_NO = product(z_NR * beside.scaling, beside.B_OR, keep=first_keep)
    y_NO = first_NO
    for rows, W_PI in weight.walk(x_NI.dtype, merged):
        bias_P, whole = None if bias_O is None else bias_O[rows], W_PI.shape[0] == weight.shape[0]
        if first_NO is None:
            part_NP = product(x_NI, W_PI, bias_P, keep if whole else None)
        else:
            part_NP = product_onto(first_NO[:, rows], x_NI, W_PI, bias_P)
        if whole:
            y_NO = part_NP
        else:
            y_NO = room(keep, (x_NI.shape[0], weight.shape[0]), x_NI) if y_NO is None else y_NO
            y_NO[:, rows] = part_NP
    assert y_NO is not None
    if beside is not None and z_NR is not None and first_NO is None:
        y_NO.addmm_(z_NR, beside.B_OR.T, alpha=beside.scaling)
    return y_NO


def apply_transposed(
    dy_NO: Tensor, weight: FrozenWeight, update: Update | None, dz_NR: Tensor | None, plus_NI: Tensor | None = None
) -> Tensor:
    """Return `dy (W + s B A) + plus`, the gradient of the input; `dz` is `s · dy B`, `plus` may be written into.

    Example:
        >>> weight = FrozenWeight(torch.Size([2, 3]), torch.ones(2, 3))
        >>> apply_transposed(torch.ones(1, 2), weight, None, None).tolist()
        [[2.0, 2.0, 2.0]]
    """
    merged, beside = _ways(dy_NO, weight, update)
    dx_NI = plus_NI
    if beside is not None and dz_NR is not None:
        dx_NI = _add_update(dx_NI, beside, dz_NR)
    for rows, W_PI in weight.walk(dy_NO.dtype, merged):
        # A sum over many panels in 16 bits would lose what a single product, which sums in 32, does not.
        if dy_NO.dtype.itemsize < 4 and W_PI.shape[0] < weight.shape[0]:
            part_NI = product(dy_NO[:, rows], W_PI.T).float()
            dx_NI = part_NI if dx_NI is None else dx_NI.float().add_(part_NI)
        else:
            dx_NI = product(dy_NO[:, rows], W_PI.T) if dx_NI is None else product_onto(dx_NI, dy_NO[:, rows], W_PI.T)
    assert dx_NI is not None
    return dx_NI.to(dy_NO.dtype)


def _add_update(plus_NI: Tensor | None, update: Update, dz_NR: Tensor) -> Tensor:
    """Return `dz A + plus`, with dropout of the inputs that were left."""
    if update.kept_NI is None:
        return product(dz_NR, update.A_RI.T) if plus_NI is None else plus_NI.addmm_(dz_NR, update.A_RI)
    part_NI = product(dz_NR, update.A_RI.T)
    return part_NI.mul_(update.kept_NI) if plus_NI is None else plus_NI.addcmul_(part_NI, update.kept_NI)


def _ways(rows: Tensor, weight: FrozenWeight, update: Update | None) -> tuple[Update | None, Update | None]:
    """Return the update to be merged into the weight, or the one to be applied beside it."""
    merges = update is not None and update.kept_NI is None and weight.merging_pays(rows.shape[0], rows.dtype)
    return (update, None) if merges else (None, update)
