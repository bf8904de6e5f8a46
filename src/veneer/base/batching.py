"""How a model takes a batch: as ragged rows, or padded where it cannot.

Shapes: T tokens of all sequences, G sequences, S tokens of the longest, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from veneer.base.ragged import (
    RaggedBatch,
    base_alone,
    check_ragged,
    difference_from_alone,
    probe_batch,
    ragged_attention,
    routed_segments,
    segments_of,
)
from veneer.base.sharing import check_sharing, draws_at_random
from veneer.errors import BaseModelError
from veneer.nn.attach import attachment_of
from veneer.nn.modes import evaluating
from veneer.nn.routing import Segment


@dataclass(frozen=True)
class Way:
    """How losses are computed.

    Args:
        fast: By the fast paths; else by the plain reference of each.
        padded: Why batches are padded; empty for ragged rows.
        alone: Why each row is computed whole; empty where a beginning that rows share may be computed once.
        drawn: Whether something is drawn at random in training (dropout): then each row draws its own.
        multiple: Tokens of a ragged forward are filled up to a multiple of so many.
    """

    fast: bool = True
    padded: str = ""
    alone: str = ""
    drawn: bool = False
    multiple: int = 1

    def shares(self, *, training: bool) -> bool:
        """Tell whether a beginning that rows share may be computed once.

        Example:
            >>> Way().shares(training=True), Way(drawn=True).shares(training=True)
            (True, False)
        """
        return self.fast and not (self.padded or self.alone or (training and self.drawn))


def find_way(model: PreTrainedModel, *, fast: bool = True) -> Way:
    """Return how a model takes batches: ragged where that is proved to give what each sequence gives alone.

    Beginnings that rows share are computed once where that is proved too.

    Raises:
        BaseModelError: If it can take neither ragged nor padded batches, with both reasons.
    """
    try:
        check_ragged(model)
    except BaseModelError as error:
        check_padded(model, error.message)
        return Way(fast, padded=error.message)
    if not fast:
        return Way(fast)
    try:
        check_sharing(model)
    except BaseModelError as error:
        return Way(fast, alone=error.message)
    return Way(fast, drawn=draws_at_random(model))


@contextmanager
def batching(model: PreTrainedModel, way: Way) -> Iterator[None]:
    """Let a model take batches in a way within the block."""
    with nullcontext() if way.padded else ragged_attention(model, fast=way.fast):
        yield


def routed(model: PreTrainedModel, batch: RaggedBatch, way: Way) -> AbstractContextManager[None]:
    """Send each token through the slot that the batch, or an adapter's invocation, names for it."""
    segments = routed_segments(model, batch)
    if segments is None:
        return nullcontext()
    if way.padded:
        segments = _padded_segments(segments, batch.lengths)
    return attachment_of(model).routing.using(segments)


def padded_logits(model: PreTrainedModel, batch: RaggedBatch) -> Tensor:
    """Return the model's own logits of a batch, shape (T, V); sequences are padded on the right to the longest.

    Equals, and is tested against, `model(input_ids=sequence).logits` of each sequence alone; none may continue another.

    Cost:
        G·S tokens instead of T, with a mask over them, and all of their logits.
    """
    if batch.prefixes is not None:
        raise ValueError("padded rows cannot continue each other; expand the batch")
    parts = batch.token_ids.split(batch.lengths)
    ids_GS = pad_sequence(list(parts), batch_first=True)
    mask_GS = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    out = model(input_ids=ids_GS.to(model.device), attention_mask=mask_GS.to(model.device), use_cache=False)
    return out.logits[mask_GS.bool().to(model.device)]


def check_padded(model: PreTrainedModel, ragged: str = "") -> None:
    """Prove on two short sequences that padded batches give what the model gives for each alone.

    Args:
        model: Any model with logits.
        ragged: Why it cannot take ragged ones, for the message.

    Raises:
        BaseModelError: If they do not.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise BaseModelError(f"{name} has no language-model head to train with")
    batch = probe_batch(model)
    with evaluating(model), torch.no_grad(), base_alone(model):
        difference, tolerance = difference_from_alone(model, batch, padded_logits(model, batch))
    if not difference <= tolerance:
        raise BaseModelError(
            f"{name} can be trained on batches neither padded (logits differ from those of each sequence alone by "
            f"{difference:.2g} of their size, allowed {tolerance:g}) nor ragged: {ragged}"
        )


def _padded_segments(segments: tuple[Segment, ...], lengths: tuple[int, ...]) -> tuple[Segment, ...]:
    """Return the segments of padded rows: what is padded goes where the sequence's last token goes."""
    slots = [one.slot for one in segments for _ in range(one.stop - one.start)]
    longest, padded, start = max(lengths), [], 0
    for length in lengths:
        own = slots[start : start + length]
        padded += own + [own[-1]] * (longest - length)
        start += length
    return segments_of(padded, [1] * len(padded))
