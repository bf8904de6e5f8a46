"""Where layers meet what is around them: torch's encoder, weights of zeros, calls without rows, starts by name."""

import copy

import pytest
import torch
from torch import nn

from tests.contract.cases import CASES
from tests.contract.grid import ids, supported
from tests.contract.support import assert_near, attach_variant, make_inputs, make_model, randomise, seed_with
from tests.contract.variants import DORA, PLAIN
from veneer.config import LoRAConfig
from veneer.errors import ConfigError
from veneer.nn.attach import attach, attachment_of, current_adapter, detach

DORAS = supported((DORA,), ("float32",))
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_torchs_encoder_calls_the_adapted_attention(use_dora, grad):
    """In evaluation its fused kernels would read the frozen matrices; with padding it takes rows out of the batch."""
    seed_with(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, False, True]])
    attach(model, LoRAConfig(rank=2, target_modules=["self_attn"], use_dora=use_dora))
    randomise(attachment_of(model))
    expected = copy.deepcopy(model)
    adapter = detach(expected)
    with torch.no_grad():
        for path, pair in adapter.modules.items():
            weight = expected.get_parameter(path)
            weight += pair.delta().float()
            if pair.magnitude is not None:
                weight *= (pair.magnitude / weight.norm(dim=1))[:, None]
    with torch.set_grad_enabled(grad):
        found = model["encoder"](x, src_key_padding_mask=padding)
        wanted = expected["encoder"](x, src_key_padding_mask=padding)
    assert_near(found[~padding], wanted[~padding], 1e-5)


@pytest.mark.parametrize(("case", "variant", "storage"), DORAS, ids=ids(DORAS))
def test_a_magnitude_of_no_direction_is_zero_and_not_nan(case, variant, storage):
    model = make_model(case)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    inputs = make_inputs(case)
    base = model(*inputs)
    attach_variant(model, case, variant)
    out = model(*inputs)
    assert torch.equal(out, base)
    out.sum().backward()
    assert all(one.grad.isfinite().all() for one in attachment_of(model).parameters().values())


@pytest.mark.parametrize("name", ["linear", "transposed", "embedding"])
def test_the_norms_of_large_weights_outlive_a_cast_to_half(name):
    """Their squares do not fit float16."""
    case = BY_NAME[name]
    model = make_model(case)
    with torch.no_grad():
        model.layer.weight.mul_(1000)
    inputs = make_inputs(case, "float16")
    base = copy.deepcopy(model).half()(*inputs)
    attach_variant(model, case, DORA)
    assert_near(model.half()(*inputs), base, 1e-2)


@pytest.mark.parametrize("case", [one for one in CASES if one.kind == "experts"], ids=str)
def test_experts_without_tokens(case):
    model = make_model(case)
    attach_variant(model, case, PLAIN)
    out = model(torch.empty(0, 4), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert out.shape == (0, 4)


def test_each_expert_and_each_part_starts_like_a_layer_of_its_own():
    """The deviation of `gaussian` is one over the rank: of one matrix, not of the whole stack."""
    case = BY_NAME["experts-gated"]
    model = make_model(case)
    attach_variant(model, case, PLAIN, rank=64, init="gaussian")
    for pair in current_adapter(model).modules.values():
        assert pair.lora_A.std().item() == pytest.approx(1 / 64, rel=0.1)
    model = make_model(BY_NAME["linear"])
    parts = {".*": ((0, 2), (3, 4), (5, 6))}
    attach_variant(model, BY_NAME["linear"], PLAIN, rank=64, init="gaussian", parts=parts)
    assert current_adapter(model).modules["layer"].lora_A.std().item() == pytest.approx(1 / 64, rel=0.1)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_an_option_that_a_start_does_not_know_is_refused(init):
    case = BY_NAME["linear"]
    with pytest.raises(ConfigError, match=r"layer: .*\n.*unknown option 'niter'"):
        attach_variant(make_model(case), case, PLAIN, init=init, init_options={"niter": 4})


def test_looking_up_padding_trains_nothing():
    case = BY_NAME["embedding-padded"]
    model = make_model(case)
    attachment = attach_variant(model, case, DORA)
    randomise(attachment)
    model(torch.tensor([1, 1])).sum().backward()
    assert all(not one.grad.any() for one in attachment.parameters().values())
