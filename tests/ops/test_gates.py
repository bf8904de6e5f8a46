"""Gates equal what torch makes of them, gradients included, and keep less."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops.gates import ACTIVATIONS, split_gate


def plainly(both: Tensor, name: str) -> Tensor:
    gate, up = both.chunk(2, -1)
    return ACTIVATIONS[name].forward(gate) * up


@given(
    st.integers(0, 5),
    st.integers(1, 5),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_equals_its_parts_with_gradients(rows, features, name, dtype, strided):
    generator = torch.Generator().manual_seed(rows)
    both = torch.randn(rows, 2 * features, generator=generator, dtype=torch.float64).to(dtype)
    slope = torch.randn(features, rows, generator=generator, dtype=torch.float64).to(dtype).T
    found = []
    for function in (plainly, lambda both, name: split_gate(both, ACTIVATIONS[name])):
        leaf = both.clone().requires_grad_()
        given = leaf.T.contiguous().T if strided else leaf
        out = function(given, name)
        found.append([out.detach(), torch.autograd.grad(out, leaf, slope)[0]])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gradient_may_be_written_over_what_comes(name):
    generator = torch.Generator().manual_seed(0)
    d, x = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].forward(leaf), leaf, d)
    got = ACTIVATIONS[name].backward(d, x, d)
    assert got is d
    torch.testing.assert_close(got, expected)


def test_gate_and_up_alone_are_kept():
    saved: list[Tensor] = []
    both = torch.randn(4, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        split_gate(both, ACTIVATIONS["silu"])
    assert [one.data_ptr() for one in saved] == [both.data_ptr()]
