"""The chunked head and loss equals its reference, gradients included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import loss, reference


def both(rows: int, hidden: int, vocabulary: int, with_bias: bool, dtype: torch.dtype, scale: float) -> list:
    generator = torch.Generator().manual_seed(rows * 100 + vocabulary)
    x = torch.randn(rows, hidden, generator=generator, dtype=dtype) * scale
    W = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype) if with_bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    results = []
    for function in (reference.linear_cross_entropy, loss.linear_cross_entropy):
        leaf = x.clone().requires_grad_()
        value = function(leaf, W, bias, targets)
        (3 * value).backward()
        results.append((value.detach(), leaf.grad))
    return results


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.sampled_from([0.1, 30.0]))
def test_equals_reference_with_gradients(rows, hidden, vocabulary, with_bias, scale):
    (expected, expected_grad), (got, got_grad) = both(rows, hidden, vocabulary, with_bias, torch.float64, scale)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, expected_grad)


def test_many_chunks_equal_one(monkeypatch):
    whole = both(100, 4, 7, True, torch.float32, 1.0)[1]
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 16)
    chunked = both(100, 4, 7, True, torch.float32, 1.0)[1]
    torch.testing.assert_close(chunked, whole)


def test_a_head_that_trains_is_refused():
    W = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        loss.linear_cross_entropy(torch.zeros(1, 2), W, None, torch.tensor([0]))


def test_infinite_inputs_give_a_loss_that_is_not_finite():
    """Training relies on this to notice them."""
    x = torch.full((1, 2), float("inf"))
    assert not torch.isfinite(loss.linear_cross_entropy(x, torch.ones(3, 2), None, torch.tensor([0])))
