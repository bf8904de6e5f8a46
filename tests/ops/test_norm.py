"""The norm that keeps little equals its reference, gradients included."""

import pytest
import torch

from veneer.ops import reference
from veneer.ops.norm import RMSNorm, rms_norm


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_reference_with_gradient(offset, dtype):
    weight, slope = draw(6, dtype=dtype), draw(2, 3, 6, dtype=dtype)
    found = []
    for function in (
        lambda x: reference.rms_norm(x, weight, 1e-5, offset),
        lambda x: rms_norm(x, RMSNorm(weight, 1e-5, offset)),
    ):
        x = draw(2, 3, 6, dtype=dtype).requires_grad_()
        out = function(x)
        out.backward(slope)
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0])


def test_gradcheck():
    norm = RMSNorm(draw(5), 1e-3)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, norm), [draw(4, 5).requires_grad_()])


def test_sixteen_bits_are_computed_in_thirty_two():
    x, weight = draw(4, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    expected = reference.rms_norm(x.float(), weight.float(), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, RMSNorm(weight, 1e-5)), expected)


def test_only_the_input_and_a_number_a_row_are_kept():
    x = draw(8, 5).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, RMSNorm(draw(5), 1e-5))
    assert [tuple(one.shape) for one in saved] == [(8, 5), (8, 1)]
    assert saved[0].data_ptr() == x.data_ptr()
