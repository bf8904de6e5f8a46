"""Experts' gates: the usual one by our function, others and watched ones by their own."""

import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import veneer

SIZES = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 2}


def adapted(base: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model = nn.Sequential(base).requires_grad_(False)
    veneer.attach(model, veneer.LoRAConfig(rank=2, target_modules=[], target_parameters=["0.down_proj"]))
    return model[0]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([[0], [1], [1], [0], [1]]), torch.ones(5, 1)


def mixtral() -> nn.Module:
    config = MixtralConfig(**SIZES)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


def test_the_usual_gate_keeps_the_activation_for_nothing():
    layer, kept = adapted(mixtral()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(tuple(one.shape)) or one, lambda one: one):
        x, *rest = inputs()
        layer(x.requires_grad_(), *rest)
    assert kept.count((5, 12)) == 1  # gate and up
    assert kept.count((5, 6)) == 1  # what goes down


def test_a_watched_activation_is_called():
    layer, seen = adapted(mixtral()), []
    expected = layer(*inputs())
    layer.base.act_fn.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(*inputs()), expected)
    assert seen


def test_another_gate_is_called():
    config = GptOssConfig(**SIZES)
    config._experts_implementation = "eager"
    layer = adapted(GptOssExperts(config))
    torch.testing.assert_close(layer(*inputs()), layer.base(*inputs()))
