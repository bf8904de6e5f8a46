"""Merging: the float64 sum rounded once; every kind of layer; ties, quantised layers, refusals; all of it undone."""

import copy
import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.storage.foreign import Int8Tensor, int8_tensor_linear, linear_4bit, linear_8bit
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, AttachError, BaseModelError, ConfigError, TargetError
from veneer.nn.attach import attach, attachment_of, detach
from veneer.nn.conv import outputs_first
from veneer.storage.int8 import quantise_int8
from veneer.storage.nf4 import quantise_nf4
from veneer.storage.registry import read_weight, write_weight
from veneer.tools.merge import merge, unmerge
from veneer.tools.merge_probe import TOLERANCES, compare
from veneer.tools.merge_weights import round_once

IDS = torch.arange(40).reshape(2, 20) * 7 % 259


class Int8(Int8Tensor):
    """As torchao's, which says by torch's own protocol what it wraps: the fingerprint of a model samples that."""

    def __tensor_flatten__(self):
        return ["qdata", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Int8(inner["qdata"], inner["scale"])


class Other(Int8):
    """A kind that can be read and not written."""


Int8.__name__, Int8.__module__ = "Int8Tensor", Int8Tensor.__module__
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(model, seed=0, size=0.1, **config):
    """A trained-looking adapter for a model, which stays as it was."""
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 4, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in attachment_of(model).parameters().values():
            one.add_(torch.randn(one.shape, generator=generator) * size)
    return detach(model)


def pair_of(A, B, scaling=1.0, **changes):
    return LowRank(torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32), scaling, **changes)


def adapter_of(**modules):
    return Adapter({path.replace("__", "."): pair for path, pair in modules.items()}, LoRAConfig(rank=1))


def state(model):
    """Everything that unmerge must bring back: numbers by bits, objects, flags, modes."""
    return (
        {name: (id(one), one.dtype, one.requires_grad, bits(one)) for name, one in named(model)},
        [(path, id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)],
        veneer.fingerprint(model),
        set(vars(model)),
    )


