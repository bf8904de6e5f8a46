"""Each kernel in C is what torch computes, and torch computes where there is none."""

import ctypes
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import native
from veneer.ops.gates import ACTIVATIONS, gated, gated_gradient
from veneer.ops.lora import merged_weight
from veneer.ops.norm import RMSNorm, norm_gradient, normalise, renormalise
from veneer.ops.rotary import _rotated
from veneer.tools.merge_weights import round_once

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="the kernels were not compiled: no C compiler")
TYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def drawn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def both(monkeypatch, compute):
    """What the kernels compute, and what torch does in their place."""
    with monkeypatch.context() as patch:
        seen = []
        run = native.run
        patch.setattr(native, "run", lambda *given: (seen.append(given[0]), run(*given))[1])
        fast = compute()
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        slow = compute()
    assert seen, "no kernel was called"
    return fast, slow


def close(fast, slow, dtype):
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
        assert error <= ROUNDING[dtype], error


def test_kernels_are_there_where_a_compiler_is():
    if sys.platform == "linux" and shutil.which("gcc"):
        assert native.kernels() is not None, (
            "reinstall (pip install -e .): the kernels were not compiled, or have changed"
        )
        assert native.source() is not None


@needs_kernels
def test_kernels_of_another_source_are_not_used(monkeypatch, tmp_path):
    for path in (*native.SOURCES, *native.SOURCES[0].parent.glob("kernels*.so")):
        shutil.copy(path, tmp_path)
    sources = native.SOURCES
    copies = tuple(tmp_path / path.name for path in sources)
    monkeypatch.setattr(native, "SOURCES", copies)
    assert native.kernels.__wrapped__() is not None
    for changed, path in zip(copies, sources, strict=True):
        changed.write_bytes(path.read_bytes() + b"\n")
        assert native.kernels.__wrapped__() is None
        changed.write_bytes(b"")
        assert native.kernels.__wrapped__() is None
        shutil.copy(path, changed)


def test_a_library_that_is_none_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "SOURCES", tuple(Path(shutil.copy(path, tmp_path)) for path in native.SOURCES))
    assert native.kernels.__wrapped__() is None
    (tmp_path / f"kernels{native.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert native.kernels.__wrapped__() is None


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3), (5, 16), (3, 2, 17), (40, 576), (0, 8), (2, 1000)])
def test_norms(monkeypatch, dtype, offset, shape):
    x, dy, norm = drawn(*shape, dtype=dtype), drawn(*shape, seed=1, dtype=dtype), None
    norm = RMSNorm(drawn(shape[-1], seed=2, dtype=dtype), 1e-5, offset)

    def compute():
        y, inverse = normalise(x, norm)
        return y, inverse, renormalise(x, inverse, norm), norm_gradient(dy, x, inverse, norm)

    if math.prod(shape):
        close(*both(monkeypatch, compute), dtype)
    else:
        assert [one.numel() for one in compute()] == [0] * 4


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("heads", "size", "turned"), [(1, 2, 2), (3, 64, 64), (9, 64, 32), (2, 40, 36), (4, 7, 6)])
def test_rotations(monkeypatch, dtype, back, heads, size, turned):
    every = drawn(11, 2 * heads, size, dtype=dtype)
    cos, sin = drawn(11, turned, seed=1, dtype=dtype), drawn(11, turned, seed=2, dtype=dtype)
    for x in (every[:, :heads].contiguous(), every[:, heads:]):  # by themselves, and a part of something
        fast, slow = both(monkeypatch, lambda x=x: _rotated(x, cos, sin, back=back))
        close([fast], [slow], dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [name for name, one in ACTIVATIONS.items() if one.kernel])
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (3, 2, 33), (50, 1536)])
def test_gates(monkeypatch, dtype, name, shape):
    gate, up, d = (drawn(*shape, seed=seed, dtype=dtype, scale=3) for seed in range(3))

    def compute():
        into = torch.empty_like(d), torch.empty_like(d)
        gated_gradient(d, gate, up, ACTIVATIONS[name], into)
        in_place = d.clone(), torch.empty_like(d)
        gated_gradient(in_place[0], gate, up, ACTIVATIONS[name], in_place)
        return gated(gate, up, ACTIVATIONS[name]), *into, *in_place

    fast, slow = both(monkeypatch, compute)
    close(fast, slow, dtype)
    assert torch.equal(fast[1], fast[3])


@needs_kernels
@pytest.mark.parametrize("name", [name for name, one in ACTIVATIONS.items() if one.kernel])
def test_gates_of_halves_side_by_side(monkeypatch, name):
    halves = drawn(9, 50).chunk(2, dim=-1)
    into = torch.zeros(9, 50)
    d = drawn(9, 25, seed=1)

    def compute():
        gated_gradient(d, *halves, ACTIVATIONS[name], into.zero_().chunk(2, dim=-1))
        return gated(*halves, ACTIVATIONS[name]), into.clone()

    close(*both(monkeypatch, compute), torch.float32)


