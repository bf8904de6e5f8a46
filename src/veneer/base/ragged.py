"""Ragged batches: one row of tokens, no padding, and attention that never crosses a sequence.

transformers' models let their attention be chosen by name (its `AttentionInterface`). Within
`ragged_attention(model)` they call ours, which cuts the row at the sequences' borders.

Shapes: T tokens of all sequences, S of one, P of the one that it continues, L = P + S, G sequences of equal length,
H heads, E head size, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from veneer.base.activation import invocation_of, ragged_segments
from veneer.errors import BaseModelError
from veneer.nn.attach import attachment_of, find_attachment
from veneer.nn.modes import evaluating
from veneer.nn.routing import Segment
from veneer.ops.attention import causal_attention
from veneer.ops.attention_layout import runs_of, spans_of

ATTENTION = "veneer_ragged"
PLAIN_ATTENTION = "veneer_ragged_plain"
_REFUSED = {"softcap": "soft-capped", "s_aux": "sink", "position_bias": "position-biased"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SEQUENCES = {"sequence_lengths", "sequence_prefixes"}


@dataclass(frozen=True)
class RaggedBatch:
    """Sequences one after another in a single row.

    Args:
        token_ids: Ids of all tokens, shape (T,), int64.
        supervised: Whether a token's loss counts, shape (T,), bool; never for the first of a sequence.
        lengths: Tokens of each sequence, in order; they sum to T.
        slots: Adapter slot of each sequence, None for the base alone; None for "all through the first slot".
        prefixes: Which earlier sequence each one continues, None for none; None for "none does". What is continued is
            the beginning of other sequences and nothing by itself: it continues none, and no token of it is supervised.

    Raises:
        ValueError: If the sizes disagree, or a sequence continues what it cannot.

    Example:
        >>> batch = RaggedBatch(torch.arange(5), torch.tensor([False, True, False, True, True]), (2, 3))
        >>> batch.positions.tolist()
        [0, 1, 0, 1, 2]
        >>> [part.tolist() for part in batch.predictions()]
        [[0, 2, 3], [1, 3, 4]]
        >>> marks = torch.tensor([False, False, False, True, False, True])
        >>> shared = RaggedBatch(torch.tensor([7, 8, 1, 2, 3, 4]), marks, (2, 2, 2), prefixes=(None, 0, 0))
        >>> shared.positions.tolist(), shared.expanded().token_ids.tolist()
        ([0, 1, 2, 3, 2, 3], [7, 8, 1, 2, 7, 8, 3, 4])
    """

    token_ids: Tensor
    supervised: Tensor
    lengths: tuple[int, ...]
    slots: tuple[int | None, ...] | None = None
    prefixes: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        tokens = self.token_ids.shape[0]
        if sum(self.lengths) != tokens or self.supervised.shape != self.token_ids.shape or min(self.lengths) < 1:
            raise ValueError(f"{tokens} tokens, {self.supervised.shape[0]} marks and lengths {self.lengths} disagree")
        if self.slots is not None and len(self.slots) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} sequences and {len(self.slots)} slots disagree")
        if self.prefixes is not None:
            self._check_prefixes(self.prefixes)

    def _check_prefixes(self, prefixes: tuple[int | None, ...]) -> None:
        if len(prefixes) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} sequences and {len(prefixes)} prefixes disagree")
        for index, prefix in enumerate(prefixes):
            if prefix is None:
                continue
            if not 0 <= prefix < index or prefixes[prefix] is not None:
                raise ValueError(f"sequence {index} continues {prefix}, expected an earlier one that continues none")
            if self.slots is not None and self.slots[index] != self.slots[prefix]:
                raise ValueError(f"sequence {index} continues {prefix}, which goes through another slot")
        marks = self.supervised.split(self.lengths)
        if any(bool(marks[prefix].any()) for prefix in set(prefixes) - {None}):
            raise ValueError("a token is supervised in a sequence that others continue")

    @property
    def positions(self) -> Tensor:
        """Place of each token in its sequence, behind the one that it continues, shape (T,)."""
        starts = [0 if prefix is None else self.lengths[prefix] for prefix in self._prefixes()]
        return torch.cat([torch.arange(length) + start for length, start in zip(self.lengths, starts, strict=True)])

    def filled(self, multiple: int) -> "RaggedBatch":
        """Return the batch with a last sequence of no meaning, so that its tokens are a multiple of a number.

        Example:
            >>> batch = RaggedBatch(torch.arange(5), torch.zeros(5, dtype=torch.bool), (2, 3))
            >>> batch.filled(4).lengths, batch.filled(5) is batch
            ((2, 3, 3), True)
        """
        size = -len(self.token_ids) % multiple
        if not size:
            return self
        return RaggedBatch(
            torch.cat([self.token_ids, self.token_ids.new_zeros(size)]),
            torch.cat([self.supervised, self.supervised.new_zeros(size)]),
            (*self.lengths, size),
            None if self.slots is None else (*self.slots, self.slots[-1]),
            None if self.prefixes is None else (*self.prefixes, None),
        )

    def expanded(self) -> "RaggedBatch":
        """Return the same sequences, each whole and by itself: the plain reference of those that continue another."""
        own = self.expanded_places()
        places = torch.cat(own)
        slots = None if self.slots is None else tuple(self.slots[index] for index in self._rows())
        lengths = tuple(len(part) for part in own)
        return RaggedBatch(self.token_ids[places], self.supervised[places], lengths, slots)

    def expanded_places(self) -> list[Tensor]:
        """Return where the tokens of each whole sequence stand in this batch."""
        places = torch.arange(len(self.token_ids)).split(self.lengths)
        prefixes = self._prefixes()
        befores = [() if (prefix := prefixes[index]) is None else (places[prefix],) for index in self._rows()]
        return [torch.cat([*before, places[index]]) for index, before in zip(self._rows(), befores, strict=True)]

    def _prefixes(self) -> tuple[int | None, ...]:
        return (None,) * len(self.lengths) if self.prefixes is None else self.prefixes

    def _rows(self) -> list[int]:
        """Return the sequences that stand for themselves: those that none continues."""
        return [index for index in range(len(self.lengths)) if index not in set(self._prefixes())]

    def segments(self) -> tuple[Segment, ...] | None:
        """Return the runs of tokens of one slot, or None where the batch does not say.

        Example:
            >>> marks = torch.zeros(5, dtype=torch.bool)
            >>> RaggedBatch(torch.arange(5), marks, (2, 2, 1), (1, 1, None)).segments()
            (Segment(start=0, stop=4, slot=1), Segment(start=4, stop=5, slot=None))
        """
        if self.slots is None:
            return None
        return segments_of(self.slots, self.lengths)

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Return where the supervised tokens are predicted (rows of hidden states), and what they are (ids)."""
        places = self.supervised.nonzero().squeeze(1)
        return places - 1, self.token_ids[places]


