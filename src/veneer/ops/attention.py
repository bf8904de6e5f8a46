"""Causal attention of many sequences in one row, on a CPU: on matrix tiles, by torch's kernel, or in blocks.

Shapes: T tokens of all sequences, G sequences of a bucket, S of its longest, H query heads, K key heads, P tokens of a
prefix that sequences continue, L = P + S, E head size; `ops.attention_layout` has the others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops import attention_blocks, attention_tiles
from veneer.ops.attention_blocks import Parts, blocks_of
from veneer.ops.attention_layout import Bucket, Span, buckets_of, grouped, runs_of, scatter, scatter_keys, spans_of
from veneer.ops.keeping import Keep, room
from veneer.ops.product import BLAS_IS_QUICKER

KERNEL_LENGTH = 768
"""Sequences of so many tokens have a quicker backward by torch's kernel too; its forward is quicker for all."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, *([torch.float32] if BLAS_IS_QUICKER else []))
"""What torch's kernel is quick in. On AMD's processors our blocks take 0.78 to 0.87 of its time in float32."""


class _Task(NamedTuple):
    """What is asked of all sequences."""

    scaling: float
    window: int | None
    heads: int


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values as they came, and what torch's kernel wants beside; see `causal_attention`."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans: Sequence[Span], task: _Task, keep: Keep | None
    ) -> Tensor:
        given, out_THE = (q_THE, k_TKE, v_TKE), room(keep, q_THE.shape, q_THE)
        runs, sums = [], []
        on_tiles = attention_tiles.chosen(spans, given, task.window)
        attention_tiles.forward(given, out_THE, on_tiles, task.scaling)
        others = [span for span in spans if span not in on_tiles]
        for run in runs_of(span for span in others if _knows(span, q_THE, task)):
            sums_GHL = _kernel_forward(given, out_THE, run, task)
            if run.lengths[0] >= KERNEL_LENGTH:
                runs.append(run)
                sums.append(sums_GHL if keep is None else keep(sums_GHL.shape, sums_GHL.dtype).copy_(sums_GHL))
        for bucket in buckets_of(span for span in others if not _knows(span, q_THE, task)):
            _blocks_forward(given, out_THE, bucket, task)
        # What a backward does not read is not kept.
        ctx.save_for_backward(*given, *([out_THE, *sums] if runs else []))
        ctx.on_tiles, ctx.spans, ctx.runs, ctx.task = on_tiles, others, runs, task
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THE: Tensor) -> tuple[Tensor | None, ...]:
        q_THE, k_TKE, v_TKE, *outputs = ctx.saved_tensors
        given = (q_THE, k_TKE, v_TKE)
        wanted = (q_THE.new_empty(q_THE.shape), k_TKE.new_empty(k_TKE.shape), v_TKE.new_empty(v_TKE.shape))
        attention_tiles.backward(given, dout_THE, wanted, ctx.on_tiles, ctx.task.scaling)
        done = [rows for run in ctx.runs for rows in run.rows]
        work: list[tuple[Bucket, Tensor | None]] = list(zip(ctx.runs, outputs[1:], strict=True))
        work += [(bucket, None) for bucket in buckets_of(span for span in ctx.spans if span.rows not in done)]
        # A prefix has its own gradient before those who continue it add to it.
        for bucket, sums_GHL in sorted(work, key=lambda one: one[0].before is not None):
            if sums_GHL is None:
                _blocks_backward(given, dout_THE, wanted, bucket, ctx.task)
            else:
                _kernel_backward(given, (outputs[0], sums_GHL), dout_THE, wanted, bucket, ctx.task)
        return *wanted, None, None, None


def _knows(span: Span, like: Tensor, task: _Task) -> bool:
    """Tell whether a sequence is one for torch's kernel, which has no windows.

    A prefix it computes again for each that continues it, which pays where that is as long.
    """
    fits = task.window is None or task.window >= span.before_length + span.length
    return like.dtype in KERNEL_DTYPES and fits and span.before_length <= span.length


def _blocks_forward(given: Parts, out_THE: Tensor, bucket: Bucket, task: _Task) -> None:
    """Write a bucket's outputs."""
    parts = _grouped_parts(given, bucket, task)
    part_NME = torch.empty_like(parts[0])
    attention_blocks.forward(parts, part_NME, task.scaling, blocks_of(bucket, parts[0], task.window))
    scatter(out_THE, part_NME.unflatten(0, (len(bucket.rows), -1)), bucket)


def _blocks_backward(given: Parts, dout_THE: Tensor, wanted: Parts, bucket: Bucket, task: _Task) -> None:
    """Write a bucket's gradients, from nothing but what was given."""
    parts, dout_NME = _grouped_parts(given, bucket, task), grouped(dout_THE, bucket, task.heads)
    blocks = blocks_of(bucket, dout_NME, task.window)
    gradients = attention_blocks.backward(parts, dout_NME, task.scaling, blocks)
    dq_GKME, dk_GKLE, dv_GKLE = (part.unflatten(0, (len(bucket.rows), -1)) for part in gradients)
    scatter(wanted[0], dq_GKME, bucket)
    scatter_keys(wanted[1], dk_GKLE, bucket)
    scatter_keys(wanted[2], dv_GKLE, bucket)


