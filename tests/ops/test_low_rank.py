"""Low-rank arithmetic: against the same on whole matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import low_rank
from veneer.ops.low_rank import (
    Factors,
    RowBlocks,
    balanced,
    best_of_rows,
    block_rows,
    evened,
    product_norm,
    rounding,
    svd,
    svd_of_product,
)

SIZES = st.integers(1, 12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(matrix, rows):
    return RowBlocks(tuple(matrix.shape), lambda start, stop: matrix[start:stop], rows)


@given(out=SIZES, rank=SIZES, inputs=SIZES, seed=st.integers(0, 50))
def test_the_svd_of_a_product_is_that_of_the_matrix(out, rank, inputs, seed):
    B, A = random(out, rank, seed=seed), random(rank, inputs, seed=seed + 100)
    U, S, V = svd_of_product(B, A)
    assert torch.allclose((U * S) @ V, B @ A, atol=1e-10)
    dense = torch.linalg.svdvals(B @ A)[: len(S)]
    assert torch.allclose(S, dense, rtol=1e-9, atol=1e-10)


@given(out=SIZES, rank=SIZES, inputs=SIZES, scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_norms_and_roundings_of_products(out, rank, inputs, scale):
    B, A = random(out, rank) * scale, random(rank, inputs, seed=1)
    assert product_norm(B, A) == pytest.approx(torch.linalg.vector_norm(B @ A).item(), rel=1e-6)
    even = evened(Factors(B, A))
    assert torch.allclose(even.B_OR @ even.A_RI, B @ A, rtol=1e-9, atol=0)
    assert torch.allclose(even.B_OR.norm(dim=0), even.A_RI.norm(dim=1))
    found = rounding(even.B_OR, even.A_RI, even.B_OR.float(), even.A_RI.float())
    dense = torch.linalg.vector_norm(B @ A - even.B_OR.float().double() @ even.A_RI.float().double()).item()
    assert found == pytest.approx(dense, rel=1e-5, abs=1e-15 * product_norm(B, A))


def test_factors_of_nothing_are_evened_to_zeros():
    even = evened(Factors(torch.zeros(3, 0), torch.zeros(0, 2)))
    assert (even.B_OR.shape, even.A_RI.shape) == ((3, 1), (1, 2))


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_small_matrix_gets_its_own_decomposition(rank, rows):
    matrix = random(20, 30)
    found, expected = best_of_rows(rows_of(matrix, rows), rank), balanced(*svd(matrix), min(rank, 20))
    assert torch.allclose(found.B_OR @ found.A_RI, expected.B_OR @ expected.A_RI, atol=1e-10)
    assert found.dropped == pytest.approx(expected.dropped, abs=1e-10)


@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_a_large_one_is_met_by_blocks_and_its_error_measured(monkeypatch, shape, held):
    monkeypatch.setattr(low_rank, "MAX_EXACT_VALUES", 100)
    monkeypatch.setattr(low_rank, "MAX_HELD_VALUES", held)
    # A spectrum that falls, noise that does not.
    matrix = (
        random(shape[0], 6) @ torch.diag(torch.logspace(2, 0, 6, dtype=torch.float64)) @ random(6, shape[1], seed=1)
    )
    matrix = matrix + 0.1 * random(*shape, seed=2)
    asked = []

    def block(start, stop):
        asked.append(stop - start)
        return matrix[start:stop]

    found, exact = best_of_rows(RowBlocks(shape, block, 16), 5), balanced(*svd(matrix), 5)
    assert found.rank == 5
    assert max(asked) <= 16
    assert sum(asked) == shape[0] * (3 if held else 11)
    measured = torch.linalg.vector_norm(matrix - found.B_OR @ found.A_RI).item()
    assert found.dropped == pytest.approx(measured, rel=1e-12)
    assert exact.dropped <= found.dropped * (1 + 1e-12) <= exact.dropped * 1.001


def test_the_global_random_state_is_left_alone_and_results_repeat(monkeypatch):
    monkeypatch.setattr(low_rank, "MAX_EXACT_VALUES", 10)
    matrix, state = random(30, 20), torch.get_rng_state()
    first, again = (best_of_rows(rows_of(matrix, 8), 2) for _ in range(2))
    assert first.B_OR.equal(again.B_OR)
    assert torch.get_rng_state().equal(state)


def test_blocks_follow_from_the_shape_alone():
    assert (block_rows(1), block_rows(1 << 30)) == (1 << 21, 1)
