"""Rules on entries: against their definitions on whole matrices, against PEFT's, streamed or not."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from tests.tools.algebra import FORM_SHAPES, adapter_of, pair_of, relative

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.ops import low_rank
from veneer.ops.low_rank import RowBlocks
from veneer.tools.combine import combine
from veneer.tools.combiners import RULES, drawn, elected, joined, kth_magnitude, trimmed
from veneer.tools.combiners_spaces import SPACES

PEFT = {"ties": merge_utils.ties, "magnitude_prune": merge_utils.magnitude_prune}


def rows_of(matrix, rows):
    matrix = matrix.double()
    return RowBlocks(tuple(matrix.shape), lambda start, stop: matrix[start:stop].clone(), rows)


def whole(blocks):
    return torch.cat([block for _, block in blocks.blocks()])


def naive_trim(delta, density):
    count = max(1, int(density * delta.numel()))
    least = delta.abs().float().flatten().sort(descending=True).values[count - 1]
    return torch.where(delta.abs().float() >= least, delta, 0.0)


def naive_elect(deltas, weights):
    stack = torch.stack(deltas)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = stack.sign() == sign
    weighted = stack * torch.tensor(weights, dtype=torch.float64).reshape(-1, 1, 1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


@given(
    values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=4, max_size=40),
    share=st.floats(0, 1),
    rows=st.integers(1, 3),
)
def test_the_threshold_is_what_sorting_gives(values, share, rows):
    matrix = torch.tensor(values[: len(values) // 4 * 4]).reshape(4, -1)
    count = 1 + int(share * (matrix.numel() - 1))
    expected = matrix.abs().flatten().sort(descending=True).values[count - 1].item()
    assert kth_magnitude(rows_of(matrix, rows), count) == expected


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_what_peft_does_on_full_updates(method, density):
    deltas = [pair_of("linear", 3, seed).delta() for seed in range(3)]
    weights = [0.7, 1.0, -0.4]
    rule = RULES[method]
    found = whole(joined(rule, [rows_of(one, 3) for one in deltas], weights, density, ["", "", ""]))
    with pytest.warns(UserWarning, match="density") if density == 1 else nullcontext():
        expected = PEFT[method](deltas, torch.tensor(weights, dtype=torch.float64), density)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4), density=st.floats(0.01, 1), rows=st.integers(1, 8))
def test_ties_is_its_definition_whatever_the_blocks(seeds, density, rows):
    deltas = [pair_of("linear", 2, seed).delta() for seed in seeds]
    weights = [1.0 - 0.3 * place for place in range(len(deltas))]
    expected = naive_elect([naive_trim(one, density) for one in deltas], weights)
    keys = [""] * len(deltas)
    found = whole(joined(RULES["ties"], [rows_of(one, rows) for one in deltas], weights, density, keys))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_what_is_drawn_depends_on_the_key_alone_and_keeps_the_mean():
    ones = RowBlocks((400, 50), lambda start, stop: torch.ones(stop - start, 50).double(), 100)
    first, again, other = (whole(drawn(ones, 0.2, key)) for key in ("a", "a", "b"))
    assert first.equal(again)
    assert not first.equal(other)
    assert sorted(first.unique().tolist()) == [0.0, 5.0]
    assert first.mean().item() == pytest.approx(1.0, abs=0.1)
    assert not first[:100].equal(first[100:200])  # each block has its own
    assert whole(drawn(ones, 1.0, "a")).equal(whole(ones))


def test_a_density_of_one_changes_nothing_and_ties_at_the_threshold_stay():
    flat = rows_of(torch.ones(2, 3), 1)
    assert whole(trimmed(flat, 1.0, "")).equal(torch.ones(2, 3).double())
    assert whole(trimmed(flat, 0.2, "")).equal(torch.ones(2, 3).double())
    assert elected([torch.tensor([2.0]), torch.tensor([-2.0])], [1.0, 1.0]).item() == 2.0  # a sum of zero is positive


def merged_dense(adapters, weights, method, density, seed=0):
    """A method on entries by its definition, matrix by matrix of a plain module."""
    deltas = [one.modules["at"].delta() for one in adapters]
    if method == "magnitude_prune":
        return sum(w * naive_trim(one, density) for one, w in zip(deltas, weights, strict=True))
    if method == "ties":
        return naive_elect([naive_trim(one, density) for one in deltas], weights)
    keys = [f"{seed}\0at\0{0}\0{place}" for place in range(len(deltas))]
    masked = [whole(drawn(rows_of(one, 1 << 20), density, key)) for one, key in zip(deltas, keys, strict=True)]
    if method == "dare_linear":
        return sum(w * one for one, w in zip(masked, weights, strict=True))
    return naive_elect(masked, weights)


@pytest.mark.parametrize("method", sorted(RULES))
@pytest.mark.parametrize("rank", [2, 6])
def test_in_full_space_it_is_the_best_approximation_of_the_definition(method, rank):
    adapters = [adapter_of(at=pair_of("linear", 3, seed, 0.5)) for seed in (1, 2)]
    weights = [1.0, 0.6]
    found = combine(adapters, weights, method=method, rank=rank, density=0.4, seed=3)
    expected = merged_dense(adapters, weights, method, 0.4, seed=3)
    one = found.modules["at"]
    assert one.norm == pytest.approx(torch.linalg.vector_norm(expected).item(), rel=1e-9)
    values = torch.linalg.svdvals(expected)
    least = (torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values)).item()
    assert one.error == pytest.approx(least, rel=1e-5, abs=2e-7)
    assert one.error == pytest.approx(relative(found.adapter.modules["at"].delta(), expected), rel=1e-5, abs=2e-7)


@pytest.mark.parametrize("method", sorted(RULES))
@pytest.mark.parametrize("space", sorted(SPACES))
def test_every_rule_in_every_space_on_every_form(method, space):
    for form in FORM_SHAPES:
        adapters = [adapter_of(at=pair_of(form, 2, seed)) for seed in (1, 2)]
        found = combine(adapters, method=method, space=space, density=0.7, rank=6)
        pair = found.adapter.modules["at"]
        assert pair.form == form
        assert pair.delta().shape == adapters[0].modules["at"].delta().shape
        assert 0 <= found.total.error <= 1
        again = combine(adapters, method=method, space=space, density=0.7, rank=6)
        assert again.adapter.digest == found.adapter.digest


@pytest.mark.parametrize("space", ["core", "knots"])
def test_small_spaces_with_nothing_pruned_are_the_sum_and_lose_nothing(space):
    adapters = [adapter_of(at=pair_of("linear", rank, rank, 0.5)) for rank in (1, 2)]
    found = combine(adapters, [0.7, -0.4], method="magnitude_prune", density=1.0, space=space)
    expected = combine(adapters, [0.7, -0.4]).adapter.modules["at"].delta()
    assert relative(found.adapter.modules["at"].delta(), expected) < 1e-6
    assert found.adapter.modules["at"].rank == 3
    assert found.total.error < 1e-6


def moved(adapter, factor):
    pair = adapter.modules["at"]
    return adapter_of(at=LowRank(pair.lora_A * factor, pair.lora_B / factor, pair.scaling))


def test_core_space_knows_the_updates_and_not_their_factors_or_order():
    a, b = (adapter_of(at=pair_of("linear", 3, seed)) for seed in (1, 2))
    one = combine([a, b], method="ties", space="core", density=0.3).adapter.modules["at"].delta()
    other = combine([moved(b, 8.0), moved(a, 0.25)], method="ties", space="core", density=0.3)
    assert relative(other.adapter.modules["at"].delta(), one) < 1e-5


def naive_knots(deltas, density):
    U, S, V = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    count = int((1e-9 * S[0] < S).sum())
    parts = (V[:count]).split([one.shape[1] for one in deltas], 1)
    merged = naive_elect([naive_trim(one, density) for one in parts], [1.0] * len(parts))
    return U[:, :count] @ (S[:count, None] * merged)


def test_knots_is_its_definition():
    adapters = [adapter_of(at=pair_of("linear", 2, seed)) for seed in (1, 2)]
    found = combine(adapters, method="ties", space="knots", density=0.5)
    expected = naive_knots([one.modules["at"].delta() for one in adapters], 0.5)
    assert relative(found.adapter.modules["at"].delta(), expected) < 1e-6


@pytest.mark.parametrize("space", sorted(SPACES))
def test_updates_of_nothing(space):
    pair = pair_of("linear", 2, 0)
    zero = adapter_of(at=LowRank(pair.lora_A, pair.lora_B * 0, 1.0))
    found = combine([zero, zero], method="ties", space=space)
    assert (found.total.norm, found.total.error) == (0.0, 0.0)
    assert not found.adapter.modules["at"].delta().any()


def test_large_updates_are_streamed_and_nearly_the_best(monkeypatch):
    monkeypatch.setattr(low_rank, "MAX_EXACT_VALUES", 1000)
    monkeypatch.setattr(low_rank, "_BLOCK_VALUES", 1000)
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2, 60, generator=generator), torch.randn(80, 2, generator=generator)) for _ in range(2)]
    adapters = [adapter_of(at=LowRank(A, B, 1.0)) for A, B in factors]
    found = combine(adapters, method="magnitude_prune", density=0.5, rank=4)
    expected = merged_dense(adapters, [0.5, 0.5], "magnitude_prune", 0.5)
    one = found.modules["at"]
    assert one.error == pytest.approx(relative(found.adapter.modules["at"].delta(), expected), rel=1e-6)
    values = torch.linalg.svdvals(expected)
    least = (torch.linalg.vector_norm(values[4:]) / torch.linalg.vector_norm(values)).item()
    assert least <= one.error * (1 + 1e-9)
    assert one.error < 1.01 * least


@pytest.mark.parametrize("space", sorted(SPACES))
def test_what_is_not_finite_is_an_error_and_not_a_crash(monkeypatch, space):
    for exact in (1 << 20, 1):
        monkeypatch.setattr(low_rank, "MAX_EXACT_VALUES", exact)
        for value in (float("inf"), float("nan")):
            bad = adapter_of(at=LowRank(torch.full((1, 2), value), torch.ones(3, 1), 1.0))
            with pytest.raises(AdapterError, match="at: its"):
                combine([bad, bad], method="ties", space=space)