def named(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def bits(tensor):
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:  # torchao's
        return bits(tensor.qdata), bits(tensor.scale)
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def attached(model, adapter, run):
    attach(model, adapter, any_base=True)
    try:
        with torch.no_grad():
            return run(model)
    finally:
        detach(model)


# Rounding.


def nearest_bfloat16(value: float) -> float:
    """The nearest bfloat16, ties to even, in exact arithmetic."""
    if value == 0 or not np.isfinite(value):
        return value
    exact = Fraction(value)
    exponent = max(np.frexp(value)[1] - 1, -126)
    unit = Fraction(2) ** (int(exponent) - 7)
    rounded = round(exact / unit) * unit  # Python rounds halves to even
    return float(np.copysign(np.inf, value)) if abs(rounded) >= 2**128 else float(rounded)


@given(st.lists(st.floats(width=64, allow_nan=False), min_size=1))
def test_rounding_to_16_bits_happens_once(values):
    wide = torch.tensor(values, dtype=torch.float64)
    assert round_once(wide, torch.bfloat16).tolist() == [nearest_bfloat16(one) for one in values]
    with np.errstate(over="ignore"):
        assert round_once(wide, torch.float16).tolist() == np.array(values).astype(np.float16).tolist()
    assert torch.equal(round_once(wide, torch.float32), wide.float())


@given(st.integers(0, 2**15 - 1), st.integers(9, 40), st.sampled_from([-1, 1]))
def test_just_beside_the_middle_of_two_values(code, below, sign):
    """Where rounding in two steps goes wrong: the float32 between is the middle itself."""
    low = torch.tensor([code], dtype=torch.int16).view(torch.bfloat16)
    high = torch.tensor([min(code + 1, 2**15 - 1)], dtype=torch.int16).view(torch.bfloat16)
    if not torch.isfinite(low + high):
        return
    middle = (low.double() + high.double()).item() / 2
    value = middle * (1 + sign * 2.0**-below)
    assert round_once(torch.tensor([value], dtype=torch.float64), torch.bfloat16).item() == nearest_bfloat16(value)


def test_nan_and_infinity_stay():
    values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
    for dtype in DTYPES:
        torch.testing.assert_close(round_once(values, dtype), values.to(dtype), equal_nan=True)


# Every kind of layer.


def conv(kind, *sizes, **options):
    return lambda: nn.Sequential(kind(*sizes, **options))


class Scaled(nn.Embedding):
    """As transformers' scaled tables: the scale is no part of the weight."""

    def __init__(self):
        super().__init__(11, 6)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.inner = self.attention.kdim

    def forward(self, x):
        keys = x[..., : self.inner]
        return self.attention(x, keys, keys, need_weights=False)[0]


class Matrix(nn.Module):
    """A matrix that no layer holds."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return x @ self.table.T


X = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 8, 8)
KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 5)), X, {"target_modules": ["0"]}),
    "parts": (lambda: nn.Sequential(nn.Linear(8, 6)), X, {"target_modules": ["0"], "parts": {"0": [(0, 2), (4, 6)]}}),
    "compensated": (lambda: nn.Sequential(nn.Linear(8, 6)), X, {"target_modules": ["0"], "init": "pissa"}),
    "transposed": (lambda: nn.Sequential(Conv1D(5, 8)), X, {"target_modules": ["0"]}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=2)), IDS % 11, {"target_modules": ["0"]}),
    "scaled embedding": (lambda: nn.Sequential(Scaled()), IDS % 11, {"target_modules": ["0"]}),
    "conv": (conv(nn.Conv1d, 8, 6, 3, padding=1), X, {"target_modules": ["0"]}),
    "grouped conv": (
        conv(nn.Conv2d, 4, 6, (3, 2), groups=2, dilation=2, padding=2, padding_mode="circular"),
        X.reshape(1, 4, 4, 8),
        {"target_modules": ["0"]},
    ),
    "conv3d": (conv(nn.Conv3d, 2, 4, (1, 1, 3)), X.reshape(1, 2, 4, 4, 4), {"target_modules": ["0"]}),
    "transposed conv": (
        conv(nn.ConvTranspose2d, 4, 6, 3, groups=2, stride=2, output_padding=1),
        X.reshape(1, 4, 4, 8),
        {"target_modules": ["0"]},
    ),
    "attention": (Attention, X, {"target_modules": ["attention"]}),
    "attention apart": (lambda: Attention(kdim=4, vdim=4), X, {"target_modules": ["attention"]}),
    "parameter": (
        lambda: nn.Sequential(Matrix()),
        X[..., :6],
        {"target_modules": [], "target_parameters": ["0.table"]},
    ),
}
"""Name: a model, its input, what to adapt."""


def oracle(model, adapter):
    """The merged weights in float64, from the forms' own deltas and the norms over the inputs."""
    found = {}
    for path, pair in adapter.modules.items():
        name = path if path in dict(model.named_parameters()) else f"{path}.weight"
        module = model.get_submodule(path) if name != path else None
        total = model.get_parameter(name).double() + pair.delta()
        if pair.magnitude is not None:
            view = total
            if pair.form == "conv_transpose":
                view = outputs_first(total, module.groups)
            elif pair.form in ("transposed", "embedding"):
                view = total.T
            ratio = pair.magnitude.double() / torch.linalg.vector_norm(view.flatten(1), dim=1)
            view = view * ratio.view(-1, *(1,) * (view.ndim - 1))
            if pair.form == "conv_transpose":
                view = view.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
            total = view.T if pair.form in ("transposed", "embedding") else view
        found[name] = total
    return found


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_the_float64_result_rounded_once(name, dtype, dora):
    make, x, config = KINDS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    adapter = filled(model, use_dora=dora, **config)
    before, expected = state(model), oracle(model, adapter)
    run = lambda one: one(x.to(dtype) if x.is_floating_point() else x)  # noqa: E731
    record = merge(model, adapter, probe=run)
    for path, exact in expected.items():
        assert torch.equal(model.get_parameter(path), round_once(exact, dtype)), path
    assert record.probe.effect > 1e-3
    assert record.probe.relative_difference <= record.probe.tolerance
    if dtype == torch.float32:
        assert record.probe.relative_difference < 1e-5
    unmerge(model, record)
    assert state(model) == before


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_merged_one_by_one(transposed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 259}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).requires_grad_(False).eval()
    experts = model.model.layers[0].mlp.experts
    if transposed:
        experts.is_transposed = True
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(experts.get_parameter(name).transpose(1, 2).contiguous()))
    adapter = filled(model, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    before = state(model)
    deltas = {path: pair.delta() for path, pair in adapter.modules.items()}
    expected = {
        path: (model.get_parameter(path).double() + (delta.transpose(1, 2) if transposed else delta)).float()
        for path, delta in deltas.items()
    }
    # The eager experts of transformers read either layout only where the decorator was told of it.
    record = merge(model, adapter, probe=(lambda one: torch.zeros(1)) if transposed else None)
    for path, exact in expected.items():
        assert torch.equal(model.get_parameter(path), exact)
    assert len(record.modules) == 2
    assert transposed or record.probe.relative_difference < 1e-5 < record.probe.effect
    unmerge(model, record)
    assert state(model) == before


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.sampled_from(DTYPES), st.integers(0, 999), st.booleans()
)
def test_unmerge_is_bit_exact(inputs, outputs, rank, dtype, seed, dora):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(outputs, inputs, generator=generator))
    magnitude = torch.rand(outputs, generator=generator) if dora else None
    factors = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    pair = LowRank(*factors, 0.75, magnitude=magnitude)
    before, expected = state(model), oracle(model, adapter_of(**{"0": pair}))
    record = merge(model, adapter_of(**{"0": pair}))
    assert torch.equal(model[0].weight, round_once(expected["0.weight"], dtype))
    unmerge(model, record)
    assert state(model) == before


