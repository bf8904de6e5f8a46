"""Head and loss of the supervised tokens in chunks: the logits of all of them never exist at once.

Shapes: N supervised tokens, C a chunk of them, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.keeping import room, same_room
from veneer.ops.product import product

CHUNK_BYTES = 72 << 20
"""Size of the logits of one chunk where vocabularies are small: 384 rows of 49,152 words, 4 % quicker than 352."""

FILL = 32
"""Rows of a product with a head are a multiple of so many: oneDNN builds and keeps a kernel for each number of them."""

CHUNK_ROWS = 256
"""The fewest rows of a chunk: with less, products lose speed (measured: 64 rows 90 GFLOP/s, 256 rows 176)."""


def chunk_rows(vocabulary: int, element_bytes: int) -> int:
    """Return how many rows of logits fit into `CHUNK_BYTES`, at least `CHUNK_ROWS`.

    Example:
        >>> chunk_rows(49_152, 4), chunk_rows(262_144, 4)
        (384, 256)
    """
    return max(CHUNK_ROWS, CHUNK_BYTES // (vocabulary * element_bytes))


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradient of the hidden states together with the loss; see `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, W_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        needs_x = ctx.needs_input_grad[0]
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        loss = x_ND.new_zeros((), dtype=torch.float32 if x_ND.dtype.itemsize < 4 else x_ND.dtype)
        step = chunk_rows(W_VD.shape[0], loss.element_size())  # of what they are computed in
        # A chunk lies where the one before did: on the heap something small, above it, would be in the way.
        given, wide = same_room(x_ND.device), same_room(x_ND.device)
        for start in range(0, x_ND.shape[0], step):
            rows = slice(start, start + step)
            x_CD, targets_C1 = x_ND[rows], targets_N[rows, None]
            count = len(x_CD)
            logits_CV = product(_filled(x_CD), W_VD, bias_V, given)
            if logits_CV.dtype != loss.dtype:
                logits_CV = room(wide, logits_CV.shape, loss).copy_(logits_CV)
            target_logit_C1 = logits_CV[:count].gather(1, targets_C1)
            # A row less its maximum stays what it is, and its exponential can be taken in place.
            top_C1 = logits_CV.amax(1, keepdim=True)
            probability_CV = logits_CV.sub_(top_C1).exp_()
            total_C1 = probability_CV.sum(1, keepdim=True)
            loss += ((total_C1.log() + top_C1)[:count] - target_logit_C1).sum()
            if dx_ND is not None:
                probability_CV.div_(total_C1)
                probability_CV[:count].scatter_add_(1, targets_C1, -torch.ones_like(target_logit_C1))
                if probability_CV.dtype != W_VD.dtype:
                    probability_CV = room(given, probability_CV.shape, W_VD).copy_(probability_CV)
                dx_ND[rows] = product(probability_CV, W_VD.T)[:count]
            del logits_CV, probability_CV  # or two chunks of them exist where a product is not written into the room
        ctx.save_for_backward(*([dx_ND] if dx_ND is not None else []))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (saved[0] * dloss if saved else None), None, None, None


def _filled(x_CD: Tensor) -> Tensor:
    """Return rows followed by zeros up to a multiple of `FILL` on a CPU."""
    missing = -len(x_CD) % FILL if x_CD.device.type == "cpu" else 0
    return F.pad(x_CD, (0, 0, 0, missing)) if missing else x_CD


def linear_cross_entropy(x_ND: Tensor, W_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    """Return the summed cross-entropy of a frozen linear head, never holding more than a chunk of its logits.

    Equals, and is tested against, `ops.reference.linear_cross_entropy`:

        loss = F.cross_entropy(x @ W.T + bias, targets, reduction="sum")

    Args:
        x_ND: Hidden states of the supervised tokens.
        W_VD: Weight of the head; it gets no gradient.
        bias_V: Bias of the head, or None; it gets no gradient.
        targets_N: Ids of the tokens to be predicted.

    Returns:
        Scalar, float32 for 16-bit inputs. Differentiable once, with respect to `x_ND` only.

    Raises:
        ValueError: If the head asks for a gradient, which this function does not give.

    Cost:
        4·N·D·V operations with gradient, 2·N·D·V without; one chunk of logits (72 MiB, or 256 rows), one (N, D) buffer.

    Example:
        >>> round(linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), None, torch.tensor([0, 4])).item(), 4)
        3.2189

    Source:
        Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2 (gradient with the loss, in chunks); differs: the
        head is frozen, and only supervised tokens come in.
    """
    if torch.is_grad_enabled() and (W_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)):
        raise ValueError("linear_cross_entropy gives the head no gradient; use ops.reference for a head that trains")
    return _LinearCrossEntropy.apply(x_ND, W_VD, bias_V, targets_N)
