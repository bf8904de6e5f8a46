"""The loss of a model on rows, over supervised tokens only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from veneer.base.batching import Way, batching, find_way, padded_logits, routed
from veneer.base.prefix import PrefixStates, tail_hidden_states
from veneer.base.ragged import RaggedBatch, hidden_states, routed_segments
from veneer.data.batches import make_batch, pack
from veneer.data.encode import EncodedRow
from veneer.data.sharing import make_shared_batch
from veneer.errors import BaseModelError
from veneer.nn.layer import LoRALayer
from veneer.nn.linear import is_plain_linear
from veneer.nn.modes import evaluating
from veneer.ops.loss import chunk_rows, linear_cross_entropy

Recall = Callable[[Sequence[int]], PrefixStates]
"""Gives what the frozen lowest layers make of rows, by their numbers, one after another."""


@dataclass(frozen=True)
class Loss:
    """Mean loss in nats per supervised token, and of how many tokens it is the mean."""

    mean: float
    num_supervised: int

    @property
    def perplexity(self) -> float:
        """`exp(mean)`; infinite where that is too large for a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def summed_loss(
    model: PreTrainedModel, batch: RaggedBatch, below: PrefixStates | None = None, way: Way | None = None
) -> Tensor:
    """Return the summed cross-entropy of a batch's supervised tokens, a scalar; needs `batching(model, way)`.

    Only the hidden states that predict a supervised token go through the head, in chunks. The lowest layers are not run
    where `below` says what they give. Where the way is not fast, all logits at once go through torch's own
    cross-entropy; where it is padded, the model's own logits do.
    """
    way = way or Way()
    places, targets = (part.to(model.device) for part in batch.predictions())
    if way.padded:
        with routed(model, batch, way):
            logits_TV = padded_logits(model, batch)
        return F.cross_entropy(logits_TV[places].float(), targets, reduction="sum")
    filled = batch.filled(way.multiple)
    hidden_TD = hidden_states(model, filled) if below is None else tail_hidden_states(model, filled, below)
    hidden = hidden_TD[places]
    head = model.get_output_embeddings()
    if not way.fast:
        return _chunk_loss(head, hidden, targets)
    if is_plain_linear(head) and not any(parameter.requires_grad for parameter in head.parameters()):
        return linear_cross_entropy(hidden, head.weight, head.bias, targets)
    if isinstance(head, LoRALayer) and routed_segments(model, batch) is not None:
        raise BaseModelError(
            "an adapted head gets the supervised rows alone, so rows cannot be routed by sequence there"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    return _through_any_head(head, hidden, targets, chunk_rows(vocabulary, hidden.element_size()))


def evaluate_loss(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    *,
    tokens_per_batch: int = 4096,
    recall: Recall | None = None,
    way: Way | None = None,
    check: Callable[[], None] | None = None,
) -> Loss:
    """Return the mean loss of rows in evaluation mode; the model's mode is restored.

    Equals the mean of `F.cross_entropy` over the supervised tokens of each row alone. What rows of a forward begin with
    alike is computed once, unless `recall` gives the states of whole rows.

    Args:
        model: A language model.
        rows: The rows.
        tokens_per_batch: Token budget of a forward.
        recall: Gives what the frozen lowest layers make of rows; None runs them.
        way: How the loss is computed, see `find_way`.
        check: Called before each forward; may raise to leave.

    Raises:
        BaseModelError: If the model can take neither ragged nor padded batches.
    """
    total, count = 0.0, 0
    way = way or find_way(model)
    with evaluating(model), torch.no_grad(), batching(model, way):
        for part in pack(range(len(rows)), [len(row.token_ids) for row in rows], tokens_per_batch):
            if check is not None:
                check()
            shares = recall is None and way.shares(training=False)
            batch = (make_shared_batch if shares else make_batch)([rows[index] for index in part])
            below = None if recall is None else recall(part)
            total += summed_loss(model, batch, below, way).item()
            count += int(batch.supervised.sum())
    return Loss(total / count, count)


def _through_any_head(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, step: int) -> Tensor:
    """Return the summed loss through a head that trains or is adapted; each chunk's logits are computed twice."""
    parts = [
        checkpoint(_chunk_loss, head, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(step), targets_N.split(step), strict=True)
    ]
    return torch.stack(parts).sum()


def _chunk_loss(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="sum")
