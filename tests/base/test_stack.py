"""Activations lie side by side in memory of their own, and nothing that is in use is ever written over."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.base import stack as stacks
from veneer.base.stack import ALIGNMENT, ActivationStack

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def address(stack: ActivationStack) -> int:
    return stack.empty((1,), torch.float32).data_ptr()


def test_tensors_lie_side_by_side():
    stack = ActivationStack(1 << 20)
    first, second = stack.empty((3,), torch.float32), stack.empty((2, 5), torch.bfloat16)
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    assert second.shape == (2, 5)
    assert second.is_contiguous()
    assert second._base is None


def test_memory_is_taken_again_once_nothing_of_it_is_in_use():
    stack = ActivationStack(1 << 20)
    before = address(stack)
    stack.reset()
    assert address(stack) == before


@pytest.mark.parametrize("part", [lambda one: one, lambda one: one[1:], lambda one: one.view(2, 2)])
def test_what_is_in_use_stays(part):
    stack = ActivationStack(1 << 20)
    kept = part(stack.empty((4,), torch.float32).fill_(1.0))
    gc.collect()
    for value in (2.0, 3.0):
        stack.reset()
        stack.empty((64,), torch.float32).fill_(value)
    assert kept.flatten().eq(1.0).all()


def test_what_a_graph_keeps_stays():
    stack = ActivationStack(1 << 20)
    weight = torch.ones(4, requires_grad=True)
    out = (weight * stack.empty((4,), torch.float32).fill_(2.0)).sum()
    stack.reset()
    stack.empty((64,), torch.float32).fill_(5.0)
    out.backward()
    assert weight.grad.eq(2.0).all()


def test_what_does_not_fit_goes_to_the_heap():
    stack = ActivationStack(256)
    inside, outside = stack.empty((32,), torch.float32), stack.empty((64,), torch.float32)
    assert inside.untyped_storage().nbytes() == 256
    assert outside.untyped_storage().data_ptr() == outside.data_ptr() != inside.data_ptr()


@pytest.mark.parametrize("error", [OSError, ValueError, OverflowError])
def test_where_nothing_can_be_reserved_everything_goes_to_the_heap(error, monkeypatch):
    def refuse(_):
        raise error

    monkeypatch.setattr(stacks, "_reserved", refuse)
    stack = ActivationStack(1 << 20)
    for _ in range(2):
        assert stack.empty((2,), torch.float32).fill_(1.0).sum() == 2
        stack.reset()


def test_an_unused_stack_reserves_nothing():
    stack = ActivationStack()
    stack.reset()
    assert stack._region is None


@given(st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=8))
def test_no_two_tensors_overlap(asked):
    stack = ActivationStack(4096)
    found = [stack.empty(shape, dtype).fill_(place) for place, (shape, dtype) in enumerate(asked)]
    for place, ((shape, dtype), one) in enumerate(zip(asked, found, strict=True)):
        assert one.shape == torch.Size(shape)
        assert one.dtype == dtype
        assert one.eq(place).all()
        assert one.data_ptr() % dtype.itemsize == 0
