"""The fused linear layer equals its reference, gradients included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import lora, reference

sizes = st.integers(1, 7)


def make(rows: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype, with_bias: bool, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    bias = draw(outputs) if with_bias else None
    return [draw(rows, inputs), draw(outputs, inputs), bias, draw(rank, inputs), draw(outputs, rank)]


@given(sizes, sizes, sizes, sizes, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_equals_reference_with_gradients(rows, inputs, outputs, rank, with_bias, dtype):
    arguments = make(rows, inputs, outputs, rank, dtype, with_bias)
    results = []
    for function in (reference.lora_linear, lora.lora_linear):
        leaves = [None if one is None else one.clone().requires_grad_() for one in arguments]
        out = function(*leaves, 0.7)
        (out * torch.arange(out.numel(), dtype=dtype).view_as(out)).sum().backward()
        results.append([out.detach()] + [leaf.grad for leaf in leaves if leaf is not None])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("frozen", ["x", "W", "A", "B"])
def test_gradcheck_with_one_input_frozen(frozen):
    arguments = make(3, 4, 5, 2, torch.float64, with_bias=True)
    for name, one in zip("xWbAB", arguments, strict=True):
        one.requires_grad_(name != frozen)
    assert torch.autograd.gradcheck(lambda *a: lora.lora_linear(*a, 1.3), arguments)


def test_leading_dimensions_are_kept():
    x, W, bias, A, B = make(6, 4, 5, 2, torch.float64, with_bias=True)
    folded = lora.lora_linear(x.view(2, 3, 4), W, bias, A, B, 0.5)
    torch.testing.assert_close(folded.view(6, 5), reference.lora_linear(x, W, bias, A, B, 0.5))


def test_only_the_input_is_kept_for_backward():
    """Of the tensors with as many rows as the input, none but the input itself is saved."""
    x, W, bias, A, B = make(64, 4, 5, 2, torch.float32, with_bias=True)
    saved: list[torch.Tensor] = []
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora.lora_linear(x, W, bias, A, B, 0.5)
    assert [t.data_ptr() for t in saved if t.shape[0] == 64] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_update_is_added_to_any_output_with_the_gradients_of_the_plain_sum(dtype):
    shapes = ((5, 4), (5, 3), (2, 3), (4, 2))
    generator = torch.Generator().manual_seed(0)
    y, x, A, B = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    weights = torch.randn(5, 4, generator=generator, dtype=dtype)
    ours = torch.autograd.grad((lora.add_lora(y, x, A, B, 0.7) * weights).sum(), (y, x, A, B))
    theirs = torch.autograd.grad(((y + reference.lora_delta(x, A, B, 0.7)) * weights).sum(), (y, x, A, B))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert lora.add_lora(y.half(), x, A, B, 0.7).dtype == torch.promote_types(torch.half, dtype)
