"""What every quantised linear layer does: equal F.linear on its decoded weight, gradients included, in every form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer.storage import panels
from veneer.storage.quantise import QUANTISERS
from veneer.storage.registry import read_weight

KINDS = sorted(QUANTISERS)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, inputs: int = 33, outputs: int = 200, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return QUANTISERS[kind](nn.Linear(inputs, outputs, bias=bias))


@pytest.fixture(params=["one panel", "many panels"])
def some_panels(request, monkeypatch) -> None:
    """Layers of 200 rows in one panel, or in four."""
    if request.param == "many panels":
        monkeypatch.setattr(panels, "PANEL_BYTES", 1)
        assert panels.panel_rows(200, 33, torch.device("cpu")) == 64


def run(function, x: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and of the leaves."""
    x = x.clone().requires_grad_()
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    out = function(x)
    (out.float() * torch.arange(out.shape[-1])).sum().backward()
    return [out.detach(), x.grad, *[leaf.grad for leaf in leaves]]


@kinds
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 140),
    leading=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    panel_bytes=st.sampled_from([1, 8 << 20]),
)
def test_equals_linear_with_gradients(kind, inputs, outputs, leading, bias, panel_bytes):
    layer = make(kind, inputs, outputs, bias)
    weight = read_weight(layer)
    x = torch.randn(*leading, inputs)
    leaves = [layer.bias] if bias else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL_BYTES", panel_bytes)
        got = run(layer, x, *leaves)
    expected = run(lambda x: F.linear(x, weight, layer.bias), x, *leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * outputs)


@kinds
@pytest.mark.usefixtures("some_panels")
def test_gradcheck(kind):
    layer = make(kind, 33, 200).double()
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    layer.bias.requires_grad_()

    def function(x, bias):
        return layer(x)[:, ::50]

    assert torch.autograd.gradcheck(function, (x, layer.bias))
    expected = F.linear(x, read_weight(layer).double(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.usefixtures("some_panels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(kind, dtype):
    layer = make(kind)
    x = torch.randn(5, 33).to(dtype)
    got = run(layer, x)
    exact = run(lambda x: F.linear(x, read_weight(layer).to(dtype).double(), layer.bias.double()), x.double())
    assert [one.dtype for one in got] == [dtype, dtype]
    for one, other in zip(got, exact, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


@kinds
def test_autocast_is_followed_as_a_linear_layer_follows_it(kind):
    layer = make(kind)
    x = torch.randn(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        expected = F.linear(x, read_weight(layer), layer.bias)
        assert layer(x.double()).dtype == torch.float64
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@kinds
def test_checkpointing_and_double_use(kind):
    layer = make(kind, 33, 33)
    weight = read_weight(layer)
    x = torch.randn(4, 33)
    expected = run(lambda x: F.linear(F.linear(x, weight, layer.bias), weight, layer.bias), x)
    for function in (
        lambda x: layer(layer(x)),
        lambda x: checkpoint(lambda x: layer(layer(x)), x, use_reentrant=False),
    ):
        for one, other in zip(run(function, x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@kinds
def test_second_derivatives_are_refused(kind):
    x = torch.randn(2, 33, requires_grad=True)
    (gradient,) = torch.autograd.grad(make(kind)(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@kinds
def test_nothing_is_kept_for_backward_but_the_stored_tensors(kind):
    layer = make(kind)
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 33, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        layer(x)
    assert {one.data_ptr() for one in saved} == {one.data_ptr() for one in layer.buffers()}


@kinds
def test_writing_between_forward_and_backward_is_noticed(kind):
    layer = make(kind)
    out = layer(torch.randn(2, 33, requires_grad=True))
    for buffer in layer.buffers():
        buffer.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_change_the_bias_only(kind, dtype):
    layer = make(kind)
    weight, bias = read_weight(layer), layer.bias.clone()
    layer.to(dtype)
    assert torch.equal(read_weight(layer), weight)
    assert torch.equal(layer.bias, bias.to(dtype))
    assert layer(torch.randn(2, 33, dtype=dtype)).dtype == dtype
    layer.float().half().double()
    assert torch.equal(read_weight(layer), weight)


@kinds
def test_copies_share_nothing(kind):
    layer = make(kind)
    twin = copy.deepcopy(layer)
    weight = read_weight(layer)
    assert torch.equal(read_weight(twin), weight)
    for one in twin.buffers():
        one.zero_()
    assert torch.equal(read_weight(layer), weight)


@kinds
def test_states_travel(kind, tmp_path):
    layer = make(kind)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = type(layer)(33, 200, torch.zeros(200))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(3, 33)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        type(layer)(33, 300, torch.zeros(300)).load_state_dict(layer.state_dict())


@kinds
def test_devices_move(kind):
    layer = make(kind).to("meta")
    assert {one.device.type for one in [*layer.buffers(), *layer.parameters()]} == {"meta"}
    assert layer(torch.empty(2, 33, device="meta")).shape == (2, 200)


@kinds
@pytest.mark.usefixtures("some_panels")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not:DeprecationWarning")  # dynamo
def test_compiles_without_a_break(kind, dynamic):
    torch._dynamo.reset()
    layer = make(kind)
    x = torch.randn(3, 33)
    expected = run(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for one, other in zip(run(compiled, x), expected, strict=True):
        assert torch.equal(one, other)


def test_panels_begin_at_blocks_and_cover_small_weights_whole():
    cpu = torch.device("cpu")
    assert panels.panel_rows(576, 1536, cpu) == 576
    for inputs in (1, 63, 576, 5632, 100_000):
        rows = panels.panel_rows(1 << 20, inputs, cpu)
        assert rows % panels.BLOCK == 0
        assert rows == panels.BLOCK or rows * inputs * 4 <= panels.PANEL_BYTES
    assert panels.panel_rows(49_152, 576, torch.device("cuda")) > panels.panel_rows(49_152, 576, cpu)