@needs_kernels
@pytest.mark.parametrize("name", [name for name, one in ACTIVATIONS.items() if one.kernel])
def test_gates_are_exact_to_float32s_last_digits_from_end_to_end(name):
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    function = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    exact = gate.double().requires_grad_()
    function(exact).sum().backward()
    one = torch.ones_like(gate)
    into = torch.empty_like(gate), torch.empty_like(gate)
    gated_gradient(one, gate, one, ACTIVATIONS[name], into)
    got = gated(gate, one, ACTIVATIONS[name])
    ends = gate.abs() < 1e38  # beyond, the cube of a number is none in float32, for torch neither
    torch.testing.assert_close(got[ends].double(), function(gate.double())[ends], rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(into[0][ends].double(), exact.grad[ends], rtol=1e-6, atol=1e-6)
    assert torch.equal(into[1], got)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_a_number_stays_none(dtype):
    x = drawn(3, 20, dtype=dtype)
    x[1, 7] = torch.nan
    one = torch.ones_like(x)
    norm = RMSNorm(torch.ones(20), 1e-5)
    y, inverse = normalise(x, norm)
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert norm_gradient(one, x, inverse, norm).isnan().any(1).tolist() == [False, True, False]
    for name in ("silu", "gelu_tanh"):
        assert gated(x, one, ACTIVATIONS[name]).isnan().sum() == 1
        assert gated(one, x, ACTIVATIONS[name]).isnan().sum() == 1
    assert _rotated(x.view(3, 1, 20), one, one, back=False).isnan().sum() == 2


@needs_kernels
@pytest.mark.parametrize("inf", [torch.inf, -torch.inf])
def test_numbers_without_end_are_rounded_to_16_bits_as_they_are(inf):
    one = torch.ones(1, 16, dtype=torch.bfloat16)
    up = one.clone()
    up[0, 3] = inf
    assert gated(one, up, ACTIVATIONS["silu"])[0, 3] == inf


@needs_kernels
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), rank=st.integers(1, 20), scaled=st.booleans())
def test_weights_with_their_update(rows, columns, rank, scaled):
    W, A, B = drawn(rows, columns), drawn(rank, columns, seed=1), drawn(rows, rank, seed=2)
    ratio = drawn(rows, seed=3).abs() if scaled else None
    expected = (W.double() * (1 if ratio is None else ratio[:, None])) + 0.3 * (B.double() @ A.double())
    kept = W.clone()
    assert native.suits(W, A, B)
    torch.testing.assert_close(merged_weight(W, A, B, 0.3, ratio).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(W, kept)
    # Factors that are views, and a weight that is stored the other way round.
    torch.testing.assert_close(
        merged_weight(W, A.T.contiguous().T, B, 0.3, ratio).double(), expected, rtol=1e-5, atol=1e-5
    )
    turned = merged_weight(W.T.contiguous().T, A, B, 0.3, ratio)
    torch.testing.assert_close(turned.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@given(
    stored=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    rank=st.integers(1, 9),
)
def test_float64s_sum_rounded_once(stored, dtype, rows, columns, rank):
    W, A, B = drawn(rows, columns, dtype=stored), drawn(rank, columns, seed=1), drawn(rows, rank, seed=2)
    A, B, out = A.double(), B.double(), torch.empty(rows, columns, dtype=dtype)
    assert native.add_low_rank(W, A, B, 0.3, out)
    assert torch.equal(out, round_once(W.double() + 0.3 * (B @ A), dtype))


def test_what_kernels_do_not_take_is_left_to_torch():
    one = torch.ones(2, 2)
    assert not native.suits(one.double())
    assert not native.suits(one, one.bfloat16())
    assert not native.suits(torch.ones(2, 4)[:, ::2])
    assert not native.suits(one.to("meta"))
    wide = one.double()
    assert not native.add_low_rank(one.bfloat16(), one, wide, 1.0, one.bfloat16())
    assert not native.add_low_rank(wide, wide, wide, 1.0, one.bfloat16())
    assert not native.add_low_rank(one.bfloat16(), wide, wide, 1.0, one)
    assert not native.add_low_rank(one.bfloat16(), wide * torch.inf, wide, 1.0, one.bfloat16())


def test_compilers_see_torch(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not native.suits(torch.ones(2))


@needs_kernels
def test_rows_are_divided_among_the_threads_that_torch_has():
    library, before = native.kernels(), torch.get_num_threads()
    assert isinstance(library, ctypes.CDLL)
    x, norm = drawn(7, 33), RMSNorm(drawn(33, seed=1), 1e-5)
    found = []
    try:
        for threads in (1, 2, 5, 9):
            torch.set_num_threads(threads)
            found.append(normalise(x, norm)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
