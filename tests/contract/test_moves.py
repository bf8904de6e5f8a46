"""Every kind: copies, casts, moves, modes, states, checkpoints treat adapted layers as PyTorch treats its own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.cases import CASES, QUANTISED, Case, by_name
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
    randomise,
    seed_with,
)
from tests.contract.variants import DORA, PLAIN, VARIANTS, Variant
from veneer.errors import AttachError
from veneer.nn.attach import attachment_of, current_adapter, detach
from veneer.nn.routing import Segment

KINDS = supported((PLAIN, DORA), ("float32",))
STORED = supported((PLAIN, DORA), ("float32", *QUANTISED))
EVERY = supported(VARIANTS, ("float32", *QUANTISED))
DROPPED = supported([one for one in VARIANTS if "dropout" in one.settings], ("float32", *QUANTISED))
BY_ROWS = [case for case in CASES if case.rows]
AT_ONCE = [case for case in CASES if not case.rows]


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(one) for name, one in [*model.named_parameters(), *model.named_modules()]},
        "flags": {name: one.requires_grad for name, one in model.named_parameters()},
        "modes": {name: one.training for name, one in model.named_modules()},
        "attributes": {name: sorted(vars(one)) for name, one in model.named_modules()},
    }


def assert_same(before: dict, after: dict) -> None:
    states = before.pop("state"), after.pop("state")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert before == after


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    trained = [one for one in model.parameters() if one.requires_grad]
    return list(torch.autograd.grad(out.square().sum(), trained))


@pytest.mark.parametrize(("case", "variant", "storage"), EVERY, ids=ids(EVERY))
def test_detach_restores_the_model(case, variant, storage):
    model = make_model(case, storage)
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 2 == 0)
    model.layer.train()
    before = snapshot(model)
    randomise(attach_variant(model, case, variant))
    model.eval()(*make_inputs(case, storage)).sum().backward()
    adapter = detach(model)
    assert_same(before, snapshot(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(pair.lora_B.any() for pair in adapter.modules.values())


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_a_copy_is_the_same_and_trains_alone(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    twin, before = copy.deepcopy(model), model(*inputs)
    assert torch.equal(twin(*inputs), before)
    with torch.no_grad():
        for one in attachment_of(twin).parameters().values():
            one.add_(1)
    assert torch.equal(model(*inputs), before)
    assert not torch.equal(twin(*inputs), before)
    assert detach(twin).digest != current_adapter(model).digest


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_a_state_goes_into_another_model(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    other = make_model(case, storage, seed=9)
    attach_variant(other, case, variant)
    other.load_state_dict(model.state_dict(), strict=True)
    # The norms of DoRA's base are no state: they belong to the weight that attach saw.
    if variant is PLAIN:
        assert torch.equal(other(*inputs), model(*inputs))
    assert current_adapter(other).tensors().keys() == current_adapter(model).tensors().keys()
    twin = make_model(case, storage)
    attach_variant(twin, case, variant)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(*inputs), model(*inputs))


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_gradient_checkpointing_changes_nothing(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    found = gradients(model, checkpoint(model, *inputs, use_reentrant=False))
    assert all(map(torch.equal, found, gradients(model, model(*inputs))))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("case", "variant", "storage"), KINDS, ids=ids(KINDS))
@torch.no_grad()
def test_a_cast_after_attach_casts_all(case, variant, storage, dtype):
    model, attachment = attached(case, variant)
    model.to(DTYPES[dtype])
    adapter, inputs = current_adapter(model), make_inputs(case, dtype)
    pairs = {one: adapter.modules[one.path] for one in attachment.targets}
    found = model(*inputs)
    assert found.dtype == DTYPES[dtype]
    expected = merged(attachment.layers["layer"].base, pairs)(*cast(inputs, torch.float64))
    # DoRA's norms stay those of the weight before the cast.
    assert_near(found, expected, max(TOLERANCES[found.dtype], 1e-5))


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_a_move_to_another_device_takes_all_along(case, variant, storage):
    """To the meta device, which is always there; experts read on it how many tokens each has, which it cannot know."""
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    shape = model(*inputs).shape
    model.to("meta")
    assert all(one.is_meta for one in [*model.parameters(), *model.buffers()])
    if case.kind != "experts":
        out = model(*(one.to("meta") if isinstance(one, Tensor) else one for one in inputs))
        assert (out.device.type, out.shape) == ("meta", shape)


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_autocast_gives_the_dtype_of_the_base(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, base = model(*inputs), make_model(case, storage)(*inputs)
    assert out.dtype == base.dtype
    assert_near(out, model(*inputs), TOLERANCES[torch.bfloat16])
    assert all(one.isfinite().all() for one in gradients(model, out))


@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_without_dropout_training_and_evaluation_agree(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    assert_near(model.train()(*inputs), model.eval()(*inputs), 1e-6)


# An expert is no linear function of what goes up, so that a mean over dropped inputs says nothing: down alone.
_LINEAR_IN = {"experts-gated": "down_proj", "experts-transposed-bias": "down_proj", "experts-no-gate": "down_proj"}


@pytest.mark.parametrize(("case", "variant", "storage"), DROPPED, ids=ids(DROPPED))
@torch.no_grad()
def test_dropout_acts_in_training_only_and_keeps_the_mean(case, variant, storage):
    model = make_model(case, storage)
    changes = by_name(_LINEAR_IN[case.name]) if case.name in _LINEAR_IN else {}
    randomise(attach_variant(model, case, variant, **changes))
    inputs = make_inputs(case, storage)
    expected = model.eval()(*inputs)
    assert torch.equal(model(*inputs), expected)
    model.train()
    seed_with(0)
    draws = torch.stack([model(*inputs) for _ in range(400)])
    assert (draws.std(0) > 0).any()
    if case.name == "experts-normed":  # its norm is no linear function either
        return
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-4).all()


def _flat(values: Tensor, rows: int) -> Tensor:
    return values.reshape(rows, -1)


@pytest.mark.parametrize("variant", [PLAIN, DORA], ids=str)
@pytest.mark.parametrize("case", BY_ROWS, ids=str)
@torch.no_grad()
def test_rows_go_through_the_slots_of_their_segments(case: Case, variant: Variant):
    if expectation(case.kind, variant, "float32") is not None:
        pytest.skip("refused: see test_grid.py")
    model, attachment = attached(case, variant)
    inputs = make_inputs(case)
    adapted, base = model(*inputs), make_model(case)(*inputs)
    rows = inputs[0].numel() if case.kind == "embedding" else len(inputs[0])
    if case.kind in ("linear", "conv1d (transposed linear)"):
        rows = inputs[0].numel() // inputs[0].shape[-1]
    with attachment.routing.using([Segment(0, 1, None), Segment(1, rows, 0)]):
        mixed = model(*inputs)
    expected = torch.cat([_flat(base, rows)[:1], _flat(adapted, rows)[1:]])
    assert_near(_flat(mixed, rows), expected, 1e-6)


@pytest.mark.parametrize("case", AT_ONCE, ids=str)
def test_where_rows_cannot_be_told_apart_it_says_so(case: Case):
    model, attachment = attached(case, PLAIN)
    routes = attachment.routing.using([Segment(0, 1, None), Segment(1, 2, 0)])
    with routes, pytest.raises(AttachError, match="cannot route rows of one call through several slots"):
        model(*make_inputs(case))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("case", "variant", "storage"), STORED, ids=ids(STORED))
def test_a_gpu_computes_the_same(case, variant, storage):
    model, _ = attached(case, variant, storage)
    inputs = make_inputs(case, storage)
    expected = model(*inputs)
    found = model.to("cuda")(*(one.to("cuda") if isinstance(one, Tensor) else one for one in inputs))
    assert_near(found.cpu(), expected, 1e-3)
