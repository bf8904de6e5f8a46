"""How far two adapters are apart in what they do: each module's effective delta, compared on the factors alone.

Shapes: M matrices of a stack, O out, I in, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.factors import as_matrices
from veneer.names import did_you_mean

Value = TypeVar("Value")

# The delta of each is that of a function from inputs to outputs; how its layer stores the weight is the layer's affair.
_SAME_FUNCTION = {"transposed": "linear", "parameter": "linear", "attention_in": "linear", "attention_out": "linear"}


@dataclass(frozen=True)
class Difference:
    """What two adapters do differently.

    Args:
        errors: Module path to ‖delta' − delta‖ / ‖delta‖ in the Frobenius norm; of a module with a magnitude the larger
            of that and the magnitude's own error. What trained whole, and rows of tokens, by their path likewise.
        problems: What one of them lacks or has in another form, a line each.

    Example:
        >>> Difference({"q": 1e-8, "v": 0.0}, ()).worst
        1e-08
    """

    errors: Mapping[str, float]
    problems: tuple[str, ...]

    @property
    def worst(self) -> float:
        """The largest error; infinite where something is lacking."""
        return math.inf if self.problems else max(self.errors.values(), default=0.0)


def compare_deltas(before: Adapter, after: Adapter) -> Difference:
    """Return how far what one adapter does is from what another does, relative to the first.

    Args:
        before: What should be.
        after: What is.

    Cost:
        Of the order of R² · (out + in) for each module; no delta is formed.

    Example:
        >>> from veneer.config import LoRAConfig
        >>> one = Adapter({"q": LowRank(torch.ones(1, 2), torch.ones(3, 1), 2.0)}, LoRAConfig(rank=1))
        >>> two = Adapter({"q": LowRank(torch.ones(1, 2), 2 * torch.ones(3, 1), 1.0)}, LoRAConfig(rank=1))
        >>> compare_deltas(one, two).worst < 1e-15
        True
    """
    problems: list[str] = []
    errors: dict[str, float] = {}
    for path, pair in _common(before.modules, after.modules, "factors", problems):
        errors[path] = _pair_error(path, *pair, problems)
    for path, values in _common(before.trained, after.trained, "a parameter that trained whole", problems):
        errors[path] = _tensor_error(path, *values, problems)
    for path, rows in _common(before.tokens, after.tokens, "rows of tokens", problems):
        if rows[0].indices != rows[1].indices:
            problems.append(f"{path}: rows of other tokens")
        else:
            errors[f"{path} (rows of tokens)"] = _tensor_error(path, rows[0].rows, rows[1].rows, problems)
    return Difference(errors, tuple(problems))


def delta_error(before: LowRank, after: LowRank) -> float:
    """Return ‖delta' − delta‖ / ‖delta‖ of two pairs of one form, without forming them.

    Equals `norm(after.delta() − before.delta()) / norm(before.delta())`, the difference as one product of twice the
    rank, whose norm is that of the triangles of a QR of both sides: nothing cancels but what is equal.

    Example:
        >>> pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 2.0)
        >>> delta_error(pair, pair)
        0.0
    """
    if before.scaling == after.scaling and all(
        one.shape == other.shape and torch.equal(one.double(), other.double())
        for one, other in ((before.lora_A, after.lora_A), (before.lora_B, after.lora_B))
    ):
        return 0.0
    A_MRI, B_MOR = _matrices(before)
    A2_MRI, B2_MOR = _matrices(after)
    total = _norm(B_MOR, A_MRI)
    apart = _norm(torch.cat([B_MOR, -B2_MOR], 2), torch.cat([A_MRI, A2_MRI], 1))
    return apart / total if total else (math.inf if apart else 0.0)


def _pair_error(path: str, before: LowRank, after: LowRank, problems: list[str]) -> float:
    forms = [_SAME_FUNCTION.get(one.form, one.form) for one in (before, after)]
    stacks = [_matrices(one)[0].shape[0] for one in (before, after)]
    if forms[0] != forms[1] or before.sizes != after.sizes or stacks[0] != stacks[1]:
        problems.append(f"{path}: form {after.form!r} of sizes {after.sizes}, was {before.form!r} of {before.sizes}")
        return math.inf
    error = delta_error(before, after)
    if (before.magnitude is None) != (after.magnitude is None):
        problems.append(f"{path}: its magnitude (DoRA) is {'lost' if after.magnitude is None else 'new'}")
    elif before.magnitude is not None and after.magnitude is not None:
        error = max(error, _tensor_error(path, before.magnitude, after.magnitude, problems))
    return error


def _tensor_error(path: str, before: Tensor, after: Tensor, problems: list[str]) -> float:
    if before.shape != after.shape:
        problems.append(f"{path}: shape {tuple(after.shape)}, was {tuple(before.shape)}")
        return math.inf
    total, apart = (float(torch.linalg.vector_norm(one)) for one in (before.double(), after.double() - before.double()))
    return apart / total if total else (math.inf if apart else 0.0)


def _common(
    before: Mapping[str, Value], after: Mapping[str, Value], what: str, problems: list[str]
) -> list[tuple[str, tuple[Value, Value]]]:
    """Return what both have by path; note what only one has."""
    problems += [f"{path}: {what} are lost{did_you_mean(path, after)}" for path in before if path not in after]
    problems += [f"{path}: {what} are new" for path in after if path not in before]
    return [(path, (before[path], after[path])) for path in before if path in after]


def _matrices(pair: LowRank) -> tuple[Tensor, Tensor]:
    """Return the factors as stacks in float64, the scaling in B."""
    A, B = as_matrices(pair.form, pair.lora_A.double(), pair.lora_B.double() * pair.scaling)
    return (A, B) if A.ndim == 3 else (A[None], B[None])


def _norm(B_MOR: Tensor, A_MRI: Tensor) -> float:
    """Return ‖B A‖ by the triangles of a thin QR of B and of Aᵀ."""
    left, right = (torch.linalg.qr(one, mode="r").R for one in (B_MOR, A_MRI.mT))
    return float(torch.linalg.vector_norm(left @ right.mT))
