"""nn.MultiheadAttention written out for training equals torch's own with the sums of weight and update."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.config import LoRAConfig
from veneer.nn.attach import attach, detach

SIZE, HEADS, BATCH, QUERIES, KEYS = 8, 4, 3, 5, 6
CAUSAL = torch.triu(torch.ones(QUERIES, QUERIES, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * KEYS, [False] * 4 + [True] * 2, [True] + [False] * 5])
SCORES = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def attention(targets: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return an adapted attention in float64, and a copy with the same adapter in its weights."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.MultiheadAttention(SIZE, HEADS, **options)}).double()
    merged = copy.deepcopy(model)
    attachment = attach(model, LoRAConfig(rank=2, **(targets or {"target_modules": ("layer",)})))
    with torch.no_grad():
        for one in attachment.parameters().values():
            one.copy_(torch.randn(one.shape) / 4)
        for path, pair in detach(copy.deepcopy(model)).modules.items():
            merged.get_parameter(path).add_(pair.lora_B.double() @ pair.lora_A.double(), alpha=pair.scaling)
    return model.double()["layer"], merged.requires_grad_(False)["layer"]


def tensors(queries: int = QUERIES, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, the batch first."""
    generator = torch.Generator().manual_seed(1)
    sizes = (queries, keys, keys)
    return tuple(torch.randn(BATCH, size, SIZE, generator=generator, dtype=torch.float64) for size in sizes)


def assert_same(layers: tuple[nn.Module, nn.Module], inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Check outputs, weights and the gradient of each input; an input that stands twice is the same tensor for both."""
    results = []
    for layer in layers:
        leaves = {id(one): one.clone().requires_grad_() for one in inputs}
        given = [leaves[id(one)] for one in inputs]
        torch.manual_seed(3)
        out, weights = layer(*given, **options)
        total = out.square().sum() + (0 if weights is None else weights.square().sum())
        results.append([out, weights, *torch.autograd.grad(total, list(leaves.values()))])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-10 * other.abs().max()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING, PADDING.double() * -1e9], ids=["none", "bool", "float"])
@pytest.mark.parametrize("mask", [None, torch.rand(QUERIES, KEYS) > 0.8, SCORES], ids=["none", "bool", "of heads"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_masks(mask, padding, need_weights):
    layers = attention(batch_first=True)
    assert_same(layers, tensors(), attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("average", [False, True])
def test_weights_of_each_head_or_their_mean(average):
    assert_same(attention(batch_first=True), tensors(), average_attn_weights=average)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING[:2, :QUERIES]], ids=["none", "padded"])
def test_a_causal_hint_goes_with_its_mask(padding, need_weights):
    options = {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": padding, "need_weights": need_weights}
    x = tensors()[0][:2]
    assert_same(attention(batch_first=True), (x, x, x), **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(batch_first, bias, need_weights):
    layers = attention(batch_first=batch_first, bias=bias)
    inputs = tuple(one if batch_first else one.transpose(0, 1).contiguous() for one in tensors())
    assert_same(layers, inputs, need_weights=need_weights)
    assert_same(layers, tuple(one[0] if batch_first else one[:, 0] for one in inputs), need_weights=need_weights)


@pytest.mark.parametrize("same", [(0, 0, 0), (0, 1, 1), (0, 1, 2), (0, 0, 2), (0, 1, 0)])
def test_one_tensor_in_several_places(same):
    inputs = tensors(QUERIES, QUERIES)
    assert_same(attention(batch_first=True), tuple(inputs[place] for place in same), need_weights=False)


def test_keys_and_values_of_other_sizes():
    layers = attention(batch_first=True, kdim=3, vdim=5)
    query, key, value = tensors()
    assert_same(layers, (query, key[..., :3], value[..., :5]), need_weights=False)


@pytest.mark.parametrize("member", ["in_proj_weight", "out_proj.weight"])
def test_one_matrix_alone(member):
    targets = {"target_modules": (), "target_parameters": (f"layer.{member}",)}
    assert_same(attention(targets, batch_first=True), tensors(), need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_drops_the_same(need_weights):
    layers = attention(batch_first=True, dropout=0.5)
    assert_same(layers, tensors(), need_weights=need_weights)
    (x, _, _) = tensors()
    out, again = (layers[0](x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(out, again)
    out, again = (layers[0].eval()(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(out, again)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_what_is_not_written_out_goes_through_the_sums(options):
    assert_same(attention(batch_first=True, **options), tensors(), need_weights=False)


def test_no_sum_is_kept_for_backward():
    """Neither the sums nor their gradients: what is saved has no more numbers than the matrices' frozen selves."""
    layer, _ = attention(batch_first=True)
    frozen = {one.untyped_storage().data_ptr() for one in layer.base.parameters()}
    saved: list[Tensor] = []
    x = torch.randn(1, 2, SIZE, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        layer(x, x, x, need_weights=False)
    own = [one for one in saved if one.untyped_storage().data_ptr() not in frozen]
    assert own
    assert max(one.numel() for one in own) < SIZE * SIZE


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        ((torch.ones(1, 2, 7, dtype=torch.float64),) * 3, {}, (AssertionError, RuntimeError)),
        ((torch.ones(2, 2, 2, SIZE, dtype=torch.float64),) * 3, {}, (AssertionError, RuntimeError)),
        ((torch.ones(1, 2, SIZE, dtype=torch.float64),) * 3, {"is_causal": True}, RuntimeError),
    ],
)
def test_a_wrong_call_is_an_error_still(inputs, options, error):
    layer, merged = attention(batch_first=True)
    for one in (merged, layer):
        with pytest.raises(error):
            one(*inputs, **options)
