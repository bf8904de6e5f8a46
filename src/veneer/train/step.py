"""One optimiser step: micro-batches forward and backward, checks, update."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from veneer.base.batching import Way, routed
from veneer.data.batches import Step, make_batch
from veneer.data.encode import EncodedRow
from veneer.errors import NonFiniteError
from veneer.scoring.loss import Recall, summed_loss
from veneer.train.optimizer import FlatAdamW


def train_step(
    model: PreTrainedModel,
    optimizer: FlatAdamW,
    rows: Sequence[EncodedRow],
    step: Step,
    learning_rate: float,
    check: Callable[[], None],
    *,
    recall: Recall | None = None,
    way: Way | None = None,
) -> dict[str, Any]:
    """Train on the rows of a step and return its figures.

    The loss is the mean over the supervised tokens of the whole step, so how the rows are cut into micro-batches
    changes nothing but rounding.

    Args:
        model: The attached model, in training mode, within `train.ways.computing`.
        optimizer: Over the adapter's parameters, gradients cleared.
        rows: All training rows.
        step: Row numbers of each micro-batch.
        learning_rate: Of this step.
        check: Called before each micro-batch; may raise to leave the step before the update.
        recall: Gives what the frozen lowest layers make of rows; None runs them.
        way: How the loss is computed, see `find_way`.

    Raises:
        NonFiniteError: If the loss or the gradient is not finite, with the rows named; nothing was updated.
    """
    start = time.perf_counter()
    way = way or Way()
    supervised = sum(int(rows[index].supervised.sum()) for micro in step for index in micro)
    loss = 0.0
    for micro in step:
        check()
        batch = make_batch([rows[index] for index in micro])
        below = None if recall is None else recall(micro)
        with routed(model, batch, way):  # the backward too: checkpointed layers are computed again in it
            part = summed_loss(model, batch, below, way) / supervised
            value = part.item()
            if not math.isfinite(value):
                raise NonFiniteError(f"the loss is {value}", [rows[index].source for index in micro])
            if part.requires_grad:  # it does not where no row calls on an activated adapter
                part.backward()
        loss += value
    norm = optimizer.step(learning_rate)
    seconds = time.perf_counter() - start
    tokens = sum(len(rows[index].token_ids) for micro in step for index in micro)
    return {
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
