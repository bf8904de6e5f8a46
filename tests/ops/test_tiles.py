"""Products on matrix tiles are float32's: as near to the exact one as the BLAS's, whatever the layout and the place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ops.test_attention import behind_prefixes, results, trees
from tests.ops.test_attention import drawn as drawn_rows

from veneer.ops import attention_tiles, native, tiles
from veneer.ops.attention import causal_attention
from veneer.ops.product import add_product, product, product_into, product_onto

pytestmark = pytest.mark.skipif(
    not tiles.has_tiles(), reason="the processor has no matrix tiles, or no C compiler is there"
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid(x, across, slack):
    """The same matrix with rows or columns together in memory, and something between them."""
    x = x.T if across else x
    wide = torch.full((x.shape[0], x.shape[1] + slack), torch.nan)
    wide[:, : x.shape[1]] = x
    x = wide[:, : x.shape[1]]
    return x.T if across else x


def mean_error(found, exact):
    return (found.double() - exact).abs().mean().item()


sizes = st.one_of(st.integers(1, 70), st.sampled_from((96, 129, 257)))


@given(sizes, sizes, sizes, st.sampled_from(((0, 0), (0, 1), (1, 0), (1, 1))), st.booleans(), st.integers(0, 3))
def test_equals_the_exact_product_as_nearly_as_the_blas(rows, depth, outputs, across, with_bias, slack):
    x, W, bias = drawn(rows, depth), drawn(outputs, depth, seed=1), drawn(outputs, seed=2) if with_bias else None
    exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
    left, right = (laid(one, *how) for one, how in zip((x, W), zip(across, (slack, slack), strict=True), strict=True))
    out = laid(torch.zeros(rows, outputs), 0, slack)
    beside = out.as_strided((rows, outputs + slack), (outputs + slack, 1))[:, outputs:]
    tiles.multiply(left, right, bias, out)
    assert mean_error(out, exact) <= 3 * mean_error(torch.nn.functional.linear(x, W, bias), exact) + 2e-7 * depth**0.5
    assert beside.isnan().all()
    before = out.double()
    tiles.multiply(left, right, None, out, onto=True)
    torch.testing.assert_close(out.double(), before + x.double() @ W.double().T, rtol=1e-5, atol=1e-6 * depth)


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "counts",
    [[64], [0, 130, 1, 0, 70], [33] * 9, [700, 0, 900, 800], [2100, 5, 2000, 3]],
    ids=["one", "some", "alike", "many", "too many"],
)
def test_each_of_some_matrices_has_its_own_product(counts, across, with_bias, onto):
    x, W = drawn(sum(counts), 70), drawn(len(counts), 100, 70, seed=1)
    W = W.mT.contiguous().mT if across else W
    bias = drawn(len(counts), 100, seed=2) if with_bias and not onto else None
    out = drawn(sum(counts), 100, seed=3)
    expected, start = out.clone(), 0
    for place, count in enumerate(counts):
        rows, start = slice(start, start + count), start + count
        if count:
            own = None if bias is None else bias[place]
            tiles.multiply(x[rows], W[place], own, expected[rows], onto=onto)
    assert torch.equal(tiles.multiply_each(x, W, bias, out, counts, onto=onto), expected)


@pytest.mark.parametrize(("rows", "depth", "outputs"), [(70, 3000, 90), (2100, 70, 2200), (2049, 1025, 64)])
def test_more_than_is_held_at_a_time(rows, depth, outputs):
    x, W = drawn(rows, depth), drawn(outputs, depth, seed=1)
    exact = x.double() @ W.double().T
    for left, right in ((x, W), (x.T.contiguous().T, W.T.contiguous().T)):
        out = tiles.multiply(left, right, None, torch.empty(rows, outputs))
        assert mean_error(out, exact) <= 1.3 * mean_error(x @ W.T, exact)


def test_all_digits_of_a_number_count():
    exponents = torch.arange(64, dtype=torch.float32).sub(32).exp2()[:, None] * (1 + drawn(64, 64).abs())
    eye = torch.eye(64)
    assert torch.equal(tiles.multiply(exponents, eye, None, torch.empty(64, 64)), exponents)
    assert torch.equal(tiles.multiply(eye, exponents.T.contiguous(), None, torch.empty(64, 64)), exponents)


def test_a_row_depends_on_its_own_inputs_alone_whatever_is_beside_it_and_how_many_threads():
    x, W, before = drawn(300, 130), drawn(97, 130, seed=1), torch.get_num_threads()
    whole = product(x, W)
    assert torch.equal(product(x[111:190], W), whole[111:190])
    assert torch.equal(product(x.flip(0), W).flip(0), whole)
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(product(x, W), whole)
    finally:
        torch.set_num_threads(before)


def test_no_number_is_quietly_made_one():
    x, W = drawn(64, 64), drawn(64, 64, seed=1)
    x[3, 5], x[7, 9] = torch.nan, torch.inf
    out = product(x, W)
    assert out[[3, 7]].isnan().all()
    assert out.isfinite().sum() == 62 * 64
    x[7, 9] = 1e-42  # denormal: as good as zero
    x[3, 5] = 0.0
    torch.testing.assert_close(product(x, W), x @ W.T, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    multiply = tiles.multiply
    monkeypatch.setattr(tiles, "multiply", lambda *given, **how: (seen.append(1), multiply(*given, **how))[1])
    return seen


def test_large_products_in_float32_are_computed_here(calls):
    x, W, bias = drawn(64, 64), drawn(64, 64, seed=1), drawn(64, seed=2)
    exact = x.double() @ W.double().T
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(product(x, W, bias).double(), exact + bias, **close)
    torch.testing.assert_close(
        product(x, W, keep=lambda shape, dtype: torch.empty(shape, dtype=dtype)).double(), exact, **close
    )
    torch.testing.assert_close(product_into(torch.empty(64, 64), x, W, bias).double(), exact + bias, **close)
    torch.testing.assert_close(product_onto(torch.ones(64, 64), x, W, bias).double(), exact + bias + 1, **close)
    torch.testing.assert_close(add_product(torch.ones(64, 64), x, W).double(), exact + 1, **close)
    assert len(calls) == 5


def test_all_others_are_not(calls, monkeypatch):
    x = drawn(64, 64)
    few, wide, trained = x[:63], x.double(), x.clone().requires_grad_()
    (
        product(few, x),
        product(x, few),
        product(x[:, :63], x[:, :63]),
        product(wide, wide),
        product(x.bfloat16(), x.bfloat16()),
    )
    apart = drawn(64, 128)[:, ::2]
    product(apart, x), product(x, apart), add_product(apart.clone().T.contiguous().T, x, x)
    assert product(trained, x).requires_grad
    add_product(drawn(64, 128)[:, ::2], x, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        product(x, x)
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        product(x, x)
    assert not calls
    assert not tiles.multiplies(x.to("meta"), x.to("meta"))
    three = x.expand(3, 64, 64)
    assert tiles.multiplies_each(drawn(192, 64), three, None, drawn(192, 64), [192, 0, 0])
    assert tiles.multiplies_each(drawn(192, 64), three, None, drawn(192, 64), [64, 64, 64])
    assert not tiles.multiplies_each(drawn(191, 64), three, None, drawn(191, 64), [64, 64, 63])
    assert not tiles.multiplies_each(drawn(64, 192).T, three, None, drawn(192, 64), [64, 64, 64])
    assert not tiles.multiplies_each(drawn(0, 64), three, None, drawn(0, 64), [0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(tree=trees(), heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]), size=st.sampled_from([3, 16, 40, 70]))
def test_tiles_equal_the_reference_behind_prefixes_and_without(dtype, tree, heads, size):
    lengths, prefixes = tree
    given = drawn_rows(sum(lengths), *heads, size, dtype)
    expected = results(behind_prefixes(lengths, prefixes), *(one.double() for one in given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "MOST_UNEVEN", torch.inf)
        asked = []
        on_tiles = tiles.on_tiles
        patch.setattr(tiles, "on_tiles", lambda name, *x: asked.append(name) or on_tiles(name, *x))
        got = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=0.3), *given)
    assert asked == ["attend", "attend_gradient"]
    unit = {torch.float32: 2**-20, torch.bfloat16: 2**-8}[dtype]
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 3 * unit * max(exact.norm(), 0.1 * given[3].double().norm())


def test_a_sequence_does_not_feel_another_nor_what_comes_later():
    lengths, prefixes, first = (70, 60, 50, 40), (None, 0, 0, None), slice(70, 130)
    for dtype in (torch.float32, torch.bfloat16):
        rows = drawn_rows(sum(lengths), 2, 2, 16, dtype)
        calm = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=1.0), *rows)
        for one in rows:
            one[first] = torch.nan
        felt = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=1.0), *rows)
        for ours, before in zip(felt, calm, strict=True):
            assert torch.equal(ours[130:], before[130:])
            assert ours[first].isnan().any()
        assert torch.equal(felt[0][:70], calm[0][:70])
        later = [one.clone() for one in rows[:3]]
        for one in later:
            one[200] = 7.0  # of the last sequence
        out = causal_attention(*later, lengths, prefixes, scaling=1.0)
        assert torch.equal(out[180:200], felt[0][180:200])
        assert not torch.equal(out[200:], felt[0][200:])
