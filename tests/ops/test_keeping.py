"""What backward needs is written where a caller says; values and gradients are those of the heap, bit for bit."""

from functools import partial

import pytest
import torch

from veneer.ops import product as products
from veneer.ops.attention import causal_attention
from veneer.ops.frozen import FrozenWeight
from veneer.ops.gates import ACTIVATIONS
from veneer.ops.keeping import kept_sum, room, same_room
from veneer.ops.norm import RMSNorm, rms_norm
from veneer.ops.product import product
from veneer.ops.projections import Projection, gated_projection, project
from veneer.ops.rotary import rotate

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
T, D, OUT, R = 200, 16, 24, 2


class Keeper:
    """A `Keep` that remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def __call__(self, shape, dtype):
        self.given.append(torch.full(tuple(shape), float("nan"), dtype=dtype))
        return self.given[-1]

    def gave(self, tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {one.untyped_storage().data_ptr() for one in self.given}


def writes_where_it_likes(dtype) -> bool:
    """oneDNN does, which products in float32 go to on some processors."""
    return dtype == torch.float32 and products._ONEDNN is not None


def drawn(*shape, dtype, trains=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_(trains)


def projection(rows, columns, dtype, *, bias=False, scaled=False):
    weight = FrozenWeight(torch.Size([rows, columns]), drawn(rows, columns, dtype=dtype, trains=False))
    factors = drawn(R, columns, dtype=dtype), drawn(rows, R, dtype=dtype)
    ratio = (1 + drawn(rows, dtype=torch.float32, trains=False).abs()).requires_grad_() if scaled else None
    return Projection(weight, drawn(rows, dtype=dtype, trains=False) if bias else None, factors, 0.5, None, ratio)


def projected(dtype, keep, *, scaled=False):
    x, norm = drawn(T, D, dtype=dtype), RMSNorm(drawn(D, dtype=dtype, trains=False), 1e-5)
    layers = [projection(OUT, D, dtype, bias=True, scaled=scaled), projection(OUT, D, dtype, scaled=scaled)]
    outs = project(x, layers, norm, keep, (0, 1))
    return [x, *(part for one in layers for part in one.factors)], outs, outs[1:]


def gated(dtype, keep, *, scaled=False):
    gate, up, down = drawn(T, D, dtype=dtype), drawn(T, D, dtype=dtype), projection(OUT, D, dtype, scaled=scaled)
    out = gated_projection(gate, up, ACTIVATIONS["silu"], down, keep)
    return [gate, up, *down.factors], [out], [out]


projected_with_ratios, gated_with_a_ratio = partial(projected, scaled=True), partial(gated, scaled=True)
PRODUCTS = (projected, gated, projected_with_ratios, gated_with_a_ratio)


def normed(dtype, keep):
    x = drawn(T, D, dtype=dtype)
    return [x], [rms_norm(x, RMSNorm(drawn(D, dtype=dtype, trains=False), 1e-5), keep)], []


def rotated(dtype, keep):
    x, turns = drawn(T, 2, D, dtype=dtype), (drawn(T, D, dtype=dtype, trains=False) for _ in range(2))
    out = rotate(x, *turns, keep)
    return [x], [out], [out]


def summed(dtype, keep):
    x, y = drawn(T, D, dtype=dtype), drawn(T, D, dtype=dtype)
    out = kept_sum(x, y, keep)
    return [x, y], [out], [out]


def attended(dtype, keep):
    q, k, v = drawn(T, 4, 8, dtype=dtype), drawn(T, 2, 8, dtype=dtype), drawn(T, 2, 8, dtype=dtype)
    out = causal_attention(q, k, v, (T - 5, 5), scaling=0.3, keep=keep)
    return [q, k, v], [out], [out]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make", [projected, projected_with_ratios, gated, gated_with_a_ratio, normed, rotated, summed, attended]
)
def test_values_and_gradients_are_those_of_the_heap(make, dtype):
    found = []
    for keep in (None, Keeper()):
        inputs, outs, kept = make(dtype, keep)
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)
        found.append([*outs, *gradients])
        if keep is not None:
            assert not any(one.isnan().any() for one in keep.given)
            if make not in PRODUCTS or not writes_where_it_likes(dtype):
                assert keep.given
                assert all(keep.gave(out) for out in kept)
    for plain, kept in zip(*found, strict=True):
        assert torch.equal(plain, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_same_in_a_room(bias, dtype):
    x, W = drawn(T, D, dtype=dtype, trains=False), drawn(OUT, D, dtype=dtype, trains=False)
    b = drawn(OUT, dtype=dtype, trains=False) if bias else None
    assert torch.equal(product(x, W, b), product(x, W, b, Keeper()))


def test_the_same_room_grows_and_stays():
    keep = same_room(torch.device("cpu"))
    small = keep((2,), torch.float32).data_ptr()
    large = keep((1000,), torch.float32)
    assert large.shape == (1000,)
    assert keep((3, 5), torch.bfloat16).data_ptr() == large.data_ptr() != small


def test_without_a_keeper_there_is_the_heap():
    assert room(None, (2, 3), torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert room(None, (2, 3), torch.ones(1), torch.bfloat16).dtype == torch.bfloat16
