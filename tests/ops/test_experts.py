"""The experts' linear layers in one step equal the plain loop over experts, gradients included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops import reference
from veneer.ops.experts import collect_rows, lora_experts, spread_rows

sizes = st.integers(1, 5)
TENSORS = ("x", "W", "bias", "A", "B")


def make(counts: list[int], inputs: int, outputs: int, rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    experts = len(counts)
    shapes = (
        (sum(counts), inputs),
        (experts, outputs, inputs),
        (experts, outputs),
        (experts, rank, inputs),
        (experts, outputs, rank),
    )
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    sizes,
    sizes,
    sizes,
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_reference_with_gradients(counts, inputs, outputs, rank, with_bias, transposed, dtype):
    arguments = make(counts, inputs, outputs, rank, dtype)
    if transposed:
        arguments[1] = arguments[1].mT.contiguous().mT
    results = []
    for function in (reference.lora_experts, lora_experts):
        leaves: list[Tensor | None] = [one.clone().requires_grad_() for one in arguments]
        if not with_bias:
            leaves[2] = None
        out = function(*leaves, 0.7, counts)
        (out * torch.arange(out.numel(), dtype=dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", ["x", "W"])
def test_experts_with_many_rows_each(frozen, transposed):
    """Where the processor has matrix tiles, all of them are multiplied in one go."""
    counts = [90, 0, 200, 3, 64]
    arguments = make(counts, 70, 100, 5)
    results = []
    for function, dtype in ((reference.lora_experts, torch.float64), (lora_experts, torch.float32)):
        leaves = [
            one.to(dtype, copy=True).requires_grad_(name != frozen)
            for name, one in zip(TENSORS, arguments, strict=True)
        ]
        if transposed:
            leaves[1] = leaves[1].detach().mT.contiguous().mT.requires_grad_(frozen != "W")
        out = function(*leaves, 0.7, counts)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("frozen", TENSORS)
def test_gradcheck_with_one_input_frozen(frozen):
    counts = [2, 0, 1]
    arguments = make(counts, 3, 4, 2)
    for name, one in zip(TENSORS, arguments, strict=True):
        one.requires_grad_(name != frozen)
    assert torch.autograd.gradcheck(lambda *given: lora_experts(*given, 1.3, counts), arguments)


def test_an_expert_is_its_own_linear_layer():
    counts = [3, 0, 2]
    x, W, bias, A, B = make(counts, 4, 5, 2)
    out = lora_experts(x, W, bias, A, B, 0.5, counts)
    torch.testing.assert_close(out[:3], reference.lora_linear(x[:3], W[0], bias[0], A[0], B[0], 0.5))
    torch.testing.assert_close(out[3:], reference.lora_linear(x[3:], W[2], bias[2], A[2], B[2], 0.5))


def test_an_expert_without_rows_gets_a_gradient_of_zeros():
    counts = [3, 0]
    x, W, bias, A, B = make(counts, 4, 5, 2)
    A.requires_grad_(), B.requires_grad_()
    lora_experts(x, W, bias, A, B, 0.5, counts).sum().backward()
    assert A.grad[0].any()
    assert B.grad[0].any()
    assert not A.grad[1].any()
    assert not B.grad[1].any()


def test_of_all_rows_the_input_and_its_projection_are_kept_for_backward():
    counts = [40, 24]
    x, W, bias, A, B = make(counts, 8, 6, 2)
    saved: list[Tensor] = []
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        lora_experts(x, W, bias, A, B, 0.5, counts)
    assert sorted(tuple(one.shape) for one in saved if len(one) == 64) == [(64, 2), (64, 8)]


def test_autocast_casts_each_product():
    counts = [2, 3]
    arguments = make(counts, 4, 5, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora_experts(*arguments, 0.5, counts)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference.lora_experts(*arguments, 0.5, counts), rtol=0.1, atol=0.1)


@given(st.integers(1, 5), st.integers(1, 3), sizes, st.integers(0, 50))
def test_rows_to_their_experts_and_back_with_gradients(tokens, each, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens * each, generator=generator)
    back = order.argsort()
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, each, generator=generator, dtype=torch.float64, requires_grad=True)
    square = torch.arange(tokens * each * hidden, dtype=torch.float64).view(-1, hidden)

    def plainly(x: Tensor, weights: Tensor) -> Tensor:
        rows = x.repeat_interleave(each, 0)[order] * square
        return (rows[back].view(tokens, each, hidden) * weights[:, :, None]).sum(1)

    out = collect_rows(spread_rows(x, order, back) * square, weights, order, back)
    wanted = plainly(x, weights)
    torch.testing.assert_close(out, wanted)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(out, (x, weights), cotangent),
        torch.autograd.grad(wanted, (x, weights), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen", [0, 1])
def test_collecting_mixes_dtypes_and_leaves_out_what_nobody_asks_for(frozen):
    """Rows in 16 bits and weights in 32, as routers give them: the sum is as wide as the weights."""
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.randn(4, 3, dtype=torch.bfloat16).requires_grad_(frozen != 0)
    weights = torch.rand(2, 2).requires_grad_(frozen != 1)
    out = collect_rows(rows, weights, order, order.argsort())
    assert out.dtype == torch.float32
    out.sum().backward()
    leaves = (rows, weights)
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad.dtype == leaves[1 - frozen].dtype
