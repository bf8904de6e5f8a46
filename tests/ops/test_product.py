"""Products equal torch's, on any layout; the rule that chooses an order is the one that is stated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.ops import product as product_module
from veneer.ops.product import IN_PASSING, merging_pays, product, sum_product

sizes = st.integers(0, 9)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.zeros(x.shape[0], x.shape[1] + 3)
    wide[:, 2:-1] = x
    return {"rows": x, "transposed": x.T.contiguous().T, "a slice": wide[:, 2:-1]}


@pytest.mark.parametrize("by", ["onednn", "blas"])
@given(sizes, sizes, sizes, st.booleans())
def test_equals_a_linear_layer(by, rows, inputs, outputs, with_bias):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product_module, "_ONEDNN", torch.ops.mkldnn._linear_pointwise.default if by == "onednn" else None)
        check_product(rows, inputs, outputs, with_bias)


def check_product(rows, inputs, outputs, with_bias):
    x, W, bias = draw(rows, inputs), draw(outputs, inputs), draw(outputs) if with_bias else None
    expected = torch.nn.functional.linear(x, W, bias)
    for left in layouts(x).values():
        for right in layouts(W).values():
            torch.testing.assert_close(product(left, right, bias), expected)


def test_takes_an_expanded_side():
    torch.testing.assert_close(product(torch.ones(1, 1).expand(5, 4), draw(3, 4)), torch.ones(5, 4) @ draw(3, 4).T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_through_torch(dtype):
    x, W = draw(5, 4, dtype=dtype), draw(3, 4, dtype=dtype)
    assert torch.equal(product(x, W), torch.nn.functional.linear(x, W))


def test_a_sum_over_rows():
    z, y = draw(50, 3), draw(50, 7)
    torch.testing.assert_close(sum_product(z, y), z.T @ y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "pays"),
    [
        (256, (512, 512), torch.float32, True),
        (255, (512, 512), torch.float32, False),
        (10_000, (512, 512), torch.bfloat16, False),
        (1, (4, 1), torch.float64, True),
    ],
)
def test_merging_pays_from_the_stated_number_of_rows(rows, shape, dtype, pays):
    assert merging_pays(rows, shape, dtype, IN_PASSING) is pays
