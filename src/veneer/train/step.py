"""The gradient of one optimiser step: micro-batches forward and backward, with the loss proved finite."""

import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.base.batching import Way, routed
from veneer.base.fast import decoder_layers
from veneer.base.prefix import PrefixStates
from veneer.base.ragged import RaggedBatch
from veneer.data.batches import Step, make_batch
from veneer.data.encode import EncodedRow
from veneer.data.sharing import gather_sharers, make_shared_batch
from veneer.errors import NonFiniteError
from veneer.scoring.loss import Recall, summed_loss
from veneer.train.memory import DoesNotFit, is_out_of_memory, smaller_limit


@dataclass(frozen=True)
class StepLoss:
    """What a step's forward and backward came to.

    Args:
        loss: Mean over its supervised tokens.
        tokens: Its tokens.
        supervised: Its supervised tokens.
    """

    loss: float
    tokens: int
    supervised: int


def step_gradient(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    step: Step,
    begin: Callable[[int], None],
    *,
    recall: Recall | None = None,
    way: Way | None = None,
) -> StepLoss:
    """Add the gradient of a step's loss to the gradients of what trains.

    The loss is the mean over the supervised tokens of the whole step, so how the rows are cut into micro-batches
    changes nothing but rounding, and what is dropped. What rows begin with alike is computed once where that pays,
    unless `recall` gives the states of whole rows or something is dropped.

    Args:
        model: The attached model, in training mode, within `train.ways.computing`.
        rows: All training rows.
        step: Row numbers of each micro-batch.
        begin: Called with the place of each micro-batch before it; seeds what is drawn in it, may raise to leave.
        recall: Gives what the frozen lowest layers make of rows; None runs them.
        way: How the loss is computed, see `find_way`.

    Raises:
        NonFiniteError: If the loss is not finite, with the rows named, and the layer where it began.
        DoesNotFit: If memory does not suffice for a micro-batch. Gradients are then of some of the others.
    """
    way = way or Way()
    supervised = sum(int(rows[index].supervised.sum()) for micro in step for index in micro)
    shares = recall is None and way.shares(training=True)
    step = gather_sharers(step, rows) if shares else step
    loss = 0.0
    for place, micro in enumerate(step):
        begin(place)
        try:
            loss += _backward(model, [rows[index] for index in micro], micro, supervised, recall, way)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lengths = {index: len(rows[index].token_ids) for index in micro}
            what = f"a micro-batch of {len(micro)} rows, {sum(lengths.values()):,} tokens"
            smaller = smaller_limit(range(len(micro)), list(lengths.values()))
            raise DoesNotFit(what, smaller, str(error), [rows[index].source for index in micro]) from None
    tokens = sum(len(rows[index].token_ids) for micro in step for index in micro)
    return StepLoss(loss, tokens, supervised)


def _backward(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    numbers: Sequence[int],
    supervised: int,
    recall: Recall | None,
    way: Way,
) -> float:
    """Run a micro-batch forward and backward; return its share of the loss."""
    shares = recall is None and way.shares(training=True)
    batch = (make_shared_batch if shares else make_batch)(rows)
    below = None if recall is None else recall(numbers)
    with routed(model, batch, way):  # the backward too: checkpointed layers are computed again in it
        part = summed_loss(model, batch, below, way) / supervised
        value = part.item()
        if not math.isfinite(value):
            layer = _first_bad_layer(model, batch, below, way)
            where = f", and so is what {layer} gives" if layer else ""
            raise NonFiniteError(f"the loss is {value}{where}", [row.source for row in rows])
        if part.requires_grad:  # it does not where no row calls on an activated adapter
            part.backward()
    return value


def _first_bad_layer(model: PreTrainedModel, batch: RaggedBatch, below: PrefixStates | None, way: Way) -> str | None:
    """Return the path of the first decoder layer whose output is not finite, where the forward shows it again."""
    found: list[str] = []
    with torch.no_grad(), _watching(decoder_layers(model), found):
        summed_loss(model, batch, below, way)
    return found[0] if found else None


@contextmanager
def _watching(layers: dict[str, nn.Module], found: list[str]) -> Iterator[None]:
    def look(path: str, _: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (a hook's signature)
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and not bool(states.isfinite().all()):
            found.append(path)

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(look, path)).remove)
        yield


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
