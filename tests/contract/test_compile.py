"""One of each kind under torch.compile: the same output, in one graph; where not, the grid says why."""

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tests.contract.cases import QUANTISED, representatives
from tests.contract.grid import BREAKS, expectation
from tests.contract.support import assert_near, attached, make_inputs
from tests.contract.variants import DORA, PLAIN

CELLS = [
    (case, variant, storage)
    for case in representatives()
    for variant in (PLAIN, DORA)
    for storage in ("float32", *QUANTISED)
    if storage in case.storages and expectation(case.kind, variant, storage) is None
]


# Dynamo makes an instance of each autograd function that it meets, which torch itself warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Behind a graph break it looks at what it has computed so far.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "variant", "storage"), CELLS, ids=[f"{c}-{v}-{s}" for c, v, s in CELLS])
def test_a_compiled_model_computes_the_same(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    whole = case.kind not in BREAKS and storage not in BREAKS
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    assert_near(compiled(*inputs), model(*inputs), 1e-6)
    if not whole:
        torch._dynamo.reset()
        with pytest.raises((Unsupported, GuardOnDataDependentSymNode)):
            torch.compile(model, backend="eager", fullgraph=True)(*inputs)
