"""Other methods' adapters as LoRA: the same outputs as PEFT's model, or the least error that a rank allows."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, VeraConfig
from tests.peft_methods import CONVOLUTIONS, LINEAR, Convolutions, deltas, net, saved, shapes
from tests.tools.algebra import pair_of
from torch import nn

import veneer
from veneer.adapter import Adapter
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.factors import row_axes
from veneer.files.peft_loha import LOHA
from veneer.files.peft_lokr import LOKR
from veneer.files.peft_method import ModuleUpdate
from veneer.files.peft_other import OtherAdapter, read_other
from veneer.files.peft_vera import VERA
from veneer.tools.to_lora import dora_to_lora, to_lora

X = torch.linspace(-2, 2, 30).reshape(5, 6)


def other_of(updates, method="loha"):
    return OtherAdapter(method, updates, {}, LoRAConfig(target_modules=["q"]))


def loha(rank=2, outputs=20, inputs=15, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    parts = {
        f"hada_w{which}_{side}": torch.randn(*shape, generator=generator) * scale
        for which in (1, 2)
        for side, shape in (("a", (outputs, rank)), ("b", (rank, inputs)))
    }
    return ModuleUpdate(LOHA, parts, 0.7, (outputs, inputs))


def best(delta, rank):
    """The least relative error that any matrix of a rank can have."""
    values = torch.linalg.svdvals(delta)
    return (torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values)).item()


def measured(conversion, other, path):
    delta = other.modules[path].delta().reshape(other.modules[path].shape[0], -1)
    found = conversion.adapter.modules[path].delta()
    return (torch.linalg.vector_norm(found - delta) / torch.linalg.vector_norm(delta).clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", LINEAR)
def test_the_converted_adapter_gives_the_outputs_of_pefts_model(tmp_path, name):
    saved(LINEAR[name], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's false alarms on masks
        expected = PeftModel.from_pretrained(net(), str(tmp_path)).eval()(X)
    other = read_other(tmp_path, shapes=shapes())
    found = to_lora(other)
    model = net()
    veneer.attach(model, found.adapter)
    assert torch.allclose(model.eval()(X), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net()(X), expected, rtol=1e-2, atol=1e-2)
    assert found.worst < 1e-7
    assert found.adapter.config.dropout == other.config.dropout


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_written_is_read_back_and_loaded_by_peft(tmp_path, name):
    saved(LINEAR[name], tmp_path / "other")
    adapter = to_lora(read_other(tmp_path / "other", shapes=shapes())).adapter
    assert {pair.scaling for pair in adapter.modules.values()} == {1.0}
    for path, pair in adapter.modules.items():
        assert adapter.config.rank_for(path) == pair.rank
        assert adapter.config.scaling_for(path) == 1.0
    veneer.save_adapter(adapter, tmp_path / "lora")
    again = veneer.load_adapter(tmp_path / "lora")
    assert again.digest == adapter.digest
    assert again.metadata == adapter.metadata
    loaded = PeftModel.from_pretrained(net(), str(tmp_path / "lora")).eval()
    model = net()
    veneer.attach(model, again)
    assert torch.allclose(loaded(X), model.eval()(X), rtol=1e-5, atol=1e-5)


def test_exact_ranks_are_the_smallest_that_the_structure_gives(tmp_path):
    ranks = {}
    for name in ("loha", "loha of high rank", "lokr", "lokr decomposed", "vera", "adalora, pruned"):
        saved(LINEAR[name], tmp_path / name)
        adapter = to_lora(read_other(tmp_path / name, shapes=shapes())).adapter
        ranks[name] = [adapter.modules[path].rank for path in sorted(adapter.modules) if path.startswith("layers.0")]
    assert ranks == {
        "loha": [4, 4, 4],  # k, q, v
        "loha of high rank": [8, 6, 6],  # 9 is more than the layers have
        "lokr": [2, 2, 2],  # k: w1 (3, 2), w2 of rank 1
        "lokr decomposed": [1, 1, 1],
        "vera": [3, 3, 3],
        "adalora, pruned": [2, 4],
    }


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["loha", "loha of high rank", "lokr of full halves", "vera", "adalora"])
def test_a_rank_costs_no_more_than_the_best_approximation(tmp_path, name, rank):
    saved(LINEAR[name], tmp_path)
    other = read_other(tmp_path, shapes=shapes())
    found = to_lora(other, rank=rank)
    for path, update in other.modules.items():
        least = best(update.delta(), rank)
        assert found.errors[path] == pytest.approx(least, rel=1e-5, abs=1e-7)
        assert found.errors[path] == pytest.approx(measured(found, other, path), rel=1e-5, abs=1e-9)
        assert found.adapter.modules[path].rank <= rank
    assert found.worst == max(found.errors.values())


def test_the_error_of_rounding_is_measured_too():
    other = other_of({"q": loha()})
    found = to_lora(other)
    assert 0 < found.errors["q"] < 1e-7
    assert found.errors["q"] == pytest.approx(measured(found, other, "q"), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
def test_values_far_from_one_survive(scale):
    other = other_of({"q": loha(scale=scale)})
    for rank in (None, 2):
        found = to_lora(other, rank=rank)
        assert found.errors["q"] == pytest.approx(measured(found, other, "q"), rel=1e-3)
        assert found.errors["q"] < (1e-7 if rank is None else 0.9)


def test_what_float32_cannot_hold_is_an_error_and_not_an_infinity():
    with pytest.raises(AdapterError, match="q: its update leaves the range of float32"):
        to_lora(other_of({"q": loha(scale=1e20)}))
    huge = loha().parts | {"hada_w1_a": torch.full((20, 2), 1e200, dtype=torch.float64)}
    huge |= {"hada_w2_a": torch.full((20, 2), 1e200, dtype=torch.float64)}
    for rank in (None, 1):
        with pytest.raises(AdapterError, match="q: its"):
            to_lora(other_of({"q": ModuleUpdate(LOHA, huge, 1.0, (20, 15))}), rank=rank)


def test_an_update_of_nothing_has_no_error():
    zeros = {name: torch.zeros_like(one) for name, one in loha().parts.items()}
    blank = other_of({"q": ModuleUpdate(LOHA, zeros, 1.0, (20, 15))})
    for rank in (None, 1):
        assert to_lora(blank, rank=rank).errors == {"q": 0.0}
    kron = {"lokr_w1": torch.zeros(2, 3), "lokr_w2": torch.zeros(4, 5)}
    found = to_lora(other_of({"q": ModuleUpdate(LOKR, kron, 1.0, (8, 15))}, "lokr"))
    assert (found.adapter.modules["q"].rank, found.worst) == (1, 0.0)


def test_the_dense_update_is_not_formed_where_factors_exist():
    """A layer whose update would take 80 GB."""
    generator = torch.Generator().manual_seed(0)
    size, parts = 100_000, {}
    for name, shape in (
        ("vera_lambda_b", (size,)),
        ("vera_lambda_d", (3,)),
        ("vera_A", (3, size)),
        ("vera_B", (size, 3)),
    ):
        parts[name] = torch.randn(*shape, generator=generator)
    kron = {"lokr_w1": torch.randn(250, 250, generator=generator)}
    kron |= {
        "lokr_w2_a": torch.randn(400, 2, generator=generator),
        "lokr_w2_b": torch.randn(2, 400, generator=generator),
    }
    updates = {
        "vera": ModuleUpdate(VERA, parts, 1.0, (size, size)),
        "lokr": ModuleUpdate(LOKR, kron, 1.0, (size, size)),
        "loha": loha(rank=2, outputs=size, inputs=size),
    }
    found = to_lora(other_of(updates), rank=2)
    assert all(0 < error < 1 for error in found.errors.values())


def test_points_of_convolutions_are_matrices_and_kernels_are_refused(tmp_path):
    saved(CONVOLUTIONS["lokr of full halves"], tmp_path, Convolutions)
    with pytest.raises(AdapterError, match="cannot become a LoRA adapter") as caught:
        to_lora(read_other(tmp_path, shapes=shapes(Convolutions)))
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        "one: a convolution with a kernel of 3",
        "two: a convolution with a kernel of 3x2",
    ]
    for method, config in (("lokr", LoKrConfig), ("loha", LoHaConfig)):
        model = saved(
            config(r=9 if method == "lokr" else 2, target_modules=["point1", "point2"]), tmp_path / method, Convolutions
        )
        other = read_other(tmp_path / method, shapes=shapes(Convolutions))
        found, expected = to_lora(other), deltas(model)
        for path, pair in found.adapter.modules.items():
            assert torch.allclose(pair.delta(), expected[path].flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 40_000])
def test_a_rank_must_be_one(rank):
    with pytest.raises(AdapterError, match="rank: expected a whole number"):
        to_lora(other_of({"q": loha()}), rank=rank)


def test_factors_too_large_ask_for_a_rank():
    kron = {"lokr_w1": torch.eye(300), "lokr_w2": torch.eye(200)}
    other = other_of({"q": ModuleUpdate(LOKR, kron, 1.0, (60_000, 60_000))}, "lokr")
    with pytest.raises(AdapterError, match="Give a lower rank"):
        to_lora(other)
    assert to_lora(other, rank=2).worst == pytest.approx((1 - 2 / 60_000) ** 0.5)
    wide = loha(rank=150, outputs=20_000, inputs=20_000)
    with pytest.raises(AdapterError, match="too many to decompose"):
        to_lora(other_of({"q": wide}), rank=1)


def test_metadata_and_what_trained_whole_go_along(tmp_path):
    config = VeraConfig(r=2, target_modules=["layers.0.q"], bias="vera_only", modules_to_save=["score"])
    saved(config, tmp_path)
    other = read_other(tmp_path)
    adapter = to_lora(other).adapter
    assert adapter.metadata == other.metadata
    assert set(adapter.trained) == {"layers.0.q.bias", "score.weight", "score.bias"}
    assert (adapter.config.bias, adapter.config.modules_to_save) == ("lora_only", ("score",))


def dora_pair(form, seed, rank=2):
    """A pair with a magnitude, and a weight that it fits."""
    pair = pair_of(form, rank, seed, 0.3)
    weight = torch.randn(pair.delta().shape, generator=torch.Generator().manual_seed(seed + 50))
    out_features = pair.sizes[0]
    return replace(pair, magnitude=torch.linspace(0.5, 2.0, out_features)), weight


def dora_update(pair, weight):
    """What a pair with a magnitude adds to a weight, by the formula."""
    total = weight.double() + pair.delta()
    axes = row_axes(pair.form, total.ndim)
    shape = [1 if axis in axes else size for axis, size in enumerate(total.shape)]
    norm = total.square().sum(axes, keepdim=True).sqrt()
    return pair.magnitude.double().reshape(shape) * total / norm - weight.double()


@pytest.mark.parametrize("form", ["linear", "transposed", "embedding", "conv", "conv_across"])
@pytest.mark.parametrize("rank", [2, 18])
def test_dora_becomes_the_nearest_lora(form, rank):
    pair, weight = dora_pair(form, 1)
    adapter = Adapter({"at": pair, "plain": pair_of("linear", 2, 3)}, LoRAConfig(rank=2, use_dora=True))
    found = dora_to_lora(adapter, {"at": weight}.__getitem__, rank=rank)
    expected, new = dora_update(pair, weight), found.adapter.modules["at"]
    measured = (torch.linalg.vector_norm(new.delta() - expected) / torch.linalg.vector_norm(expected)).item()
    assert (new.magnitude, new.form, found.adapter.config.use_dora) == (None, form, False)
    assert found.errors["at"] == pytest.approx(measured, rel=1e-5, abs=2e-7)
    if form == "linear":
        assert measured == pytest.approx(best(expected, rank), rel=1e-5, abs=2e-7)
    if rank == 18:  # all there is
        assert measured < 1e-6
    assert found.errors["plain"] == 0.0
    assert found.adapter.modules["plain"].delta().equal(adapter.modules["plain"].delta())


def test_a_dora_model_and_its_lora_give_the_same_outputs(tiny, tmp_path):
    model = tiny()
    weights = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    veneer.attach(model, LoRAConfig(rank=2, use_dora=True, target_modules=["q_proj", "down_proj"]), seed=0)
    fresh = veneer.detach(model)
    trained = {
        path: replace(pair, lora_B=torch.randn_like(pair.lora_B) * 0.1, magnitude=pair.magnitude * 1.1)
        for path, pair in fresh.modules.items()
    }
    dora, ids = replace(fresh, modules=trained), torch.arange(10).reshape(1, 10)
    veneer.attach(model, dora)
    expected = model(ids).logits
    veneer.detach(model)
    found = dora_to_lora(dora, weights.__getitem__, rank=48)
    veneer.save_adapter(found.adapter, tmp_path / "lora")
    veneer.attach(model, veneer.load_adapter(tmp_path / "lora"))
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert found.worst < 1e-5


def test_dora_that_cannot_be_converted_says_why():
    pair, weight = dora_pair("linear", 1)
    adapter = Adapter({"a": pair, "b": pair}, LoRAConfig(rank=2, use_dora=True))
    with pytest.raises(AdapterError, match="cannot become a LoRA adapter") as caught:
        dora_to_lora(adapter, lambda path: weight.T, rank=2)
    assert len(caught.value.problems) == 2
    assert "expected a weight of shape (8, 6) from the base, got (6, 8)" in caught.value.problems[0]
    with pytest.raises(AdapterError, match="it is a LoRA adapter as it is"):
        dora_to_lora(Adapter({"a": pair_of("linear", 1, 0)}, LoRAConfig()), lambda path: weight, rank=2)
    with pytest.raises(AdapterError, match="rank: expected a whole number"):
        dora_to_lora(adapter, lambda path: weight, rank=0)
    stack = replace(pair_of("experts", 2, 0), magnitude=torch.ones(8))
    with pytest.raises(AdapterError, match="form 'experts' is not converted"):
        dora_to_lora(Adapter({"a": stack}, LoRAConfig()), lambda path: torch.ones(3, 8, 6), rank=2)
