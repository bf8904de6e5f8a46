"""The two orders of rotary rows: attention written in either convention gives the same."""

import pytest
import torch

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.files.rotary import Heads, heads_of, reordered, to_halves, to_pairs

TOKENS, HEADS, KEYS, SIZE, WIDTH = 6, 4, 2, 8, 20


def rotated(x_THD: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Rotary embedding of values 2j and 2j + 1, or of values j and j + d/2, straight from the paper's formula."""
    half = SIZE // 2
    angles = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = (x_THD[..., ::2], x_THD[..., 1::2]) if pairs else (x_THD[..., :half], x_THD[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)


def attention(x_TW: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Causal attention with grouped keys."""
    q_THD = rotated((x_TW @ q.T).unflatten(1, (HEADS, SIZE)), pairs)
    k_TGD = rotated((x_TW @ k.T).unflatten(1, (KEYS, SIZE)), pairs)
    v_TGD = (x_TW @ v.T).unflatten(1, (KEYS, SIZE))
    k_THD, v_THD = (one.repeat_interleave(HEADS // KEYS, 1) for one in (k_TGD, v_TGD))
    scores = torch.einsum("thd,shd->hts", q_THD, k_THD) / SIZE**0.5
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v_THD)


def dora(weight: torch.Tensor, pair: LowRank) -> torch.Tensor:
    adapted = weight + pair.delta()
    return pair.magnitude.double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)


def test_attention_in_either_order_gives_the_same():
    torch.set_default_dtype(torch.float64)
    try:
        x, v = torch.randn(TOKENS, WIDTH), torch.randn(KEYS * SIZE, WIDTH)
        weights = {"q_proj": torch.randn(HEADS * SIZE, WIDTH), "k_proj": torch.randn(KEYS * SIZE, WIDTH)}
        pairs = {
            name: LowRank(torch.randn(3, WIDTH), torch.randn(len(one), 3), 0.7, magnitude=torch.rand(len(one)) + 1)
            for name, one in weights.items()
        }
        heads = Heads(HEADS, KEYS, SIZE)
        ours = attention(x, *(dora(weights[name], pairs[name]) for name in weights), v, pairs=False)
        counts = {"q_proj": HEADS, "k_proj": KEYS}
        moved = {name: reordered(f"a.{name}", one, heads, pairs=True) for name, one in pairs.items()}
        theirs = [dora(to_pairs(weights[name], counts[name]), moved[name]) for name in weights]
        assert torch.allclose(attention(x, *theirs, v, pairs=True), ours, rtol=1e-12)
        # The wrong order is seen: this test can fail.
        wrong = [dora(to_pairs(weights[name], counts[name]), pairs[name]) for name in weights]
        assert not torch.allclose(attention(x, *wrong, v, pairs=True), ours, rtol=1e-2)
        back = {name: reordered(f"a.{name}", one, heads, pairs=False) for name, one in moved.items()}
        assert all(torch.equal(back[name].lora_B, pairs[name].lora_B) for name in pairs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_others_stay_and_wrong_sizes_are_refused():
    pair = LowRank(torch.ones(1, 3), torch.arange(6.0)[:, None], 1.0)
    assert reordered("a.v_proj", pair, Heads(2, 1, 4), pairs=True) is pair
    with pytest.raises(AdapterError, match="2 heads of 4 outputs, got 6"):
        reordered("a.q_proj", pair, Heads(2, 1, 4), pairs=True)
    assert torch.equal(to_halves(to_pairs(pair.lora_B, 1), 1), pair.lora_B)


@pytest.mark.parametrize(
    "config", [{}, {"num_attention_heads": 0, "hidden_size": 8}, {"num_attention_heads": "4", "hidden_size": 8}]
)
def test_heads_that_are_not_said_are_refused(config):
    with pytest.raises(AdapterError, match="num_attention_heads"):
        heads_of(config, "config.json")
