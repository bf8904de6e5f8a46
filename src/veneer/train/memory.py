"""A step that does not fit into memory: its micro-batches are cut, and nothing else changes.

The step is a transaction. It starts again from its beginning, with its gradients cleared, and every micro-batch above
the new limit is halved by rows. Rows, their order, the loss (a mean over the whole step's supervised tokens) and the
learning rate are what they were; the limit holds for the rest of the run and is committed before the run goes on, so
that a run that is gone on with cuts where this one did.
"""

import gc
from collections.abc import Sequence
from itertools import accumulate

import torch

from veneer.data.batches import Step
from veneer.train.allocator import give_back

_SAID = (
    *("can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    # oneDNN gives no reason; of a product that it has taken before, memory is the one there is.
    *("could not create a primitive", "could not execute a primitive", "could not create a memory"),
)


class DoesNotFit(Exception):  # noqa: N818 (a finding, not an error; it never leaves this package)
    """Memory did not suffice.

    Args:
        what: For what.
        smaller: A limit in tokens under which it is cut smaller; None where it cannot be.
        said: What the system said.
        rows: "file:line" of its rows.
    """

    def __init__(self, what: str, smaller: int | None, said: str, rows: Sequence[str] = ()) -> None:
        self.what, self.smaller, self.said, self.rows = what, smaller, said.strip() or "out of memory", tuple(rows)
        super().__init__(what)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory did not suffice: Python's, torch's on a CPU, torch's on a GPU.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def cut(step: Step, lengths: Sequence[int], limit: int | None) -> Step:
    """Return a step whose micro-batches are halved by rows until none has more tokens than the limit, or is one row.

    Args:
        step: Row numbers of each micro-batch.
        lengths: Tokens of every row.
        limit: In tokens; None cuts nothing.

    Example:
        >>> cut([[0, 1, 2], [3]], [4, 4, 4, 9], limit=8)
        [[0], [1, 2], [3]]
    """
    return step if limit is None else [part for micro in step for part in _halved(micro, lengths, limit)]


def halves(micro: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the rows of a micro-batch in two parts, as even in tokens as their order allows; two rows at least.

    Example:
        >>> halves([0, 1, 2], [6, 3, 3])
        ([0], [1, 2])
    """
    before = list(accumulate(lengths[row] for row in micro))
    middle = min(range(1, len(micro)), key=lambda place: abs(2 * before[place - 1] - before[-1]))
    return list(micro[:middle]), list(micro[middle:])


def smaller_limit(micro: Sequence[int], lengths: Sequence[int]) -> int | None:
    """Return the limit under which a micro-batch that did not fit is halved; None for a single row.

    Example:
        >>> smaller_limit([0, 1, 2], [6, 3, 3]), smaller_limit([0], [6])
        (6, None)
    """
    if len(micro) == 1:
        return None
    return max(sum(lengths[row] for row in half) for half in halves(micro, lengths))


def release_memory() -> None:
    """Give back what an attempt that failed may still hold; its exception must be gone before."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halved(micro: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    if len(micro) == 1 or sum(lengths[row] for row in micro) <= limit:
        return [micro]
    return [part for half in halves(micro, lengths) for part in _halved(half, lengths, limit)]
