"""A norm is known by what it computes."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from veneer.nn.norms import rms_norm_of


def drawn(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.requires_grad_(False)


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (nn.RMSNorm(8, eps=1e-6), 0.0),
        (LlamaRMSNorm(8, eps=1e-5), 0.0),
        (LlamaRMSNorm(8, eps=1e-5).bfloat16(), 0.0),
        (Gemma3RMSNorm(8), 1.0),
        (Gemma3RMSNorm(8).bfloat16(), 1.0),
    ],
)
def test_rms_norms_are_known(norm, offset):
    found = rms_norm_of(drawn(norm))
    assert found is not None
    assert found.offset == offset


@pytest.mark.parametrize("gain", [[0.1, -0.3, 0.5, 0.2, 0.0, 1.5, 90.0, 60.0], [60.0] * 8, [-1.0] * 7 + [300.0]])
@pytest.mark.parametrize(("make", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_a_gain_is_found_beside_large_ones(make, offset, gain, dtype):
    """Gemma 3's gains go up to 90: within 2 % of the largest output, 0.1 and 1.1 are alike."""
    norm = make(8).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.tensor(gain))
    found = rms_norm_of(norm)
    assert found is not None
    assert found.offset == offset


class Squared(LlamaRMSNorm):
    """Named like one, and another."""

    def forward(self, x):
        return super().forward(x).square()


class Other(LlamaRMSNorm):
    """An epsilon that is not the one it says."""

    def forward(self, x):
        self.variance_epsilon, kept = 0.1, self.variance_epsilon
        out = super().forward(x)
        self.variance_epsilon = kept
        return out


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.Linear(8, 8), nn.Identity(), Squared(8), Other(8), nn.RMSNorm(8, eps=None)]
)
def test_others_are_not(module):
    assert rms_norm_of(drawn(module)) is None


def test_a_norm_that_trains_or_is_watched_is_left_alone():
    assert rms_norm_of(nn.RMSNorm(8, eps=1e-6)) is None
    watched = drawn(nn.RMSNorm(8, eps=1e-6))
    watched.register_forward_hook(lambda *_: None)
    assert rms_norm_of(watched) is None
