"""Activated LoRA: an adapter that is silent until its invocation sequence, so that what came before stays as it was.

Keys and values of the tokens before the invocation are the base's own, and a cache of them can be shared.

Source:
    Greenewald et al. 2025, arXiv:2504.12397; PEFT `lora/variants.py`, calculate_alora_offsets.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from veneer.nn.attach import find_attachment
from veneer.nn.routing import Segment


def invocation_of(model: nn.Module) -> tuple[int, ...]:
    """Return the invocation sequence of the attached adapter; empty where there is none."""
    attachment = find_attachment(model)
    return () if attachment is None else attachment.config.invocation_tokens


def activation_start(token_ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where the last invocation sequence begins, or None where there is none: the adapter then stays silent.

    Example:
        >>> activation_start([1, 7, 8, 2, 7, 8, 3], [7, 8]), activation_start([1, 7], [7, 8])
        (4, None)
    """
    ids, wanted = list(token_ids), list(invocation)
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)


def ragged_segments(sequences: Sequence[Sequence[int]], invocation: Sequence[int]) -> tuple[Segment, ...]:
    """Return the segments of sequences one after another: each is the base's until its invocation begins.

    Example:
        >>> ragged_segments([[1, 7, 2], [1, 2]], [7])
        (Segment(start=0, stop=1, slot=None), Segment(start=1, stop=3, slot=0), Segment(start=3, stop=5, slot=None))
    """
    segments: list[Segment] = []
    row = 0
    for ids in sequences:
        start = activation_start(ids, invocation)
        border = row + (len(ids) if start is None else start)
        for begin, stop, slot in ((row, border, None), (border, row + len(ids), 0)):
            if begin < stop and segments and segments[-1].slot == slot:
                segments[-1] = Segment(segments[-1].start, stop, slot)
            elif begin < stop:
                segments.append(Segment(begin, stop, slot))
        row += len(ids)
    return tuple(segments)


def generation_segments(
    padded: Sequence[Sequence[int]], invocation: Sequence[int]
) -> Mapping[int, tuple[Segment, ...]]:
    """Return the segments of a batch that is generated from, by the number of rows of a call.

    The first call has all tokens of all prompts, padded on the left; those after it have one token of each, which is
    the adapter's where the prompt invoked it.

    Args:
        padded: Prompts of one length.
        invocation: The invocation sequence.
    """
    awake = [activation_start(ids, invocation) is not None for ids in padded]
    one_each = ragged_segments([[0] if one else [1] for one in awake], [0])
    return {len(awake): one_each, sum(len(ids) for ids in padded): ragged_segments(padded, invocation)}
