"""Fused projections equal the same made of references, gradients included, dense or decoded panel by panel."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops import reference
from veneer.ops.dropout import Dropout
from veneer.ops.frozen import FrozenWeight
from veneer.ops.gates import ACTIVATIONS
from veneer.ops.norm import RMSNorm
from veneer.ops.projections import Projection, gated_projection, project

SCALING = 0.7
TRAINED = ("A", "B", "ratio")
SIZES = st.integers(1, 7)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def frozen(W: Tensor, panel: int | None) -> FrozenWeight:
    """A weight as a tensor, or as copies of runs of its rows."""
    if panel is None:
        return FrozenWeight(W.shape, W)

    def panels(dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        scratch = torch.empty(panel, W.shape[1], dtype=dtype)
        for start in range(0, W.shape[0], panel):
            rows = W[start : start + panel]
            yield slice(start, start + len(rows)), scratch[: len(rows)].copy_(rows)

    return FrozenWeight(W.shape, panels=panels)


def layers(inputs: int, sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[dict[str, Tensor | None]]:
    """Weights, biases and factors of layers of some (outputs, rank); rank 0 is a layer without an update."""
    return [
        {
            "W": draw(outputs, inputs, seed=place, dtype=dtype),
            "bias": draw(outputs, seed=place, dtype=dtype) if place % 2 else None,
            "A": draw(rank, inputs, seed=place, dtype=dtype) if rank else None,
            "B": draw(outputs, rank, seed=place, dtype=dtype) if rank else None,
        }
        for place, (outputs, rank) in enumerate(sizes)
    ]


def ratio_of(one: dict[str, Tensor | None]) -> Tensor:
    """What DoRA might scale a layer's outputs by."""
    return 1 + draw(len(one["W"]), seed=5).abs()


def leaf(one: Tensor | None) -> Tensor | None:
    return None if one is None else one.clone().requires_grad_()


def plainly(x: Tensor, one: dict[str, Tensor | None]) -> Tensor:
    out = x @ one["W"].T
    if one["A"] is not None:
        dropout = one.get("dropout")
        left = x if dropout is None else x * dropout.kept(x) * dropout.factor
        out = out + reference.lora_delta(left, one["A"], one["B"], SCALING)
    if one.get("ratio") is not None:
        out = out * one["ratio"]
    return out if one["bias"] is None else out + one["bias"]


def fused(one: dict[str, Tensor | None], panel: int | None) -> Projection:
    factors = None if one["A"] is None else (one["A"], one["B"])
    return Projection(frozen(one["W"], panel), one["bias"], factors, SCALING, one.get("dropout"), one.get("ratio"))


def run(function, x: Tensor, made: list[dict[str, Tensor | None]]) -> list[Tensor]:
    """Outputs and gradients of a function of an input and layers."""
    x = leaf(x)
    made = [{**one, **{name: leaf(one.get(name)) for name in TRAINED}} for one in made]
    outs = function(x, made)
    torch.autograd.backward(outs, [draw(*out.shape, seed=9, dtype=out.dtype) for out in outs])
    factors = [one[name] for one in made for name in TRAINED if one[name] is not None]
    return [*(out.detach() for out in outs), x.grad, *(one.grad for one in factors)]


@pytest.mark.parametrize("rows", [2, 40], ids=["factored", "merged"])
@pytest.mark.parametrize("panel", [None, 4, 64], ids=["dense", "panels", "one panel"])
@pytest.mark.parametrize("norm", [None, 0.0, 1.0], ids=["no norm", "norm", "norm with offset"])
@pytest.mark.parametrize("sizes", [[(6, 2), (9, 3), (5, 1)], [(6, 2), (9, 0)], [(7, 0)]])
@pytest.mark.parametrize("dropped", [(), (0,), (0, 1, 2)], ids=["all", "one drops", "each drops"])
@pytest.mark.parametrize("scaled", [(), (1,), (0, 1, 2)], ids=["plain", "one ratio", "ratios"])
def test_project_equals_its_parts(rows, panel, norm, sizes, dropped, scaled):
    gain = draw(8)
    made = layers(8, sizes, torch.float64)
    made = [
        {
            **one,
            "dropout": Dropout(20_000, seed=n) if n in dropped else None,
            "ratio": ratio_of(one) if n in scaled and one["A"] is not None else None,
        }
        for n, one in enumerate(made)
    ]
    what = None if norm is None else RMSNorm(gain, 1e-5, norm)

    def parts(x, made):
        y = x if norm is None else reference.rms_norm(x, gain, 1e-5, norm)
        return [plainly(y, one) for one in made]

    expected = run(parts, draw(rows, 8), made)
    got = run(lambda x, made: project(x, [fused(one, panel) for one in made], what), draw(rows, 8), made)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rows", [2, 60], ids=["factored", "merged"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("panel", [None, 3], ids=["dense", "panels"])
