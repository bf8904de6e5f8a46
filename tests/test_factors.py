"""Forms of factors: what fits, what delta they make, how ranks are joined and cut."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from veneer.factors import FORMS, cat_ranks, compute_delta, cut_ranks

sizes = st.integers(1, 5)


def drawn(form: str, rank: int, outputs: int, inputs: int, groups: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    if form.startswith("experts"):
        shapes = (3, rank, inputs), (3, outputs, rank)
    elif form.startswith("conv"):
        shapes = (rank * groups, inputs, 2), (outputs * groups, rank, 1)
    else:
        shapes = (rank, inputs), (outputs, rank)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("form", FORMS)
@given(sizes, sizes, sizes, sizes)
def test_joined_ranks_add_their_deltas_and_are_cut_apart_again(form, rank, more, outputs, inputs):
    one, other = drawn(form, rank, outputs, inputs), drawn(form, more, outputs, inputs, seed=1)
    A, B = cat_ranks(form, [one, other])
    assert FORMS[form].problem(A, B) is None
    assert FORMS[form].rank(A, B) == rank + more
    torch.testing.assert_close(
        compute_delta(form, A, B, 0.5), compute_delta(form, *one, 0.5) + compute_delta(form, *other, 0.5)
    )
    first, second = cut_ranks(form, A, B, more)
    for expected, got in zip((*one, *other), (*first, *second), strict=True):
        assert torch.equal(expected, got)


@given(sizes, sizes, sizes, st.integers(1, 3))
def test_a_kernel_s_delta_is_the_composition_of_its_two_convolutions(rank, outputs, inputs, groups):
    A, B = drawn("conv", rank, outputs, inputs, groups)
    x = torch.randn(2, inputs * groups, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    delta = compute_delta("conv", A, B, 1.0)
    torch.testing.assert_close(
        F.conv1d(x, delta, groups=groups), F.conv1d(F.conv1d(x, A, groups=groups), B, groups=groups)
    )
    back = compute_delta("conv_transpose", A, B, 1.0)
    kernel = A.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(
        F.conv_transpose1d(x, back, groups=groups),
        F.conv1d(F.conv_transpose1d(x, kernel, groups=groups), B, groups=groups),
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_a_form_is_said(form):
    A, B = drawn(form, 2, 3, 4)
    assert FORMS[form].problem(A, B) is None
    assert FORMS[form].problem(A, B[..., :-1] if not form.startswith("conv") else B[:, :0]) is not None
    assert FORMS[form].problem(A[0], B) is not None