def test_a_large_weight_is_added_in_pieces_and_is_the_same(monkeypatch):
    model = nn.Sequential(nn.Embedding(40, 6), nn.Linear(6, 50))
    adapter = filled(model, target_modules=["0", "1"], use_dora=True)
    expected = {name: exact.float() for name, exact in oracle(model, adapter).items()}
    monkeypatch.setattr("veneer.tools.merge_weights.CHUNK", 100)
    merge(model, adapter)
    for name, exact in expected.items():
        assert torch.equal(model.get_parameter(name), exact)


def test_what_trained_whole_is_copied_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(torch.bfloat16)
    adapter = filled(model, target_modules=["0"], bias="lora_only", modules_to_save=["2"])
    assert set(adapter.trained) == {"0.bias", "2.weight", "2.bias"}
    before = state(model)
    record = merge(model, adapter, probe=lambda one: one(torch.ones(1, 4, dtype=torch.bfloat16)))
    for path, value in adapter.trained.items():
        assert torch.equal(model.get_parameter(path), value.to(torch.bfloat16))
    assert record.trained == ("0.bias", "2.bias", "2.weight")
    unmerge(model, record)
    assert state(model) == before


# The record.


def test_the_record_says_what_was_lost():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    # 1/512 is a quarter of the last place of 1; the others are farther below.
    record = merge(model, adapter_of(**{"0": pair_of([[1, 0]], [[1 / 512], [1.0]])}))
    one = record.modules[0]
    assert model[0].weight.tolist() == [[1.0, 2.0], [5.0, 8.0]]
    assert one.max_change == 1.0
    assert one.relative_change == pytest.approx((1 + 2**-18) ** 0.5 / 85**0.5)
    assert one.rounding_loss == pytest.approx(2**-9, rel=1e-4)
    assert one.unchanged == 0.5
    assert (one.stored, one.became, one.kind) == ("bfloat16", "bfloat16", "linear")
    assert record.probe.probed is False
    assert "give `probe`" in record.probe.reason
    said = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert said["adapter"] == record.adapter
    assert not {"kept", "written"} & said.keys()


def test_a_zero_weight_has_no_relative_change():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    assert merge(model, adapter_of(**{"0": pair_of([[1, 0]], [[1], [1]])})).modules[0].relative_change is None


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_an_adapter_that_was_never_trained_changes_nothing_and_is_known(config):
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    attach(model, LoRAConfig(rank=2, target_modules=["0"], **config))
    adapter, weight = detach(model), model[0].weight.clone()
    record = merge(model, adapter)
    assert record.never_trained
    assert torch.allclose(model[0].weight, weight, atol=1e-6)
    unmerge(model, record)
    assert bits(model[0].weight) == bits(weight)
    trained = filled(model, target_modules=["0"], size=1e-3, **config)
    assert not merge(model, trained).never_trained


# Refusals, each of which leaves the model as it was.


def refused(model, adapter, error, match, **options):
    before = state(model)
    with pytest.raises(error, match=match):
        merge(model, adapter, **options)
    assert state(model) == before


