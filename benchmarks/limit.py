"""The bare kernels of a training step, timed alone: the products and the attention calls, and nothing else.

Once by torch's kernels alone (`x @ W.T`, its attention), which is what a step without any overhead would take that is
made of them, and once by the quickest of torch's and ours.
"""

import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

import veneer
from veneer.base.ragged import ragged_attention_forward
from veneer.nn.attach import attachment_of
from veneer.ops.product import product, sum_product

REPEATS = 7


def best_seconds(kernel: Callable[[], object]) -> float:
    """The shortest of some calls, after one to warm up."""
    kernel()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        kernel()
        times.append(time.perf_counter() - start)
    return min(times)


def quickest(*kernels: Callable[[], object]) -> float:
    """The shortest of several ways to do the same."""
    return min(best_seconds(kernel) for kernel in kernels)


def products_seconds(rows: int, outputs: int, inputs: int, *, ours: bool) -> float:
    """`x Wᵀ` and `dy W`: 4·rows·outputs·inputs operations."""
    x, W, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    forward, backward = [lambda: x @ W.T], [lambda: dy @ W]
    if ours:
        forward.append(lambda: product(x, W))
        backward.append(lambda: product(dy, W.T))
    return quickest(*forward) + quickest(*backward)


def factors_seconds(rows: int, outputs: int, inputs: int, rank: int) -> float:
    """`x Aᵀ`, `dy B`, and the gradients of A and B: 4·rows·rank·(outputs + inputs) operations; the quickest ways."""
    x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
    A, Bt, z = torch.randn(rank, inputs), torch.randn(rank, outputs), torch.randn(rows, rank)
    return (
        quickest(lambda: product(x, A), lambda: x @ A.T)
        + quickest(lambda: product(dy, Bt), lambda: dy @ Bt.T)
        + quickest(lambda: sum_product(z, x), lambda: z.T @ x)
        + quickest(lambda: sum_product(z, dy), lambda: z.T @ dy)
    )


def attention_seconds(model: PreTrainedModel, lengths: tuple[int, ...], *, ours: bool) -> float:
    """One layer's attention, forward and backward: as the model calls it, or by torch's on sequences of one length."""
    config, tokens = model.config, sum(lengths)
    size = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, tokens, count, size).transpose(1, 2).requires_grad_() for count in heads)
    assert len(set(lengths)) == 1

    def by_ours() -> torch.Tensor:
        return ragged_attention_forward(nn.Identity(), q, k, v, None, scaling=size**-0.5, sequence_lengths=lengths)[0]

    def by_torch() -> torch.Tensor:
        each = (one.unflatten(2, (len(lengths), -1)).squeeze(0).transpose(0, 1) for one in (q, k, v))
        return F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True)

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        slope = torch.randn_like(call())
        return best_seconds(lambda: torch.autograd.grad(call(), (q, k, v), slope))

    return min(seconds(by_torch), seconds(by_ours)) if ours else seconds(by_torch)


def limit_seconds(model: PreTrainedModel, lengths: tuple[int, ...], supervised: int, *, ours: bool) -> dict[str, float]:
    """Return the seconds that the kernels of one step take by themselves.

    Args:
        model: With an adapter attached.
        lengths: Tokens of each sequence.
        supervised: Tokens that go through the head.
        ours: By the quickest of torch's kernels and ours, or by torch's alone.
    """
    rows = sum(lengths)
    shapes: Counter[tuple[int, int]] = Counter()
    factors: Counter[tuple[int, int, int]] = Counter()
    attachment = attachment_of(model)
    for target in attachment.targets:
        pair = attachment.slot(target).pair()
        shapes[pair.sizes] += 1
        factors[(*pair.sizes, pair.rank)] += 1
    head = model.get_output_embeddings()
    chunk = veneer.ops.loss.chunk_rows(head.weight.shape[0], 4)
    chunks = -(-supervised // chunk)
    return {
        "products": sum(count * products_seconds(rows, *shape, ours=ours) for shape, count in shapes.items()),
        "head": chunks * products_seconds(-(-supervised // chunks), *head.weight.shape, ours=ours),
        "factors": sum(count * factors_seconds(rows, *shape) for shape, count in factors.items()),
        "attention": model.config.num_hidden_layers * attention_seconds(model, lengths, ours=ours),
    }
