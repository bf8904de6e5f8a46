"""Attach, detach, disabled: what they do, and that nothing is left behind."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, AttachError, ConfigError, TargetError
from veneer.nn.attach import attach, attachment_of, current_adapter, detach, disabled
from veneer.nn.linear import LoRALinear
from veneer.nn.plan import plan, plan_of
from veneer.nn.routing import Segment
from veneer.storage.quantise import quantise_model


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(self.norm(self.drop(self.first(x)))))


def snapshot(model: nn.Module) -> dict:
    """Everything that detach promises to bring back."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "tree": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_same(before: dict, after: dict) -> None:
    for key in before:
        if key == "state":
            assert before[key].keys() == after[key].keys()
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        else:
            assert before[key] == after[key], key


def train_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


CONFIGS = [
    {},
    {"target_modules": ["first", "head"], "rank": 3},
    {"bias": "all"},
    {"bias": "lora_only", "target_modules": ["first"]},
    {"modules_to_save": ["head", "norm"]},
    {"dropout": 0.3, "use_rslora": True},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_detach_brings_everything_back(config, training):
    model = Net().train(training)
    model.norm.train(not training)
    model.first.weight.requires_grad_(False)
    before = snapshot(model)
    attach(model, LoRAConfig(**config))
    train_a_little(model)
    model.train(not training)
    adapter = detach(model)
    assert_same(before, snapshot(model))
    assert any(pair.lora_B.any() for pair in adapter.modules.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_fresh_adapter_changes_nothing_and_only_it_trains(config):
    model = Net().eval()
    x = torch.randn(5, 4)
    before = model(x)
    attachment = attach(model, LoRAConfig(**config))
    assert torch.equal(model(x), before)
    trained = {id(parameter) for parameter in attachment.parameters().values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    assert sum(parameter.numel() for parameter in attachment.parameters().values()) == plan_of(model).num_parameters


@pytest.mark.parametrize("config", CONFIGS)
def test_put_back_into_the_model_an_adapter_computes_the_same(config):
    model = Net().eval()
    x = torch.randn(5, 4)
    attach(model, LoRAConfig(**config))
    train_a_little(model)
    model.eval()
    trained = model(x)
    adapter = detach(model)
    attach(model, adapter)
    assert torch.equal(model(x), trained)
    assert current_adapter(model).digest == adapter.digest
    assert detach(model).digest == adapter.digest


def test_the_update_is_scaling_times_the_product():
    model = Net().eval()
    x = torch.randn(5, 4)
    attach(model, LoRAConfig(target_modules=["head"], rank=2, alpha=6))
    train_a_little(model)
    model.eval()
    got = model(x)
    adapter = detach(model)
    with torch.no_grad():
        model.head.weight += adapter.modules["head"].delta().float()
    torch.testing.assert_close(got, model(x))
    assert adapter.modules["head"].scaling == 3


@pytest.mark.parametrize("config", CONFIGS)
def test_disabled_is_the_base_and_leaves_the_adapter_as_it_is(config):
    model = Net().eval()
    x = torch.randn(5, 4)
    base = model(x)
    attach(model, LoRAConfig(**config))
    train_a_little(model)
    model.eval()
    trained, digest = model(x), current_adapter(model).digest
    with disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), trained)
    assert current_adapter(model).digest == digest
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), trained)


def test_the_seed_fixes_the_factors_whatever_else_is_adapted():
    one, other = Net(), Net()
    attach(one, LoRAConfig(target_modules=["head"]), seed=3)
    attach(other, LoRAConfig(), seed=3)
    a, b = detach(one), detach(other)
    assert torch.equal(a.modules["head"].lora_A, b.modules["head"].lora_A)
    attach(one, LoRAConfig(target_modules=["head"]), seed=4)
    assert not torch.equal(detach(one).modules["head"].lora_A, a.modules["head"].lora_A)


