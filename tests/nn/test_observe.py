"""The data passes: they find what they say, and leave nothing behind."""

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from veneer.errors import ConfigError, NonFiniteError, TargetError
from veneer.nn import observe
from veneer.nn.observe import input_directions, weight_gradients
from veneer.ops import initialise_directions
from veneer.ops.initialise import eva, redistribute_ranks
from veneer.ops.initialise_directions import add_rows
from veneer.storage.quantise import quantise_model
from veneer.storage.registry import read_weight


class Net(nn.Module):
    """Two layers on the same input, an in-place activation, a Conv1D, a layer by keyword, one that is never called."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(6, 8, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.25)
        self.conv = Conv1D(5, 8)
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(6, 6)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.left(x)) + self.right(x)
        return self.head(input=self.conv(self.drop(hidden)))


PATHS = ["left", "right", "conv", "head"]


def rows(count: int, size: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows with a mean and with directions of clearly different size."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(99))).Q
    return (torch.randn(count, size, generator=generator) * 2.0 ** -torch.arange(size)) @ turn.T + 0.3


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grad": {name: parameter.grad for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if "hooks" in key]
            for name, module in model.named_modules()
        },
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict, after: dict) -> None:
    assert torch.equal(before.pop("random"), after.pop("random"))
    one, other = before.pop("state"), after.pop("state")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert before == after


def by_svd(stacked: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    _, S, Vh = torch.linalg.svd(stacked.double(), full_matrices=False)
    return S[:rank].float(), Vh[:rank].float()


def assert_directions(found: observe.Directions, stacked: torch.Tensor, rank: int, tolerance: float = 1e-4) -> None:
    S, Vh = by_svd(stacked, rank)
    torch.testing.assert_close(found.values_D, S, rtol=tolerance, atol=tolerance)
    assert (found.directions_DI * Vh).sum(1).abs().min() > 1 - tolerance
    assert found.energy == pytest.approx(stacked.double().square().sum().item(), rel=1e-5)
    torch.testing.assert_close(found.explained.float(), S**2 / stacked.square().sum(), rtol=1e-3, atol=1e-5)


# --- directions --------------------------------------------------------------------------------------------------


def test_one_batch_equals_the_svd_of_all_inputs():
    model = Net().eval()
    x = rows(40)
    found = input_directions(model, PATHS, [lambda: model(x.view(4, 10, 6))], 3)
    hidden = model.act(model.left(x)) + model.right(x)
    for path, stacked in {"left": x, "right": x, "conv": hidden, "head": model.conv(hidden)}.items():
        assert_directions(found[path], stacked, 3)
        assert found[path].rows == 40
        assert not found[path].converged
        identity = found[path].directions_DI @ found[path].directions_DI.T
        torch.testing.assert_close(identity, torch.eye(3), rtol=1e-5, atol=1e-5)
        eva(found[path].directions_DI, 7, 2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_batches_equal_all_rows_at_once_where_nothing_is_cut(counts, centred, seed):
    x = rows(sum(counts), seed=seed)
    state = None
    for part in x.split(counts):
        state = add_rows(state, part, 6, centred=centred)
    assert state is not None
    expected = x - x.mean(0) if centred else x
    whole = state.directions_DI.T @ torch.diag(state.values_D**2) @ state.directions_DI
    torch.testing.assert_close(whole, expected.T @ expected, rtol=1e-3, atol=1e-3)
    assert state.energy == pytest.approx(expected.square().sum().item(), rel=1e-3, abs=1e-6)


def test_several_batches_are_near_the_svd_of_all_inputs():
    model = Net().eval()
    batches = [rows(30, seed=seed) for seed in range(4)]
    found = input_directions(model, ["left"], [lambda x=x: model(x) for x in batches], 3, tolerance=0.0)
    S, Vh = by_svd(torch.cat(batches), 3)
    torch.testing.assert_close(found["left"].values_D, S, rtol=0.02, atol=0.0)
    assert (found["left"].directions_DI * Vh).sum(1).abs().min() > 0.98


def test_large_inputs_by_the_randomised_svd(monkeypatch):
    x = rows(300, 80) @ torch.diag(0.98 ** torch.arange(80))
    monkeypatch.setattr(initialise_directions, "EXACT_SIZE", 16)
    assert_directions(add_rows(None, x, 6), x, 6, 1e-3)


def test_layers_on_the_same_tensor_are_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(observe, "add_rows", lambda *a, **k: calls.append(a) or add_rows(*a, **k))
    model = Net().eval()
    batches = [lambda seed=seed: model(rows(20, seed=seed)) for seed in range(3)]
    found = input_directions(model, PATHS, batches, 2, tolerance=0.0)
    assert len(calls) == 3 * 3
    assert found["left"] is found["right"]


def test_a_tensor_that_changed_in_between_is_not_the_same():
    class Changing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = self.left(x)
            return left + self.right(x.mul_(torch.arange(6.0)))

    model = Changing()
    x = rows(20)
    found = input_directions(model, ["left", "right"], [lambda: model(x.clone())], 2)
    assert_directions(found["left"], x, 2)
    assert_directions(found["right"], x * torch.arange(6.0), 2)


def test_layers_that_part_ways_later_are_told_apart():
    model = Net()
    x, other = rows(20), rows(20, seed=1) * torch.arange(6.0)

    def together() -> None:
        model.left(x), model.right(x)

    def apart() -> None:
        model.left(x), model.right(other)

    found = input_directions(model, ["left", "right"], [together, apart], 6, tolerance=0.0)
    assert_directions(found["left"], torch.cat([x, x]), 6, 1e-3)
    assert_directions(found["right"], torch.cat([x, other]), 6, 1e-3)


def test_it_stops_when_the_directions_stand_still():
    model = Net().eval()
    ran = []

    def batch(index: int):
        return lambda: ran.append(index) or model(rows(50))

    found = input_directions(model, PATHS, [batch(index) for index in range(9)], 2)
    assert ran == [0, 1]
    assert all(one.converged and one.rows == 100 for one in found.values())
    ran.clear()
    found = input_directions(model, PATHS, [batch(index) for index in range(4)], 2, tolerance=0.0)
    assert ran == [0, 1, 2, 3]
    assert not any(one.converged for one in found.values())


def test_a_batch_of_few_rows_does_not_count_as_standing_still():
    model = Net().eval()
    batches = [lambda: model(rows(50)), lambda: model(rows(1)), lambda: model(rows(50, seed=3))]
    assert input_directions(model, ["left"], batches, 4)["left"].rows == 101


def test_inputs_that_span_little_give_few_directions():
    model = Net().eval()
    x = rows(1).repeat(20, 1)
    found = input_directions(model, ["left"], [lambda: model(x), lambda: model(x)], 3)["left"]
    assert found.directions_DI.shape == (1, 6)
    assert found.explained.sum().item() == pytest.approx(1)
    with pytest.raises(ConfigError, match="span 1 directions"):
        eva(found.directions_DI, 8, 2)
    nothing = input_directions(model, ["left"], [lambda: model(torch.zeros(4, 6))], 3)["left"]
    assert nothing.directions_DI.shape == (0, 6)
    assert nothing.explained.tolist() == []


def test_under_inference_mode_and_autocast():
    model = Net().eval()
    x = rows(40)

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    assert_directions(input_directions(model, ["left", "right"], [run], 2)["right"], x, 2)


def test_what_is_not_finite_is_named():
    model = Net().eval()
    x = rows(8)
    x[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="left: "):
        input_directions(model, ["left"], [lambda: model(x)], 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_directions_and_ranks_equal_those_of_peft():
    peft = pytest.importorskip("peft")
    eva_of = pytest.importorskip("peft.tuners.lora.eva")
    model = Net().eval()
    x = rows(60)
    targets = PATHS[:3]  # theirs cannot see an input given by keyword
    rho = peft.EvaConfig(rho=1.5)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights="eva", eva_config=rho)
    theirs = eva_of.get_eva_state_dict(
        model,
        [x],
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = input_directions(model, targets, [lambda: model(x)] * 2, 3, centred=True)
    ranks = redistribute_ranks({path: found[path].explained for path in theirs}, 2, 1.5)
    for path, directions in theirs.items():
        ours = eva(found[path].directions_DI, 4, len(directions)).lora_A
        assert torch.linalg.svdvals(ours @ directions.float().T).min() > 0.999
        assert ranks[path] == len(directions)


# --- gradients ---------------------------------------------------------------------------------------------------


def by_autograd(model: nn.Module, losses: list, path: str) -> torch.Tensor:
    weight = model.get_submodule(path).weight.requires_grad_(True)
    gradient = torch.autograd.grad(sum(loss() for loss in losses) / len(losses), weight)[0]
    weight.requires_grad_(False)
    return gradient.T if isinstance(model.get_submodule(path), Conv1D) else gradient


@pytest.mark.parametrize("asked", [False, True], ids=["frozen", "asked for gradients"])
def test_gradients_equal_autograd(asked):
    model = Net().eval()
    losses = [lambda seed=seed: model(rows(10, seed=seed).view(2, 5, 6)).square().mean() for seed in range(3)]
    expected = {path: by_autograd(model, losses, path) for path in PATHS}
    model.requires_grad_(asked)
    with torch.no_grad():
        found = weight_gradients(model, PATHS, losses)
    for path in PATHS:
        assert found[path].dtype == torch.float32
        torch.testing.assert_close(found[path], expected[path], rtol=1e-5, atol=1e-6)


def test_gradients_of_a_language_model(tiny):
    model = tiny()
    ids = torch.arange(24).reshape(2, 12)
    losses = [lambda: model(input_ids=ids, labels=ids).loss]
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    found = weight_gradients(model, paths, losses)
    assert len(found) == 14
    for path in paths:
        torch.testing.assert_close(found[path], by_autograd(model, losses, path), rtol=1e-4, atol=1e-7)


def test_gradients_of_a_layer_that_is_called_twice_and_of_bfloat16():
    model = Net().eval()
    x = rows(10)
    losses = [lambda: (model(x) + model(x * 2)).square().mean()]
    twice = weight_gradients(model, ["left"], losses)["left"]
    torch.testing.assert_close(twice, by_autograd(model, losses, "left"), rtol=1e-5, atol=1e-6)
    half = copy.deepcopy(model).bfloat16()
    found = weight_gradients(half, ["head"], [lambda: half(x.bfloat16()).square().mean()])["head"]
    expected = by_autograd(model, [lambda: model(x).square().mean()], "head")
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_gradients_with_checkpointing_and_autocast():
    model = Net().eval()
    x = rows(10)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = checkpoint(lambda x: model.right(x), x, use_reentrant=False)
            return checkpoint(lambda h: model.head(model.conv(h)), hidden, use_reentrant=False).float().square().mean()

    found = weight_gradients(model, ["right", "head"], [loss])
    for path, one in found.items():
        expected = by_autograd(model, [loss], path)
        assert (one - expected).norm() < 0.02 * expected.norm()


def test_a_loss_that_gives_no_gradient_is_refused():
    model = Net().eval()
    for loss in (lambda: model(rows(4)), lambda: model(rows(4)).sum().detach()):
        with pytest.raises(TargetError, match="loss 0 must be a scalar"):
            weight_gradients(model, ["left"], [loss])
    with pytest.raises(TargetError, match="head: called, but the loss does not depend on it"):
        weight_gradients(model, ["left", "head"], [lambda: (model(rows(4)), model.left(rows(4)).sum())[1]])
    with pytest.raises(NonFiniteError, match="left: the gradient"):
        weight_gradients(model, ["left"], [lambda: model(rows(4)).sum() * float("nan")])


# --- both --------------------------------------------------------------------------------------------------------


def directions(model: nn.Module, paths: list[str], run) -> dict:
    return input_directions(model, paths, [run], 2)


def gradients(model: nn.Module, paths: list[str], run) -> dict:
    return weight_gradients(model, paths, [run])


both = pytest.mark.parametrize("look", [directions, gradients])


@both
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(look, training):
    model = Net().train(training)
    model.conv.eval()
    model.head.weight.requires_grad_(True)
    before = snapshot(model)
    found = look(model, PATHS, lambda: model(rows(20)).square().mean())
    assert list(found) == PATHS
    assert_same(before, snapshot(model))


@both
def test_nothing_is_left_behind_after_an_exception(look):
    model = Net()
    before = snapshot(model)

    def run() -> torch.Tensor:
        model(rows(20))
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        look(model, PATHS, run)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("look", [lambda *a: input_directions(*a, rank=2, tolerance=0.0), weight_gradients])
def test_no_activation_outlives_its_batch(look):
    model, alive = Net(), []

    def run() -> torch.Tensor:
        gc.collect()
        alive.extend(one.shape for one in gc.get_objects() if type(one) is torch.Tensor and 777 in one.shape)
        return model(rows(777)).square().mean()

    assert look(model, PATHS, [run] * 3)
    assert not alive


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_quantised_layers_show_what_plain_ones_of_the_same_weights_do(storage):
    model = Net().eval()
    quantise_model(model, storage, skip=["head"])
    plain = Net().eval()
    for path in ("left", "right"):
        assert type(model.get_submodule(path)) is not nn.Linear
        plain.get_submodule(path).weight.data.copy_(read_weight(model.get_submodule(path)))
    looks = []
    for one in (model, plain):
        directions = input_directions(one, PATHS, [lambda one=one: one(rows(20))], rank=2)
        gradients = weight_gradients(one, PATHS, [lambda one=one: one(rows(20)).square().mean()])
        looks.append((directions, gradients))
    for path in PATHS:
        found, expected = (directions[path].directions_DI for directions, _ in looks)
        torch.testing.assert_close((found @ expected.T).abs(), torch.eye(2), rtol=0, atol=1e-4)
        torch.testing.assert_close(looks[0][1][path], looks[1][1][path], rtol=1e-4, atol=1e-6)


@both
def test_layers_that_cannot_be_observed_are_named_at_once(look):
    model = Net()
    ran = []
    with pytest.raises(TargetError) as error:
        look(model, ["left", "rigt", "act"], lambda: ran.append(1))
    assert error.value.problems == (
        "rigt: the model has no such module; nearest: 'right'",
        "act: is a ReLU, expected a linear layer without an adapter",
    )
    assert not ran


@both
def test_a_layer_that_was_never_called_is_named(look):
    model = Net()
    with pytest.raises(TargetError, match="unused: never called"):
        look(model, ["left", "unused"], lambda: model(rows(20)).square().mean())


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        input_directions(Net(), ["left"], [], 0)