def segments_of(slots: Sequence[int | None], lengths: Sequence[int]) -> tuple[Segment, ...]:
    """Return the runs of rows of one slot, each slot standing for some rows.

    Example:
        >>> segments_of((1, 1, None), (2, 2, 1))
        (Segment(start=0, stop=4, slot=1), Segment(start=4, stop=5, slot=None))
    """
    found, start = [], 0
    for slot, run in groupby(zip(slots, lengths, strict=True), key=itemgetter(0)):
        stop = start + sum(length for _, length in run)
        found.append(Segment(start, stop, slot))
        start = stop
    return tuple(found)


def ragged_attention_forward(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1HTE: Tensor,
    value_1HTE: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (transformers' signature; no mask is made for this attention)
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a ragged row; transformers calls it.

    Equals scaled dot-product attention of each sequence alone: by `ops.attention.causal_attention` on a CPU, by
    torch's kernels on other devices and with dropout (there with a mask for sequences that continue
    another, whose keys and values stand before their own). Key and value heads are not repeated for grouped queries.
    What a layer asks for is noted in `seen_options`, a dict by module, where a caller gives one.

    Raises:
        BaseModelError: If the lengths did not arrive, or the model asks for a kind of attention not written here.
    """
    lengths, prefixes = _sequences(module, scaling, options)
    window = options.get("sliding_window")
    if not dropout and query_1HTE.device.type == "cpu":
        scaling = query_1HTE.shape[-1] ** -0.5 if scaling is None else scaling
        q_THE, k_TKE, v_TKE = (part.squeeze(0).transpose(0, 1) for part in (query_1HTE, key_1HTE, value_1HTE))
        out_THE = causal_attention(
            q_THE, k_TKE, v_TKE, lengths, prefixes, scaling=scaling, window=window, keep=options.get("keep")
        )
        return out_THE[None], None
    parts = (query_1HTE, key_1HTE, value_1HTE)
    return _attention_by_runs(*parts, lengths, prefixes, dropout=dropout, scaling=scaling, window=window)[None], None


def plain_attention_forward(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1HTE: Tensor,
    value_1HTE: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (transformers' signature)
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Do what `ragged_attention_forward` does by torch's own attention alone; transformers calls it.

    Raises:
        BaseModelError: As there.
    """
    lengths, prefixes = _sequences(module, scaling, options)
    window = options.get("sliding_window")
    parts = (query_1HTE, key_1HTE, value_1HTE)
    return _attention_by_runs(*parts, lengths, prefixes, dropout=dropout, scaling=scaling, window=window)[None], None


Prefixes = Sequence[int | None] | None


def _sequences(module: nn.Module, scaling: float | None, options: dict[str, Any]) -> tuple[Sequence[int], Prefixes]:
    """Return lengths and prefixes; note what the layer asks for, and refuse what is not written here."""
    lengths: Sequence[int] | None = options.get("sequence_lengths")
    if lengths is None:
        raise BaseModelError(f"{type(module).__name__} does not pass options on to its attention: no ragged batches")
    if (seen := options.pop("seen_options", None)) is not None:
        seen[module] = {"scaling": scaling, **{name: options[name] for name in options if name not in _SEQUENCES}}
    for option, word in _REFUSED.items():
        if options.get(option) is not None:
            raise BaseModelError(f"{type(module).__name__} uses {word} attention, which ragged batches do not support")
    return lengths, options.get("sequence_prefixes")


def _attention_by_runs(
    query_1HTE: Tensor,
    key_1HTE: Tensor,
    value_1HTE: Tensor,
    lengths: Sequence[int],
    prefixes: Prefixes = None,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return attention by torch's kernels, shape (T, H, E), runs of sequences of equal length together."""
    outputs = []
    for run in runs_of(spans_of(lengths, prefixes)):
        count, length, before = len(run.rows), run.lengths[0], run.before_length
        q_GHSE, k_GHSE, v_GHSE = (
            part.squeeze(0)[:, run.extent].unflatten(1, (count, length)).transpose(0, 1)
            for part in (query_1HTE, key_1HTE, value_1HTE)
        )
        if run.before is not None:
            k_GHSE, v_GHSE = (
                torch.cat([whole[:, :, run.before].expand(count, -1, -1, -1), own], dim=2)
                for whole, own in ((key_1HTE, k_GHSE), (value_1HTE, v_GHSE))
            )
        masked = before or (window is not None and length > window)
        mask_SL = _mask(length, before, window, q_GHSE.device) if masked else None
        out_GHSE = F.scaled_dot_product_attention(
            q_GHSE,
            k_GHSE,
            v_GHSE,
            attn_mask=mask_SL,
            dropout_p=dropout,
            is_causal=mask_SL is None,
            scale=scaling,
            enable_gqa=q_GHSE.shape[1] != k_GHSE.shape[1],
        )
        outputs.append(out_GHSE.transpose(1, 2).reshape(count * length, q_GHSE.shape[1], -1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _mask(length: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys a query sees, shape (S, L): itself and the `window - 1` before it, or all before it."""
    place = torch.arange(before + length, device=device)
    distance = place[before:, None] - place[None, :]
    return (distance >= 0) & (distance < (window or before + length))


AttentionInterface.register(ATTENTION, ragged_attention_forward)  # rows in transformers' own registry
AttentionInterface.register(PLAIN_ATTENTION, plain_attention_forward)


@contextmanager
def ragged_attention(model: PreTrainedModel, *, fast: bool = True) -> Iterator[None]:
    """Let a model's attention take ragged rows within the block, by our own function or by torch's alone."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION if fast else PLAIN_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def hidden_states(model: PreTrainedModel, batch: RaggedBatch, **options: Any) -> Tensor:
    """Return the last hidden states of a ragged batch, shape (T, D); options go down to the attention function.

    Raises:
        BaseModelError: Outside of `ragged_attention(model)`, where sequences might see each other.
    """
    if model.config._attn_implementation not in (ATTENTION, PLAIN_ATTENTION):
        raise BaseModelError(f"{type(model).__name__} got a ragged batch outside of ragged_attention(model)")
    segments = routed_segments(model, batch)
    if batch.prefixes is not None:
        options["sequence_prefixes"] = batch.prefixes
    with nullcontext() if segments is None else attachment_of(model).routing.using(segments):
        out = model.get_decoder()(
            input_ids=batch.token_ids[None].to(model.device),
            position_ids=batch.positions[None].to(model.device),
            use_cache=False,
            sequence_lengths=batch.lengths,
            **options,
        )
    return out.last_hidden_state.squeeze(0)


def routed_segments(model: PreTrainedModel, batch: RaggedBatch) -> tuple[Segment, ...] | None:
    """Return the segments that a batch goes through, or None where all of it goes through one slot.

    Raises:
        BaseModelError: If sequences that continue another may begin with an invocation: it is looked for in whole ones.
    """
    invocation = invocation_of(model)
    if batch.slots is None and invocation:
        if batch.prefixes is not None:
            raise BaseModelError("an activated adapter is not called in sequences that continue another; expand them")
        return ragged_segments([part.tolist() for part in batch.token_ids.split(batch.lengths)], invocation)
    return batch.segments()


def probe_batch(model: PreTrainedModel) -> RaggedBatch:
    """Return two short sequences on which something about a model is proved."""
    lengths = (5, 8)
    token_ids = torch.arange(sum(lengths)) * 7 % min(model.get_input_embeddings().weight.shape[0], 1000)
    return RaggedBatch(token_ids, torch.zeros(sum(lengths), dtype=torch.bool), lengths)


def base_alone(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model compute without its adapter within the block: where that acts is not what a probe asks."""
    attachment = find_attachment(model)
    return nullcontext() if attachment is None else attachment.routing.everywhere(None)


def difference_from_alone(model: PreTrainedModel, batch: RaggedBatch, got_TV: Tensor) -> tuple[float, float]:
    """Return by how much logits differ from those of each sequence alone, as a share; and how much they may.

    Measured in bfloat16: ways that are right differ by 0.012 (SmolLM2), 0.014 (Qwen2.5) and 0.033 (Gemma 3); with
    positions twice as far apart it is 0.19 to 0.45, with sequences that see each other 0.25 to 0.93.
    """
    parts = batch.token_ids.split(batch.lengths)
    expected_TV = torch.cat([model(input_ids=part[None].to(model.device)).logits[0] for part in parts])
    return relative_error(got_TV, expected_TV), 1e-3 if got_TV.dtype.itemsize >= 4 else 5e-2


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return `|got - expected| / |expected|`: in 16 bits the largest of many differences says little."""
    wide = expected.double()
    return (torch.linalg.vector_norm(got.double() - wide) / torch.linalg.vector_norm(wide)).item()


def check_ragged(model: PreTrainedModel) -> None:
    """Prove on two short sequences that ragged batches give what the model gives for each alone.

    This also proves that the logits are the head's product with the hidden states and nothing more, on which the
    chunked loss relies.

    Raises:
        BaseModelError: If the model cannot take ragged batches, with the reason.
    """
    name = type(model).__name__
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise BaseModelError(
            f"{name} has layers of type {', '.join(sorted(kinds))}; ragged batches do not support them"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise BaseModelError(f"{name} has no language-model head to train with")
    batch = probe_batch(model)
    with evaluating(model), torch.no_grad(), base_alone(model):
        with ragged_attention(model):
            got = head(hidden_states(model, batch))
        difference, tolerance = difference_from_alone(model, batch, got)
    if not difference <= tolerance:
        raise BaseModelError(
            f"{name} cannot take ragged batches: logits of two sequences in one row differ from those of each alone "
            f"by {difference:.2g} of their size (allowed {tolerance:g})"
        )