def test_the_global_random_state_is_not_touched():
    model = Net()
    state = torch.get_rng_state()
    attach(model, LoRAConfig())
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_come_before_anything_is_touched():
    model = Net()
    before = snapshot(model)
    with pytest.raises(TargetError):
        attach(model, LoRAConfig(target_modules=["first", "haed"]))
    wrong = {"first": LowRank(torch.zeros(1, 9), torch.zeros(6, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"first: the layer is \(out, in\) = \(6, 4\), the adapter is for \(6, 9\)"):
        attach(model, Adapter(wrong, LoRAConfig(rank=1)))
    absent = {"frst": LowRank(torch.zeros(1, 4), torch.zeros(6, 1), 1.0)}
    with pytest.raises(AdapterError, match="frst: the model has no such module; nearest: 'first'"):
        attach(model, Adapter(absent, LoRAConfig(rank=1)))
    extra = {"first": LowRank(torch.zeros(1, 4), torch.zeros(6, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"first.bais: the model has no such parameter"):
        attach(model, Adapter(extra, LoRAConfig(rank=1), {"first.bais": torch.zeros(6)}))
    with pytest.raises(AdapterError, match=r"first.bias: .*shape"):
        attach(model, Adapter(extra, LoRAConfig(rank=1), {"first.bias": torch.zeros(7)}))
    with pytest.raises(AttachError, match="call attach"):
        detach(model)
    assert_same(before, snapshot(model))
    attach(model, LoRAConfig())
    with pytest.raises(AttachError, match="call detach"):
        attach(model, LoRAConfig())
    assert attachment_of(model).layers


def test_an_adapter_of_other_weights_is_refused_unless_told():
    model = Net(seed=0)
    attach(model, LoRAConfig())
    adapter = detach(model)
    other = Net(seed=1)
    with pytest.raises(AdapterError, match="made for other weights"):
        attach(other, adapter)
    attach(other, adapter, any_base=True)


@pytest.mark.parametrize("ask", [plan, attach])
def test_an_unknown_initialisation_is_named_before_anything_is_touched(ask):
    model = Net(seed=0)
    modules = dict(model.named_modules())
    with pytest.raises(ConfigError, match="no initialisation 'pisa'; nearest: 'pissa'; there are kaiming, "):
        ask(model, LoRAConfig(init="pisa"))
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_an_adapter_of_another_storage_is_told_how_to_load_the_base(storage):
    models = [Net(seed=0), Net(seed=0)]
    quantise_model(models[1], "int8")
    trained, model = models if storage == "int8" else models[::-1]
    attach(trained, LoRAConfig())
    with pytest.raises(AdapterError, match=f"here as {storage}, which storage= of load_base, or --storage, sets"):
        attach(model, detach(trained))


def test_a_tied_parameter_cannot_train_alone():
    model = Net()
    model.inner.tied = nn.Linear(6, 3)
    model.inner.tied.weight = model.head.weight
    with pytest.raises(
        TargetError, match=r"head.weight is the same parameter as inner.tied.weight|inner.tied.weight is"
    ):
        attach(model, LoRAConfig(target_modules=["first"], modules_to_save=["head"]))


def test_rows_go_through_the_slots_of_their_segments():
    model = Net().eval()
    attach(model, LoRAConfig(target_modules=["first"]))
    train_a_little(model)
    model.eval()
    x = torch.randn(6, 4)
    adapted = model(x)
    with disabled(model):
        base = model(x)
    with attachment_of(model).routing.using([Segment(0, 2, None), Segment(2, 6, 0)]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.cat([base[:2], adapted[2:]]))
    with attachment_of(model).routing.using([Segment(0, 5, 0)]), pytest.raises(AttachError, match="covers 5 rows"):
        model(x)


@pytest.mark.parametrize("segments", [[], [Segment(1, 2, 0)], [Segment(0, 2, 0), Segment(3, 4, 0)], [Segment(0, 0, 0)]])
def test_segments_that_leave_a_gap_are_refused(segments):
    model = Net()
    with pytest.raises(AttachError), attach(model, LoRAConfig()).routing.using(segments):
        pass


def test_copies_and_gradient_checkpointing_work():
    model = Net().eval()
    attach(model, LoRAConfig())
    train_a_little(model)
    model.eval()
    x = torch.randn(5, 4)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with disabled(twin):
        assert not torch.equal(twin(x), model(x))
    grads = []
    for run in (model, lambda value: torch.utils.checkpoint.checkpoint(model, value, use_reentrant=False)):
        model.zero_grad()
        run(x).sum().backward()
        grads.append({name: p.grad.clone() for name, p in attachment_of(model).parameters().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_dropout_acts_in_training_only():
    model = nn.Sequential(nn.Linear(50, 50))
    attach(model, LoRAConfig(dropout=0.5))
    with torch.no_grad():
        attachment_of(model).layers["0"].slot(0).lora_B.fill_(1.0)
    x = torch.ones(1, 50)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 10))
def test_forward_equals_the_merged_layer(inputs, outputs, rank, alpha):
    layer = nn.Sequential(nn.Linear(inputs, outputs).double())
    generator = torch.Generator().manual_seed(rank)
    pair = LowRank(
        torch.randn(rank, inputs, generator=generator, dtype=torch.float64),
        torch.randn(outputs, rank, generator=generator, dtype=torch.float64),
        alpha / rank,
    )
    x = torch.randn(3, inputs, dtype=torch.float64)
    expected = layer(x) + x @ pair.delta().T
    attach(layer, Adapter({"0": pair}, LoRAConfig(rank=rank, alpha=alpha)))
    torch.testing.assert_close(layer(x), expected)


def test_the_base_is_a_black_box():
    """A subclass with a forward of its own is called, never looked into."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 3))
    x = torch.randn(2, 3)
    expected = model(x)
    attach(model, LoRAConfig())
    assert isinstance(model[0], LoRALinear)
    assert torch.equal(model(x), expected)


def test_plan_before_and_after_attach_agree():
    model = Net()
    planned = plan(model, LoRAConfig(bias="all"))
    attach(model, LoRAConfig(bias="all"))
    assert plan_of(model) == planned


def test_hooks_and_forwards_of_the_base_layer_act():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda _module, _inputs, out: out * 10)
    x = torch.randn(2, 3)
    expected = model(x)
    attach(model, LoRAConfig())
    assert torch.equal(model(x), expected)
    detach(model)
    model[0].forward = lambda value: value + 1
    attach(model, LoRAConfig())
    assert torch.equal(model(x), (x + 1) * 10)


def test_disabled_nests_and_keeps_detach_out():
    model = Net().eval()
    x = torch.randn(5, 4)
    base = model(x)
    attach(model, LoRAConfig(bias="all"))
    train_a_little(model)
    model.eval()
    with disabled(model):
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        with pytest.raises(AttachError, match="after the block"):
            detach(model)
    assert not torch.equal(model(x), base)


def test_a_module_added_meanwhile_does_not_lose_the_adapter():
    model = Net()
    attach(model, LoRAConfig())
    model.extra = nn.Linear(2, 2)
    assert detach(model).modules
    assert model.extra.weight.requires_grad


def test_the_plan_of_an_attached_adapter_is_the_adapters():
    pair = {"first": LowRank(torch.ones(2, 4), torch.ones(6, 2), 32.0)}
    model = Net()
    attach(model, Adapter(pair, LoRAConfig(rank=4, alpha=64, rank_pattern={"first": 2})))
    planned = plan_of(model)
    assert (planned.modules[0].rank, planned.modules[0].scaling, planned.num_parameters) == (2, 32.0, 20)
    assert planned.base_parameters == sum(parameter.numel() for parameter in Net().parameters())
    with pytest.raises(AttachError):
        plan(model, LoRAConfig())


def test_autocast_trains():
    model = nn.Sequential(nn.Linear(4, 4))
    attachment = attach(model, LoRAConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.ones(2, 4)).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters().values())


def test_an_adapter_for_a_layer_that_is_never_called_is_refused():
    """As `find_targets` refuses it: in evaluation it would have no effect."""
    encoder = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    pair = LowRank(torch.ones(1, 4), torch.ones(8, 1), 1.0)
    with pytest.raises(AdapterError, match=r"0\.linear1 is read by the fused kernel"):
        attach(encoder, Adapter({"0.linear1": pair}, LoRAConfig(rank=1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_by_name(value):
    model = Net()
    attach(model, LoRAConfig(rank=2))
    adapter = detach(model)
    pair = adapter.modules["first"]
    bad = LowRank(pair.lora_A, torch.full_like(pair.lora_B, value), pair.scaling)
    modules = dict(model.named_modules())
    with pytest.raises(AdapterError, match=r"first\.lora_B: \d+ of \d+ values are not finite"):
        attach(model, Adapter({**adapter.modules, "first": bad}, adapter.config))
    assert dict(model.named_modules()) == modules