@pytest.mark.parametrize("dropout", [None, Dropout(20_000, seed=1)], ids=["all", "drops"])
@pytest.mark.parametrize("way", ["plain", "bias", "ratio", "ratio and bias"])
def test_gated_projection_equals_its_parts(rows, name, rank, panel, dropout, way):
    activation = ACTIVATIONS[name]
    (one,) = layers(6, [(5, rank)], torch.float64)
    one = {**one, "dropout": dropout, "bias": draw(5) if "bias" in way else None}
    made = [{**one, "ratio": ratio_of(one) if "ratio" in way and rank else None}]
    gate, up = draw(rows, 6, seed=1), draw(rows, 6, seed=2)
    found = []
    for function in (
        lambda gate, up, one: plainly(activation.forward(gate) * up, one),
        lambda gate, up, one: gated_projection(gate, up, activation, fused(one, panel)),
    ):
        leaves = [leaf(gate), leaf(up)]
        one = {**made[0], **{name: leaf(made[0][name]) for name in TRAINED}}
        out = function(*leaves, one)
        out.backward(draw(rows, 5))
        leaves += [one[name] for name in TRAINED if one[name] is not None]
        found.append([out.detach(), *(one.grad for one in leaves)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes_are_near(dtype):
    made = layers(64, [(48, 4), (32, 4)], dtype)
    norm = RMSNorm(draw(64, dtype=dtype), 1e-5)

    def parts(x, made):
        return [plainly(reference.rms_norm(x.double(), norm.weight_D.double(), 1e-5), one) for one in made]

    exact = [{name: None if one is None else one.double() for name, one in layer.items()} for layer in made]
    expected = run(parts, draw(100, 64, dtype=dtype).double(), exact)
    got = run(lambda x, made: project(x, [fused(one, None) for one in made], norm), draw(100, 64, dtype=dtype), made)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_inputs_that_need_no_gradient_get_none():
    made = layers(8, [(6, 2)], torch.float64)[0]
    made["A"], made["B"] = leaf(made["A"]), leaf(made["B"])
    x = draw(3, 8)
    project(x, [fused(made, None)])[0].sum().backward()
    assert x.grad is None
    assert made["A"].grad is not None


@pytest.mark.parametrize("dropout", [None, Dropout(20_000, seed=1)], ids=["all", "drops"])
def test_little_is_kept(dropout):
    """Of three layers' tensors with 64 rows, only the input before the norm and 1 / rms, whatever is dropped."""
    made = [{**one, "dropout": dropout} for one in layers(8, [(6, 2), (9, 3)], torch.float64)]
    saved: list[Tensor] = []
    x = draw(64, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gate, up = project(x, [fused(one, None) for one in made[:1] * 2], RMSNorm(draw(8), 1e-5))
        assert [tuple(one.shape) for one in saved if one.shape[0] == 64] == [(64, 8), (64, 1)]
        saved.clear()
        down = {**layers(6, [(5, 2)], torch.float64)[0], "dropout": dropout}
        gated_projection(gate, up, ACTIVATIONS["silu"], fused(down, None))
    assert [one.data_ptr() for one in saved if one.shape[0] == 64] == [gate.data_ptr(), up.data_ptr()]


@given(st.integers(1, 40), SIZES, SIZES, SIZES, st.integers(0, 7), st.booleans(), st.booleans(), st.integers(0, 50))
def test_a_frozen_weight_equals_the_reference_with_gradients(rows, inputs, outputs, rank, size, with_bias, drops, seed):
    """Dense or in panels, merged or beside the weight, which the number of rows and dropout decide."""
    W, weights = draw(outputs, inputs, seed=seed), draw(rows, outputs, seed=seed + 1)
    shapes = (rows, inputs), (rank, inputs), (outputs, rank), (outputs,)
    x, A, B, ratio = (draw(*shape, seed=seed + 2 + n).requires_grad_() for n, shape in enumerate(shapes))
    ratio.data = ratio.data.sign() * (0.1 + ratio.data.abs())
    chosen = draw(outputs, seed=seed + 6) if with_bias else None
    weight = frozen(W, size or None)
    grads = []
    dropout = Dropout(20_000, seed) if drops else None
    left = x if dropout is None else x * dropout.kept(x) * dropout.factor
    expected = ratio * (x @ W.T + reference.lora_delta(left, A, B, 0.7))
    for out in (
        *project(x, [Projection(weight, chosen, (A, B), 0.7, dropout, ratio)]),
        expected if chosen is None else expected + chosen,
    ):
        grads.append([out.detach(), *torch.autograd.grad((out * weights).sum(), [x, A, B, ratio])])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_weight_in_panels_in_sixteen_bits():
    W, x, A, B, ratio = draw(48, 64), draw(30, 64), draw(4, 64), draw(48, 4), draw(48)
    ratio = 1 + ratio / 8
    expected = reference.dora_linear(x, W, None, A, B, 0.7, ratio)
    one = Projection(frozen(W.bfloat16(), 20), None, (A.bfloat16(), B.bfloat16()), 0.7, ratio=ratio)
    (got,) = project(x.bfloat16(), [one])
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


def test_in_sixteen_bits_a_ratio_within_half_a_digit_of_one_counts():
    """Of decoded weights, whose digits are as good as random."""
    W, x, A = draw(64, 256), draw(200, 256), draw(1, 256)
    factors, once = (A.bfloat16(), torch.zeros(64, 1).bfloat16()), torch.ones(64)
    found = [
        project(x.bfloat16(), [Projection(frozen(W, 20), None, factors, ratio=ratio)])[0].double()
        for ratio in (once, once + 1e-3)
    ]
    expected = 1e-3 * (x.bfloat16().double() @ W.T)
    slope = ((found[1] - found[0]) * expected).sum() / expected.square().sum()
    assert 0.8 < slope < 1.2
