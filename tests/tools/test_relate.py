"""How two adapters relate, against dense arithmetic and against random draws."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.tools.relate import chance_largest, chance_overlap, delta_inner, relate


def pair(outs: int, ins: int, rank: int, scaling: float = 1.0, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, ins, generator=generator), torch.randn(outs, rank, generator=generator), scaling)


def adapter(**modules: LowRank) -> Adapter:
    return Adapter(modules, LoRAConfig(rank=1))


sizes = st.integers(1, 8)


@given(sizes, sizes, st.integers(1, 4), st.integers(1, 4), st.floats(-3, 3), st.integers(0, 99))
def test_cosines_and_overlaps_are_those_of_the_dense_deltas(outs, ins, rank, other_rank, scaling, seed):
    one, two = pair(outs, ins, rank, 2.0, seed), pair(outs, ins, other_rank, scaling, seed + 100)
    D, E = one.delta(), two.delta()
    assert delta_inner(one, two) == pytest.approx(torch.sum(D * E).item(), rel=1e-9, abs=1e-9)
    found = relate(adapter(q=one), adapter(q=two)).modules[0]
    assert found.norms == pytest.approx((D.norm().item(), E.norm().item()), rel=1e-9)
    if not scaling:
        assert (found.cosine, found.columns, found.rows) == (None, None, None)
        return
    if abs(scaling) < 1e-6:
        return
    assert found.cosine == pytest.approx(torch.sum(D * E).item() / (D.norm() * E.norm()).item(), abs=1e-9)
    for side, (P, Q) in ((found.columns, (D, E)), (found.rows, (D.T, E.T))):
        bases = []
        for matrix in (P, Q):
            U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
            bases.append(U[:, 1e-12 * S[0] < S])
        product = bases[0].T @ bases[1]
        assert side.overlap == pytest.approx(float((product**2).sum()) / min(product.shape), abs=1e-6)
        assert side.strongest == pytest.approx(float(product[0, 0] ** 2), abs=1e-6)
        assert 0 <= side.overlap <= 1 + 1e-9
        assert len(side.cosines) == min(product.shape)


def test_an_adapter_and_itself_are_one():
    one = adapter(q=pair(6, 5, 2), v=pair(4, 5, 3, seed=1))
    found = relate(one, one)
    assert found.equal
    assert found.cosine == pytest.approx(1)
    assert all(module.columns.overlap == pytest.approx(1) for module in found.modules)
    negative = LowRank(one.modules["q"].lora_A, -one.modules["q"].lora_B, 1.0)
    assert relate(adapter(q=one.modules["q"]), adapter(q=negative)).cosine == pytest.approx(-1)


def test_what_only_one_has_and_what_cannot_be_compared_is_named():
    one = Adapter({"q": pair(4, 4, 1), "v": pair(4, 4, 1)}, LoRAConfig(rank=1), {"head.bias": torch.ones(2)})
    two = Adapter({"q": pair(4, 5, 1), "k": pair(4, 4, 1)}, LoRAConfig(rank=1), {"head.bias": torch.ones(2) * 2})
    found = relate(one, two)
    assert (found.only_first, found.only_second) == (("v",), ("k",))
    assert found.unlike == (("q", "(matrices, out, in) are (1, 4, 4) and (1, 4, 5)"),)
    assert found.trained == (("head.bias", pytest.approx(1.0)),)
    assert found.modules == ()
    assert found.cosine == 0
    json.dumps(found.to_json())


def test_a_missing_module_counts_as_zero_in_the_whole():
    shared, more = pair(5, 5, 2), pair(5, 5, 2, seed=3)
    found = relate(adapter(q=shared), adapter(q=shared, v=more))
    q, v = shared.delta().norm().item(), more.delta().norm().item()
    assert found.cosine == pytest.approx(q / math.hypot(q, v))


def test_stacks_are_compared_matrix_by_matrix():
    A, B = torch.randn(3, 2, 7), torch.randn(3, 6, 2)
    one = LowRank(A, B, 1.0, "experts")
    turned = LowRank(A.flip(0), B.flip(0), 1.0, "experts")
    found = relate(adapter(e=one), adapter(e=turned)).modules[0]
    dense = torch.sum(one.delta() * turned.delta()) / one.delta().norm() ** 2
    assert found.cosine == pytest.approx(dense.item())
    assert len(found.columns.cosines) == 6


def test_the_baselines_are_what_random_spans_give():
    generator = torch.Generator().manual_seed(0)
    n, R, S, draws = 60, 6, 3, 300
    overlaps, cosines = [], []
    for _ in range(draws):
        U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator).double())[0] for k in (R, S))
        overlaps.append(float(((U.T @ V) ** 2).sum()) / S)
        one, two = (pair(20, 30, 2, 1.0, int(torch.randint(10**6, (1,), generator=generator))) for _ in range(2))
        cosines.append(delta_inner(one, two) / (one.delta().norm() * two.delta().norm()).item())
    scatter = math.sqrt(math.fsum(value**2 for value in cosines) / draws)
    assert math.fsum(overlaps) / draws == pytest.approx(chance_overlap([R], [S], n), rel=0.05)
    assert scatter == pytest.approx(relate(adapter(q=pair(20, 30, 2)), adapter(q=pair(20, 30, 2))).chance, rel=0.2)


def test_the_largest_cosine_nears_its_limit():
    generator, shares = torch.Generator().manual_seed(0), []
    for R, S, n in ((6, 3, 60), (24, 12, 240), (96, 48, 960)):
        U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator).double())[0] for k in (R, S))
        shares.append(float(torch.linalg.matrix_norm(U.T @ V, 2)) / chance_largest(R, S, n))
    assert 0.93 < shares[-1] < 1.03
    assert shares[0] < shares[-1]