def test_an_attached_model_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    adapter = filled(model, target_modules=["0"])
    attach(model, adapter)
    refused(model, adapter, AttachError, "has an adapter attached")
    detach(model)
    record = merge(model, adapter)
    attach(model, LoRAConfig(rank=1, target_modules=["0"]))
    with pytest.raises(AttachError, match="has an adapter attached"):
        unmerge(model, record)


def test_another_base_is_refused_unless_asked_for():
    model = nn.Sequential(nn.Linear(3, 3))
    adapter = filled(model, target_modules=["0"])
    with torch.no_grad():
        model[0].bias += 1
    refused(model, adapter, AdapterError, "made for other weights")
    assert merge(model, adapter, any_base=True).adapter == adapter.digest


def test_what_does_not_fit_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    refused(model, adapter_of(**{"1": pair_of([[1, 1, 1]], [[1]])}), AdapterError, "no such module")
    refused(model, adapter_of(**{"0": pair_of([[1, 1]], [[1]])}), AdapterError, r"\(out, in\) = \(3, 3\)")
    whole = Adapter({}, LoRAConfig(), {"0.bias": torch.zeros(4)})
    refused(model, whole, AdapterError, "the model's shape is")


def test_settings_are_words():
    model, adapter = nn.Sequential(nn.Linear(2, 1)), adapter_of(**{"0": pair_of([[1, 1]], [[1]])})
    refused(model, adapter, ConfigError, "tied must be one of refuse, untie", tied="maybe")
    refused(model, adapter, ConfigError, "quantised must be one of", quantised="yes")
    refused(model, adapter, ConfigError, "no adapted layer is quantised", full_weights={})
    refused(model, adapter, ConfigError, "must return a tensor, got a float", probe=lambda one: 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    model = nn.Sequential(nn.Linear(2, 2))
    refused(model, adapter_of(**{"0": pair_of([[1, bad]], [[1], [1]])}), AdapterError, "0.lora_A: 1 of 2 values")
    refused(model, adapter_of(**{"0": pair_of([[1, 1]], [[1], [1]], bad)}), AdapterError, "its scaling is")
    whole = Adapter({}, LoRAConfig(), {"0.bias": torch.tensor([0.0, bad])})
    refused(model, whole, AdapterError, "0.bias: 1 of 2 values")


def test_a_merged_weight_that_float16_cannot_hold_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    small, large = pair_of([[1, 1]], [[1], [1]]), pair_of([[1, 1]], [[1], [70_000]])
    refused(model, adapter_of(**{"0": small, "1": large}), AdapterError, "^1: the merged weight reaches (70000|69999)")
    whole = Adapter({"0": small}, LoRAConfig(), {"1.bias": torch.tensor([0.0, 70_000.0])})
    refused(model, whole, AdapterError, "1.bias: what the adapter trained leaves the range")
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    refused(model, adapter_of(**{"0": small, "1": small}), AdapterError, "^1: the merged weight is not finite")


def test_a_layer_that_does_not_use_its_weight_is_found_by_the_probe():
    """A forward that a merge of the weight has no part in: what the adapter does is lost."""

    class Cached(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("copy", self.weight.detach().clone())

        def forward(self, x):
            return x @ self.copy.T

    model = nn.Sequential(Cached(3, 3))
    adapter = filled(model, target_modules=["0"], size=1.0)
    refused(
        model, adapter, AdapterError, "does not compute what the adapter did", probe=lambda one: one(torch.ones(1, 3))
    )
    assert merge(model, adapter).probe.probed is False


def test_outputs_that_are_not_finite_are_refused():
    one, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    for outputs in ((one, bad, one), (one, one, bad)):
        with pytest.raises(AdapterError, match="not finite"):
            compare(*outputs, None)
    assert compare(0 * one, 0 * one, 0 * one, 1e-3).relative_difference == 0
    with pytest.raises(AdapterError, match="does not compute"):
        compare(0 * one, 0 * one, one, 1e-3)


def test_a_weight_made_of_others_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    adapter = adapter_of(**{"0": pair_of([[1, 1, 1]], [[1], [1], [1]])})
    before = bits(model[0].weight)
    with pytest.raises(BaseModelError, match=r"0\.weight: is no parameter"):
        merge(model, adapter)
    assert bits(model[0].weight) == before


def test_a_model_without_values_is_refused():
    model = nn.Sequential(nn.Linear(3, 3, device="meta"))
    adapter = adapter_of(**{"0": pair_of([[1, 1, 1]], [[1], [1], [1]])})
    with pytest.raises(BaseModelError, match=r"0\.weight: is on the meta device"):
        merge(model, adapter, any_base=True)


# Twice, and out of turn.


def test_merging_twice_is_refused_or_recorded():
    model = nn.Sequential(nn.Linear(3, 3))
    one, two = filled(model, target_modules=["0"]), filled(model, seed=1, target_modules=["0"])
    before = state(model)
    first = merge(model, one)
    middle = state(model)
    for again in (one, two):
        refused(model, again, AttachError, "merged adapters already")
    refused(model, two, AdapterError, "made for other weights", on_top=True)
    second = merge(model, two, on_top=True, any_base=True)
    assert (first.over, second.over) == ((), (one.digest,))
    with pytest.raises(AttachError, match="lies under others"):
        unmerge(model, first)
    unmerge(model, second)
    assert state(model) == middle
    with pytest.raises(AttachError, match="is not merged into this model"):
        unmerge(model, second)
    unmerge(model, first)
    assert state(model) == before
    with pytest.raises(AttachError, match="merged: none"):
        unmerge(model, first)


def test_changed_weights_are_not_thrown_away_unasked():
    model = nn.Sequential(nn.Linear(3, 3))
    adapter, before = filled(model, target_modules=["0"]), model[0].weight.clone()
    record = merge(model, adapter)
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    merged = bits(model[0].weight)
    with pytest.raises(AttachError, match="no longer what the merge wrote"):
        unmerge(model, record)
    assert bits(model[0].weight) == merged
    unmerge(model, record, force=True)
    assert bits(model[0].weight) == bits(before)


def test_a_copy_of_a_merged_model_can_be_unmerged_too():
    model = nn.Sequential(nn.Linear(3, 3))
    before = bits(model[0].weight)
    record = merge(model, filled(model, target_modules=["0"]))
    other = copy.deepcopy(model)
    unmerge(other, record)
    assert bits(other[0].weight) == before != bits(model[0].weight)


def test_a_copy_is_tied_again_by_itself(tiny):
    model = tiny()
    adapter, before = filled(model, target_modules=["lm_head", "q_proj"]), state(model)
    numbers = {name: bits(one) for name, one in named(model)}
    record = merge(model, adapter, tied="untie")
    other, merged = copy.deepcopy(model), state(model)
    unmerge(other, record)
    assert {name: bits(one) for name, one in named(other)} == numbers
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.config.tie_word_embeddings is True
    mine, copied = ({id(one) for one in which.parameters()} for which in (model, other))
    assert not mine & copied
    assert (state(model), model.config.tie_word_embeddings) == (merged, False)
    unmerge(model, record)
    assert state(model) == before


def test_a_copy_of_what_shared_memory_gets_its_numbers_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another object on the same memory
    before = bits(model[0].weight)
    record = merge(model, filled(model, target_modules=["0"]), tied="untie")
    other = copy.deepcopy(model)
    unmerge(other, record)
    assert bits(other[0].weight) == bits(other[1].weight) == before != bits(model[0].weight)


def test_modes_and_flags_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    adapter, before = filled(model, target_modules=["0", "2"]), state(model)
    record = merge(model, adapter, probe=lambda one: one(torch.ones(1, 3)))
    flags = [(one.requires_grad, one.grad_fn) for one in model.parameters()]
    assert flags == [(False, None), (True, None), (True, None), (True, None)]
    unmerge(model, record)
    assert state(model) == before


# A language model, and tied heads.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_language_model_is_probed_by_itself(tiny, dtype):
    model = tiny().to(dtype)
    adapter = filled(model, target_modules="all-linear")
    before = state(model)
    expected = attached(model, adapter, lambda one: one(input_ids=IDS).logits)
    record = merge(model, adapter)
    with torch.no_grad():
        merged = model(input_ids=IDS).logits
    assert record.probe.probed
    assert record.probe.effect > 1e-2
    assert (merged - expected).abs().max() <= record.probe.tolerance * expected.abs().max()
    assert record.probe.tolerance == TOLERANCES[dtype]
    unmerge(model, record)
    assert state(model) == before


def test_an_encoder_with_a_decoder_is_not_probed():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    record = merge(model, filled(model, target_modules=["q"]))
    assert "an encoder with a decoder" in record.probe.reason
    unmerge(model, record)
    # The table has more places than the head: no saved configuration says that one of them is apart.
    refused(model, filled(model, target_modules=["lm_head"]), TargetError, "only a head and its table", tied="untie")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "both", "saved"])
