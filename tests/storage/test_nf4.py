"""NF4 linear layers: the rounding, its double rounding, the bytes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.errors import BaseModelError, ConfigError
from veneer.storage.nf4 import BLOCK, CODEBOOK, GROUP, NF4Linear, quantise_nf4, read_nf4, write_nf4

sizes = st.integers(1, 150)
HALF_GAP = float((CODEBOOK[1:] - CODEBOOK[:-1]).max()) / 2


def linear(inputs: int, outputs: int, seed: int = 0, spread: float = 0.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * 0.02)
        layer.weight *= torch.exp(spread * torch.randn(outputs, 1, generator=generator))
    return layer


def blocks(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def scale_error(layer: NF4Linear) -> torch.Tensor:
    """Half the scale of each block's group: what rounding the absmax costs at most."""
    half = layer.absmax_scale_bits_G.view(torch.float32) / 2
    count = layer.bytes_Y.numel() * 2 // BLOCK
    return half.repeat_interleave(GROUP)[:count]


def decoded_by_hand(layer: NF4Linear) -> torch.Tensor:
    """The equation of the class, one code at a time."""
    count = layer.bytes_Y.numel() * 2 // BLOCK
    scale = layer.absmax_scale_bits_G.view(torch.float32).repeat_interleave(GROUP)
    absmax = (layer.absmax_codes_K * scale + layer.absmax_mean_bits.view(torch.float32)).clamp(min=0)[:count]
    codes = [code for byte in layer.bytes_Y.tolist() for code in (byte >> 4, byte & 15)]
    values = CODEBOOK[torch.tensor(codes)].view(-1, BLOCK) * absmax[:, None]
    return values.view(-1)[: layer.out_features * layer.in_features].view(layer.out_features, layer.in_features)


@given(sizes, sizes, st.integers(0, 99), st.sampled_from([0.0, 1.0, 3.0]))
def test_each_weight_is_within_half_a_gap_and_the_rounding_of_its_scale(inputs, outputs, seed, spread):
    layer = linear(inputs, outputs, seed, spread)
    quantised = quantise_nf4(layer)
    error = blocks(read_nf4(quantised) - layer.weight).abs()
    bound = HALF_GAP * blocks(layer.weight).abs().amax(1) + scale_error(quantised)
    assert (error <= bound[:, None] * (1 + 1e-5)).all()


@given(sizes, sizes, st.integers(0, 99), st.sampled_from([0.0, 3.0]))
def test_coding_what_was_decoded_moves_it_by_the_rounding_of_the_scale_only(inputs, outputs, seed, spread):
    layer = quantise_nf4(linear(inputs, outputs, seed, spread))
    again = copy.deepcopy(layer)
    write_nf4(again, read_nf4(layer))
    moved = blocks(read_nf4(again) - read_nf4(layer)).abs()
    bound = scale_error(again)
    if spread:  # where scales differ a lot, a small block's codes may be others as well
        bound = bound + HALF_GAP * blocks(read_nf4(layer)).abs().amax(1)
    else:
        used = blocks(torch.ones(outputs, inputs)).bool()
        codes, codes_again = (
            torch.stack([one.bytes_Y >> 4, one.bytes_Y & 15], 1).view(-1, BLOCK) for one in (layer, again)
        )
        assert torch.equal(codes[used], codes_again[used])
    assert (moved <= bound[:, None] * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 63), (7, 65), (5, 128), (300, 64), (130, 200)])
def test_decodes_as_the_equation_says(shape):
    layer = quantise_nf4(linear(shape[1], shape[0]))
    assert torch.equal(read_nf4(layer), decoded_by_hand(layer))


def test_the_codebook_holds_quantiles_of_the_normal_distribution():
    """QLoRA, section 3: 8 quantiles below zero, 9 above, evenly spaced in probability, divided by the largest."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([above, below, torch.zeros(1)]).sort().values
    torch.testing.assert_close(CODEBOOK, values / values.max(), rtol=0, atol=1e-5)


def test_zeros_stay_zeros():
    layer = linear(64, 5)
    with torch.no_grad():
        layer.weight[1] = 0
    weight = read_nf4(quantise_nf4(layer))
    assert torch.equal(weight[1], torch.zeros(64))
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(read_nf4(quantise_nf4(layer)), torch.zeros(5, 64))


def test_a_small_block_among_large_ones_is_not_turned_around():
    layer = linear(64, 8)
    with torch.no_grad():
        layer.weight[:7] *= 1000
        layer.weight[7] *= 1e-3
    weight = read_nf4(quantise_nf4(layer))[7]
    assert (weight * layer.weight[7] >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_place(bad):
    layer = linear(5, 3)
    with torch.no_grad():
        layer.weight[2, 4] = bad
    with pytest.raises(BaseModelError, match=r"\(3, 5\) of an NF4Linear holds 1 value .* at \[2, 4\]"):
        quantise_nf4(layer)


def test_a_layer_without_outputs_is_refused():
    with pytest.raises(ConfigError, match="3 and 0"):
        NF4Linear(3, 0)


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (49_152, 576), (999, 577)])
def test_bytes_follow_the_formula(shape):
    outputs, inputs = shape
    layer = NF4Linear(inputs, outputs)
    assert layer.stored_bytes == pytest.approx(outputs * inputs * (1 / 2 + 1 / 64 + 4 / (64 * 256)), rel=0.03)
    assert sum(one.nbytes for one in layer.buffers()) == layer.stored_bytes


def test_large_weights_are_coded_in_chunks_as_small_ones_are(monkeypatch):
    plain = linear(96, 50)
    whole = quantise_nf4(plain)
    monkeypatch.setattr("veneer.storage.nf4.CHUNK", 4 * BLOCK)
    monkeypatch.setattr("veneer.storage.rounding.CHUNK", 8)
    assert all(torch.equal(a, b) for a, b in zip(quantise_nf4(plain).buffers(), whole.buffers(), strict=True))