def _grouped_parts(given: Parts, bucket: Bucket, task: _Task) -> Parts:
    """Return a bucket's queries, shape (N, M, E), and its keys and values, (N, L, E)."""
    q_THE, k_TKE, v_TKE = given
    k_NLE, v_NLE = (grouped(part, bucket, task.heads, behind_prefix=True) for part in (k_TKE, v_TKE))
    return grouped(q_THE, bucket, task.heads), k_NLE, v_NLE


def _kernel_forward(given: Parts, out_THE: Tensor, run: Bucket, task: _Task) -> Tensor:
    """Do what `_blocks_forward` does by torch's kernel; return the sums that its backward needs."""
    q_GHLE, k_GKLE, v_GKLE = (_heads_first(part, run) for part in given)
    out_GHLE, sums_GHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_GHLE, k_GKLE, v_GKLE, 0.0, True, scale=task.scaling
    )
    scatter(out_THE, out_GHLE[:, :, run.before_length :], run)
    return sums_GHL


def _kernel_backward(
    given: Parts, found: tuple[Tensor, Tensor], dout_THE: Tensor, wanted: Parts, run: Bucket, task: _Task
) -> None:
    """Do what `_blocks_backward` does by torch's kernel, from its output of all and its sums of these."""
    out_THE, sums_GHL = found
    q_GHLE, k_GKLE, v_GKLE = (_heads_first(part, run) for part in given)
    # Outputs of a prefix that is computed again went nowhere, so nothing comes back from them.
    out_GHLE, dout_GHLE = (_heads_first(part, run, zeros=True) for part in (out_THE, dout_THE))
    dq_GHLE, dk_GKLE, dv_GKLE = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout_GHLE, q_GHLE, k_GKLE, v_GKLE, out_GHLE, sums_GHL, 0.0, True, scale=task.scaling
    )
    scatter(wanted[0], dq_GHLE[:, :, run.before_length :], run)
    scatter_keys(wanted[1], dk_GKLE, run)
    scatter_keys(wanted[2], dv_GKLE, run)


def _heads_first(x_THE: Tensor, run: Bucket, *, zeros: bool = False) -> Tensor:
    """Return a run's rows behind those of its prefix, or behind zeros, shape (G, H, L, E)."""
    own_GSHE = x_THE[run.extent].unflatten(0, (len(run.rows), -1))
    if run.before is not None:
        before_PHE = x_THE[run.before]
        before_PHE = torch.zeros_like(before_PHE) if zeros else before_PHE
        own_GSHE = torch.cat([before_PHE.expand(len(run.rows), -1, -1, -1), own_GSHE], dim=1)
    return own_GSHE.transpose(1, 2)


def causal_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: Sequence[int],
    prefixes: Sequence[int | None] | None = None,
    *,
    scaling: float,
    window: int | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Let each token attend to those before it in its own sequence, and to itself.

    Equals, and is tested against, `ops.reference.causal_attention`: for each sequence alone, key heads repeated,

        out = softmax(scaling * q @ k.T + mask) @ v

    Args:
        q_THE: Queries of all sequences, one after another.
        k_TKE: Keys; each head serves H / K query heads, which are its rows here: nothing is repeated.
        v_TKE: Values.
        lengths: Tokens of each sequence.
        prefixes: Which sequence each continues, whose keys and values then come before its own; None for none. One that
            is continued continues none.
        scaling: Factor of the products.
        window: How many tokens, itself included, a token sees; None for all.
        keep: Gives room for the output, and for what backward needs beside.

    Returns:
        Tensor (T, H, E), contiguous. Differentiable once.

    Cost:
        Of the S² scores of a sequence S (S + 96) / 2 are computed; with a window only those near it. Backward computes
        them again. Kept: queries, keys and values as they came, and the output where torch's kernel does the backward.
        Matrix tiles take what fits its window, behind a prefix or not, in float32 and bfloat16, if there are enough
        sequences and key heads for all threads: 0.45 and 0.3 of the time of the others (0.9 and 0.5 where one sequence
        fills a step). Else sequences of one length that follow each other go to torch's kernel together, without
        padding, in 16 bits and on Intel's processors in float32 too, unless they have windows or a prefix longer than
        themselves: forward it takes 0.6 to 0.97 of the blocks' time (measured on two cores, 9 heads over 3, 14 over 2,
        8 over 8; 0.25 to 0.7 in 16 bits), backward 0.64 to 0.98 from 768 tokens on, 0.8 to 1.5 below. Blocks compute 16
        bits in 32.

    Example:
        >>> q, v = torch.ones(3, 1, 1), torch.arange(3.0).view(3, 1, 1)
        >>> causal_attention(q, q, v, (2, 1), scaling=1.0).flatten().tolist()
        [0.0, 0.5, 2.0]
        >>> causal_attention(q, q, v, (2, 1), (None, 0), scaling=1.0).flatten().tolist()
        [0.0, 0.5, 1.0]

    Source:
        Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2. Differs: blocks of queries against all of
        their keys at once, so that nothing is rescaled.
    """
    task = _Task(scaling, window, k_TKE.shape[1])
    return _Attention.apply(q_THE, k_TKE, v_TKE, spans_of(lengths, prefixes), task, keep)
