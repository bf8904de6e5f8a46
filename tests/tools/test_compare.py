"""Comparing what two adapters do, on the factors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.factors import compute_delta
from veneer.tools.compare import compare_deltas, delta_error

SHAPES = {
    "linear": ((2, 5), (4, 2)),
    "transposed": ((2, 5), (4, 2)),
    "embedding": ((2, 5), (4, 2)),
    "conv": ((4, 3, 3), (6, 2, 1)),
    "experts": ((3, 2, 5), (3, 4, 2)),
}


def pair(form, seed, scaling=1.0):
    made = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=made) for shape in SHAPES[form])
    return LowRank(A, B, scaling, form)


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 99), st.floats(0.1, 9))
def test_equals_the_dense_comparison(form, seed, scaling):
    before, after = pair(form, seed, scaling), pair(form, seed + 1)
    naive = torch.linalg.vector_norm(after.delta() - before.delta()) / torch.linalg.vector_norm(before.delta())
    assert math.isclose(delta_error(before, after), float(naive), rel_tol=1e-9)


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 99))
def test_a_small_difference_is_seen_and_rounding_is_not(form, seed):
    before = pair(form, seed, 3.0)
    moved = LowRank(before.lora_A * 3, before.lora_B, 1.0, form)
    assert delta_error(before, moved) < 2e-7
    wrong = LowRank(before.lora_A * 3 * (1 + 1e-5), before.lora_B, 1.0, form)
    assert 5e-6 < delta_error(before, wrong) < 2e-5


def test_what_is_lost_or_new_or_other_is_a_problem():
    config = LoRAConfig(rank=2)
    one, dora = pair("linear", 0), LowRank(torch.ones(2, 5), torch.ones(4, 2), 1.0, magnitude=torch.ones(4))
    before = Adapter({"a": one, "b": dora, "c": one}, config, {"w": torch.ones(2)}, tokens={"t": _rows(1)})
    plain = LowRank(dora.lora_A, dora.lora_B, 1.0)
    after = Adapter({"b": plain, "c": pair("conv", 0), "d": one}, config, {"w": torch.ones(3)}, tokens={"t": _rows(2)})
    found = compare_deltas(before, after)
    told = "\n".join(found.problems)
    for word in ("a: factors are lost", "d: factors are new", "b: its magnitude (DoRA) is lost", "c: form 'conv'"):
        assert word in told
    assert "w: shape (3,), was (2,)" in told
    assert "t: rows of other tokens" in told
    assert found.worst == math.inf


def test_values_that_trained_whole_count():
    config = LoRAConfig(rank=2)
    before = Adapter({"a": pair("linear", 0)}, config, {"w": torch.ones(4)})
    after = Adapter({"a": pair("linear", 0)}, config, {"w": torch.tensor([1.0, 1.0, 1.0, 1.2])})
    assert compare_deltas(before, after).worst == pytest.approx(0.1)


def test_zero_deltas_are_equal_and_no_others():
    zero = LowRank(torch.zeros(2, 5), torch.zeros(4, 2), 1.0)
    assert delta_error(zero, LowRank(torch.ones(2, 5), torch.zeros(4, 2), 2.0)) == 0.0
    assert delta_error(zero, pair("linear", 0)) == math.inf
    assert compute_delta("linear", zero.lora_A, zero.lora_B, 1.0).abs().sum() == 0


def _rows(token):
    return TokenRows((token,), torch.ones(1, 2))