def test_a_tied_head_is_refused_or_untied_for_good(target, tiny, tmp_path):
    model = tiny()
    modules = {"both": ["lm_head", "embed_tokens"], "saved": []}.get(target, [target])
    if target == "saved":
        value = torch.randn(259, 32, generator=torch.Generator().manual_seed(0))
        adapter = Adapter({}, LoRAConfig(), {"lm_head.weight": value})
    else:
        adapter = filled(model, target_modules=[*modules, "q_proj"])
    before, tied = state(model), model.config.tie_word_embeddings
    refused(model, adapter, TargetError, r"lm_head\.weight.*same parameter as|same parameter as.*lm_head\.weight")
    record = merge(model, adapter, tied="untie")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert len(record.untied) == 1
    assert record.probe.relative_difference < 1e-5 < record.probe.relative_effect
    with torch.no_grad():
        merged = model(input_ids=IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(loaded.get_input_embeddings().weight, model.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, merged)
    unmerge(model, record)
    assert state(model) == before
    assert model.config.tie_word_embeddings == tied
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_failed_merge_ties_again(tiny):
    model = tiny().half()
    pair = LowRank(torch.ones(1, 32), torch.full((259, 1), 1e5), 1.0)
    refused(
        model,
        adapter_of(lm_head=pair),
        AdapterError,
        "lm_head: the merged weight reaches",
        tied="untie",
        probe=lambda one: torch.zeros(1),
    )
    assert model.config.tie_word_embeddings is True


def test_memory_that_two_parameters_share_is_a_tie():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    adapter = filled(model, target_modules=["1"])
    before = state(model)
    refused(model, adapter, TargetError, r"1\.weight is the same parameter as 0\.weight")
    record = merge(model, adapter, tied="untie")
    assert record.untied == ("0.weight",)
    assert bits(model[0].weight) == before[0]["0.weight"][3] != bits(model[1].weight)
    unmerge(model, record)
    assert state(model) == before
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


def test_pieces_of_one_storage_are_no_tie():
    storage = torch.randn(18)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for place, layer in enumerate(model):
        layer.weight = nn.Parameter(storage[9 * place : 9 * place + 9].view(3, 3))
    record = merge(model, filled(model, target_modules=["1"]))
    assert record.untied == ()


def test_a_module_at_two_places_cannot_be_untied():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    whole = Adapter({}, LoRAConfig(), {"a.weight": torch.zeros(3, 3)})
    refused(model, whole, TargetError, "one module stands at several places", tied="untie")


# Quantised layers.


def quantised_model(make, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(make(), nn.LayerNorm(64), nn.Linear(64, 8)).requires_grad_(False).to(dtype)


STORED = {
    "int8": lambda: quantise_int8(nn.Linear(64, 64)),
    "nf4": lambda: quantise_nf4(nn.Linear(64, 64)),
    "8bit": lambda: linear_8bit(64, 64),
    "8bit used": lambda: linear_8bit(64, 64, used=True),
    "4bit": lambda: linear_4bit(64, 64),
    "4bit nested": lambda: linear_4bit(64, 64, nested=True),
    "torchao": lambda: int8_tensor_linear(64, 64, kind=Int8),
}
OWN = ("int8", "nf4")


def stored_bits(module):
    """All that a quantised layer holds, wherever it holds it."""
    weight = module._parameters.get("weight")
    holders = [vars(weight)] if weight is not None else []
    holders += [
        vars(one) for holder in list(holders) for one in holder.values() if type(one).__name__ == "SimpleNamespace"
    ]
    holders += [
        vars(one) for holder in list(holders) for one in holder.values() if type(one).__name__ == "SimpleNamespace"
    ]
    if "state" in vars(module):
        holders.append(vars(module.state))
    tensors = [one for holder in holders for one in holder.values() if type(one) is torch.Tensor]
    return [bits(one) for one in (*module.parameters(), *module.buffers(), *tensors)]


def quantised_adapter(seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator) * 0.1
    return Adapter({"0": LowRank(*factors, 0.5)}, LoRAConfig(rank=2), {"0.bias": torch.linspace(-1, 1, 64)})


@pytest.mark.parametrize("name", STORED)
def test_a_quantised_layer_needs_a_choice(name):
    model = quantised_model(STORED[name])
    before = stored_bits(model[0])
    with pytest.raises(
        ConfigError, match=r"say which base is meant: quantised='requantise' .*'dequantise'.*full_weights"
    ):
        merge(model, quantised_adapter())
    assert stored_bits(model[0]) == before


@pytest.mark.parametrize("name", STORED)
def test_requantised(name):
    model = quantised_model(STORED[name])
    layer, adapter = model[0], quantised_adapter()
    before, weight = stored_bits(layer), read_weight(layer).double()
    tree = [(path, id(one)) for path, one in model.named_modules()]
    probe = (lambda one: one(X.reshape(2, 64))) if name in OWN else None
    record = merge(model, adapter, quantised="requantise", probe=probe)
    delta, change = adapter.modules["0"].delta(), read_weight(layer).double() - weight
    expected = (torch.linalg.norm(change - delta) / torch.linalg.norm(delta)).item()
    one = record.modules[0]
    assert one.rounding_loss == pytest.approx(expected, rel=1e-3)
    assert 0 < one.rounding_loss < 1
    assert one.stored == one.became
    assert one.unchanged == pytest.approx((change == 0).double().mean().item(), abs=1e-3)
    assert one.relative_change == pytest.approx((torch.linalg.norm(delta) / torch.linalg.norm(weight)).item())
    assert record.probe.tolerance is None
    assert record.replaced == {}
    unmerge(model, record)
    assert stored_bits(layer) == before
    assert [(path, id(one)) for path, one in model.named_modules()] == tree
    assert torch.equal(read_weight(layer).double(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_dequantised(name, dtype):
    if dtype == torch.bfloat16 and name not in OWN:
        pytest.skip("the stand-ins for other packages' layers cannot be cast to bfloat16")
    model = quantised_model(STORED[name], dtype)
    layer, adapter = model[0], quantised_adapter()
    before, state_of_random = stored_bits(layer), torch.get_rng_state()
    exact = read_weight(layer).double() + adapter.modules["0"].delta()
    probe = (lambda one: one(X.reshape(2, 64).to(dtype))) if name in OWN else None
    record = merge(model, adapter, quantised="dequantise", probe=probe)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, round_once(exact, dtype))
    assert torch.equal(model[0].bias, adapter.trained["0.bias"].to(dtype))
    assert not any(one.requires_grad for one in model.parameters())
    assert model[0].training == layer.training
    assert record.replaced == {"0": str(dtype).removeprefix("torch.")}
    assert torch.equal(torch.get_rng_state(), state_of_random)
    unmerge(model, record)
    assert model[0] is layer
    assert stored_bits(layer) == before


def test_a_bitsandbytes_layer_that_was_used_since_is_put_back():
    """Its first forward moves the scales to another place."""
    model = quantised_model(STORED["8bit"])
    layer = model[0]
    weight = read_weight(layer)
    record = merge(model, quantised_adapter(), quantised="requantise")
    layer.state.SCB, layer.weight.SCB = layer.weight.SCB, None
    unmerge(model, record)
    assert torch.equal(read_weight(layer), weight)


@pytest.mark.parametrize("given_as", ["mapping", "function"])
def test_full_precision_weights_can_be_meant(given_as):
    torch.manual_seed(0)
    full = nn.Linear(64, 64)
    model = nn.Sequential(quantise_nf4(full), nn.Linear(64, 2)).requires_grad_(False)
    adapter, layer = quantised_adapter(), model[0]
    weights = {"0.weight": full.weight}
    record = merge(
        model,
        adapter,
        full_weights=weights if given_as == "mapping" else weights.__getitem__,
        probe=lambda one: one(X.reshape(2, 64)),
    )
    expected = full.weight.double() + adapter.modules["0"].delta()
    assert torch.equal(model[0].weight, expected.float())
    assert record.probe.difference > 1e-3  # that is the quantisation, and no error
    assert record.probe.tolerance is None
    model.eval()
    unmerge(model, record)
    assert model[0] is layer
    assert not layer.training  # what the model was told meanwhile holds for the layer that was away, too


def test_a_requantised_model_may_be_cast_in_between():
    """Casts change floating tensors only; codes and scales are bits."""
    model = quantised_model(STORED["nf4"])
    before = stored_bits(model[0])
    pair = quantised_adapter().modules["0"]
    record = merge(model, adapter_of(**{"0": pair}), quantised="requantise")
    model.to(torch.bfloat16).to(torch.float32)
    unmerge(model, record)
    assert stored_bits(model[0])[1:] == before[1:]  # all but the bias, which the casts rounded


def test_full_precision_weights_must_fit():
    model = quantised_model(STORED["int8"])
    adapter = quantised_adapter()
    for weights, match in (({"1.weight": 0}, "no such tensor"), ({"0.weight": torch.ones(3, 3)}, r"\(64, 64\)")):
        refused(model, adapter, ConfigError, match, full_weights=weights)
    refused(model, adapter, ConfigError, "do not fit", full_weights=lambda path: torch.ones(3, 3))
    weights = {"0.weight": torch.ones(64, 64)}
    refused(model, adapter, ConfigError, "make plain layers", full_weights=weights, quantised="requantise")


def test_quantised_layers_with_hooks_are_not_replaced():
    model = quantised_model(STORED["int8"])
    model[0].register_forward_hook(lambda *_: None)
    refused(model, quantised_adapter(), ConfigError, "0: has hooks", quantised="dequantise")
    assert merge(model, quantised_adapter(), quantised="requantise").replaced == {}


def test_a_stored_form_that_cannot_be_written_is_refused_and_all_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), int8_tensor_linear(64, 64, kind=Other)).requires_grad_(False)
    pair = quantised_adapter().modules["0"]
    before = bits(model[0].weight)
    with pytest.raises(ConfigError, match="cannot be written"):
        merge(model, adapter_of(**{"0": pair, "1": pair}), quantised="requantise")
    assert bits(model[0].weight) == before


def test_a_quantised_weight_with_another_place_is_refused():
    model = nn.Sequential(linear_8bit(64, 64), linear_8bit(64, 64))
    model[1].weight = model[0].weight
    pair = quantised_adapter().modules["0"]
    with pytest.raises(TargetError, match=r"0\.weight is the same parameter as 1\.weight, and quantised"):
        merge(model, adapter_of(**{"0": pair}), quantised="dequantise", tied="untie")


def test_token_rows_are_merged_into_the_table_and_a_tied_head(tiny):
    model = tiny()
    ids = torch.tensor([[5, 9, 7, 5]])
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj"], token_rows={"embed_tokens": [5, 200]}))
    with torch.no_grad():
        for parameter in attachment_of(model).parameters().values():
            parameter.add_(0.1)
        expected = model(input_ids=ids).logits
    adapter = detach(model)
    before = model.model.embed_tokens.weight.clone()
    record = merge(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert record.trained == ("model.embed_tokens.weight",)
    unmerge(model, record)
    assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("config", [{"invocation_tokens": [1, 2]}])
def test_what_no_weight_can_do_is_refused(config, tiny):
    model = tiny()
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj"], **config))
    adapter = detach(model)
    with pytest.raises(AdapterError, match="acts from its invocation on only"):
        merge(model, adapter)


@pytest.mark.parametrize("quantised", ["dequantise", "requantise"])
@pytest.mark.parametrize("name", OWN)
def test_a_copy_gets_copies_of_the_layers_that_were_replaced(name, quantised):
    model = quantised_model(STORED[name])
    layer, before = model[0], stored_bits(model[0])
    record = merge(model, quantised_adapter(), quantised=quantised, probe=lambda one: one(X.reshape(2, 64)))
    copies, merged = [copy.deepcopy(model) for _ in range(3)], read_weight(model[0])
    unmerge(copies[0], record)
    assert type(copies[0][0]) is type(layer)
    assert copies[0][0] is not layer
    assert stored_bits(copies[0][0]) == before
    assert torch.equal(read_weight(model[0]), merged)
    unmerge(model, record)
    assert model[0] is layer
    assert stored_bits(layer) == before
    # The original may have served for something else since; then it cannot be copied any more.
    write_weight(layer, -read_weight(layer))
    if quantised == "dequantise":
        with pytest.raises(AttachError, match="the layer that the merge replaced was changed since"):
            unmerge(copies[1], record)
    copies[2][0] = nn.Identity()
    with pytest.raises(AttachError, match=r"another module stands here|the numbers are others"):
        unmerge(copies[2], record)
