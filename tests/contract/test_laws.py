"""Every cell: it starts as the base, computes what the merged layer does, has the gradients of the plain formula."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.contract.cases import QUANTISED, representatives
from tests.contract.grid import expectation, ids, supported
from tests.contract.support import (
    DTYPES,
    TOLERANCES,
    assert_near,
    attach_variant,
    attached,
    cast,
    make_inputs,
    make_model,
    merged,
    naive_forward,
)
from tests.contract.variants import DORA, PLAIN
from veneer.nn.attach import current_adapter, disabled
from veneer.storage.registry import read_weight

CELLS = supported()
PRECISE = supported(storages=("float64", *QUANTISED))
TINY = [
    (case, variant, storage)
    for case in representatives()
    for variant in (PLAIN, DORA)
    for storage in ("float64", *QUANTISED)
    if storage in case.storages and expectation(case.kind, variant, storage) is None
]


@pytest.mark.parametrize(("case", "variant", "storage"), CELLS, ids=ids(CELLS))
@torch.no_grad()
def test_it_starts_as_the_base(case, variant, storage):
    model, inputs = make_model(case, storage), make_inputs(case, storage)
    base = model(*inputs)
    weight = None if variant.starts_as_base else read_weight(model.layer)
    attachment = attach_variant(model, case, variant)
    # Training needs float32, whatever the base is stored in.
    assert {one.dtype for one in attachment.parameters().values()} == {torch.float32}
    if weight is not None:
        # LoftQ: the update is what brings the quantised weight nearer to the one of full precision.
        (pair,) = current_adapter(model).modules.values()
        full = variant.observe(attachment.targets[0], torch.Generator().manual_seed(7))
        assert (full - weight - pair.delta()).norm() < (full - weight).norm()
    elif variant.starts_exact and case.in_order:
        assert torch.equal(model(*inputs), base)
    else:
        # The factors are float32 in a model of float64 too.
        assert_near(model(*inputs), base, max(TOLERANCES[base.dtype], 1e-6))


@pytest.mark.parametrize(("case", "variant", "storage"), CELLS, ids=ids(CELLS))
@torch.no_grad()
def test_forward_is_that_of_the_merged_layer(case, variant, storage):
    """In float64 to 1e-12: float32 factors are widened, and no product is taken in less than the model's dtype."""
    model, attachment = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    adapter = current_adapter(model)
    expected = merged(attachment.layers["layer"].base, {one: adapter.modules[one.path] for one in attachment.targets})
    found = model(*inputs)
    assert found.dtype == DTYPES.get(storage, torch.float32)
    assert_near(found, expected(*cast(inputs, torch.float64)), TOLERANCES[found.dtype])
    with disabled(model):
        assert torch.equal(model(*inputs), make_model(case, storage)(*inputs))


@pytest.mark.parametrize(("case", "variant", "storage"), PRECISE, ids=ids(PRECISE))
def test_gradients_are_those_of_the_plain_formula(case, variant, storage):
    model, attachment = attached(case, variant, storage)
    model.double()
    inputs = make_inputs(case, "float64")
    floats = [one.requires_grad_() for one in inputs if isinstance(one, Tensor) and one.is_floating_point()]
    trained = [one for one in attachment.parameters().values() if one.requires_grad]
    out, expected = model(*inputs), naive_forward(model, inputs)
    assert_near(out, expected, 1e-12)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, [*trained, *floats], direction)
    for one, other in zip(found, torch.autograd.grad(expected, [*trained, *floats], direction), strict=True):
        assert other.any()
        assert_near(one, other, 1e-9)


@pytest.mark.parametrize(("case", "variant", "storage"), TINY, ids=ids(TINY))
def test_gradients_are_those_of_finite_differences(case, variant, storage):
    """DoRA's norm is a constant for the gradient: there only what the norm does not depend on is varied."""
    model, _ = attached(case, variant, storage)
    model.double()
    inputs = make_inputs(case, "float64")
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    if variant is DORA:
        names = [name for name in names if name.endswith("magnitude")]
    values = dict(model.named_parameters())
    varied = [values[name].detach().clone().requires_grad_() for name in names]
    # All floating inputs, each once: attention gets the same tensor three times.
    floats = [place for place, one in enumerate(inputs) if isinstance(one, Tensor) and one.is_floating_point()]

    def run(*given: Tensor) -> Tensor:
        arguments = list(inputs)
        for place, one in zip(floats, given[len(names) :], strict=True):
            arguments[place] = one
        return functional_call(model, dict(zip(names, given, strict=False)), tuple(arguments))

    assert torch.autograd.gradcheck(run, (*varied, *(inputs[place].clone().requires_grad_() for place in floats)))
