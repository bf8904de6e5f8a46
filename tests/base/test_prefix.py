"""The frozen lowest layers: how many there are, that their states stand for running them, when they must not."""

from contextlib import contextmanager

import pytest
import torch
from tests.base.test_ragged import batch_of
from tests.conftest import SIZES
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from veneer.base.prefix import check_prefix, prefix_layers, prefix_states, sole_layers, tail_hidden_states
from veneer.base.ragged import RaggedBatch, hidden_states, ragged_attention
from veneer.config import LoRAConfig
from veneer.errors import BaseModelError
from veneer.nn.attach import attach

FOUR = {**SIZES, "num_hidden_layers": 4}
WINDOWS = ["full_attention", "sliding_attention"]


def gpt2(**changes) -> GPT2LMHeadModel:
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=4, n_head=2, **{**none, **changes}))


def gemma3() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**FOUR, head_dim=8, sliding_window=4, layer_types=[*WINDOWS, *reversed(WINDOWS)])
    return Gemma3ForCausalLM(config)


MODELS = {
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**FOUR)), ["q_proj", "down_proj"]),
    "gemma3": (gemma3, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


@pytest.fixture(params=["llama", *MODELS])
def adapted(request, tiny):
    """A model with the upper two of four layers adapted, not as the adapter began, in training mode."""
    make, suffixes = MODELS.get(request.param, (lambda: tiny(num_hidden_layers=4), ["q_proj", "down_proj"]))
    model = make().requires_grad_(False).eval()
    attachment = attach(model, LoRAConfig(rank=2, target_modules=suffixes, layers_to_transform=[2, 3]))
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


@contextmanager
def graphs_of(layers):
    """Collect whether what enters each layer hangs in an autograd graph."""
    found = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _layer, args, named, place=place: found.__setitem__(
                place, (args[0] if args else named["hidden_states"]).grad_fn is not None
            ),
            with_kwargs=True,
        )
        for place, layer in enumerate(layers)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_states_stand_for_running_the_layers_bit_for_bit(adapted):
    assert prefix_layers(adapted) == 2
    width = check_prefix(adapted, 2).shape[1]
    batch = batch_of()
    with ragged_attention(adapted):
        whole = hidden_states(adapted, batch)
        below = prefix_states(adapted, batch, 2)
        tail = tail_hidden_states(adapted, batch, below)
        other = tail_hidden_states(adapted, batch, type(below)(2, below.states_TD + 1))
    assert below.states_TD.shape == (batch.token_ids.shape[0], width)
    assert torch.equal(tail, whole)
    assert not torch.allclose(other, whole)


def test_gradients_are_those_of_the_whole_model(adapted):
    batch, parameters = batch_of(), [one for one in adapted.parameters() if one.requires_grad]
    with ragged_attention(adapted):
        below = prefix_states(adapted, batch, 2)
        whole = torch.autograd.grad(hidden_states(adapted, batch).square().sum(), parameters)
        tail = torch.autograd.grad(tail_hidden_states(adapted, batch, below).square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(whole, tail, strict=True))
    assert all(one.any() for one in whole)


def test_no_graph_is_built_below_the_lowest_adapter(adapted):
    with graphs_of(sole_layers(adapted)) as found, ragged_attention(adapted):
        assert hidden_states(adapted, batch_of()).requires_grad
    assert found == {0: False, 1: False, 2: False, 3: True}


def test_the_layers_below_are_not_run(adapted):
    ran = []
    for place, layer in enumerate(sole_layers(adapted)):
        next(layer.children()).register_forward_hook(lambda *_, place=place: ran.append(place))
    with ragged_attention(adapted):
        below = prefix_states(adapted, batch_of(), 2)
        assert set(ran) == {0, 1}
        ran.clear()
        tail_hidden_states(adapted, batch_of(), below)
        assert set(ran) == {2, 3}


def test_with_the_head_alone_adapted_all_layers_lie_below(tiny):
    model = tiny(num_hidden_layers=3, tie_word_embeddings=False)
    attach(model, LoRAConfig(rank=2, target_modules=["lm_head"]))
    assert prefix_layers(model) == 3
    check_prefix(model, 3)
    with ragged_attention(model):
        tail = tail_hidden_states(model, batch_of(), prefix_states(model, batch_of(), 3))
        assert torch.equal(tail, hidden_states(model, batch_of()))


def test_an_activated_adapter_is_silent_where_it_was(tiny):
    model = tiny(num_hidden_layers=3)
    suffixes = ["q_proj", "up_proj"]
    attach(model, LoRAConfig(rank=2, target_modules=suffixes, layers_to_transform=[2], invocation_tokens=[7, 8]))
    ids = torch.tensor([3, 4, 7, 8, 5, 6, 3, 4, 5])
    batch = RaggedBatch(ids, torch.zeros(9, dtype=torch.bool), (6, 3))
    check_prefix(model, 2)
    with ragged_attention(model):
        tail = tail_hidden_states(model, batch, prefix_states(model, batch, 2))
        assert torch.equal(tail, hidden_states(model, batch))


def test_what_trains_below_is_found(tiny):
    model = tiny(num_hidden_layers=3)
    assert prefix_layers(model) == 3
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    assert prefix_layers(model) == 1
    check_prefix(model, 1)
    model.model.norm.weight.requires_grad_(True)  # above all layers
    check_prefix(model, 1)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(BaseModelError, match="something below layer 1 of LlamaForCausalLM trains"):
        check_prefix(model, 1)


@pytest.mark.parametrize("rows", [{"token_rows": {"embed_tokens": [5]}}, {"invocation_tokens": [7]}])
def test_an_adapted_embedding_lies_below_also_where_it_is_silent(tiny, rows):
    model = tiny(num_hidden_layers=3, tie_word_embeddings=False)
    suffixes = ["q_proj"] if "token_rows" in rows else ["q_proj", "embed_tokens"]
    attach(model, LoRAConfig(rank=2, target_modules=suffixes, **rows))
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(BaseModelError, match="something below layer 2"):
        check_prefix(model, 2)


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_below_is_found_in_training_only(place):
    model = gpt2(**{place: 0.01}).requires_grad_(False)
    before = torch.get_rng_state()
    with pytest.raises(BaseModelError, match="draws at random below layer 2"):
        check_prefix(model.train(), 2)
    assert torch.equal(before, torch.get_rng_state())
    check_prefix(model.eval(), 2)
    assert not model.training


class _Reaching(nn.Module):
    """A layer that also uses what the lowest layer gave."""

    def __init__(self, layer, lowest) -> None:
        super().__init__()
        self.layer = layer
        lowest.register_forward_hook(lambda _layer, _args, output: setattr(self, "seen", output))

    def forward(self, hidden_states, **named):
        return self.layer(hidden_states, **named) + self.seen


def test_models_whose_higher_layers_reach_below_are_refused(tiny):
    model = tiny(num_hidden_layers=3)
    model.model.layers[2] = _Reaching(model.model.layers[2], model.model.layers[0])
    with pytest.raises(BaseModelError, match="uses more of its lower layers than what layer 1 gives"):
        check_prefix(model, 2)
    check_prefix(model, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "forward", lambda hidden, **_: (hidden, None)), "expected one tensor"),
        (lambda layer: setattr(layer, "forward", lambda hidden, **_: hidden[None]), "expected one tensor"),
        (lambda layer: setattr(layer, "forward", lambda hidden, **_: hidden.no_such), "cannot run without"),
    ],
)
def test_layers_of_another_make_are_refused(tiny, change, reason):
    model = tiny()
    change(model.model.layers[0])
    with pytest.raises(BaseModelError, match=reason):
        check_prefix(model, 1)


def test_layers_that_are_not_in_one_list_are_not_known(tiny):
    model = tiny(num_hidden_layers=3)
    model.model.layers[1] = model.model.layers[0]
    assert sole_layers(model) == ()
    model = tiny()
    model.model.more = nn.ModuleList([nn.Linear(1, 1)])
    assert prefix_layers(model) == 0


def test_the_model_is_as_it_was_also_after_an_error(adapted):
    layers = sole_layers(adapted)

    def own(*_, **__):
        raise RuntimeError("not today")

    vars(layers[3])["forward"] = own
    before = [dict(vars(layer)) for layer in layers]
    batch = batch_of()
    with ragged_attention(adapted):
        below = prefix_states(adapted, batch, 2)  # its own forward is not called, and comes back
        for call in (lambda: tail_hidden_states(adapted, batch, below), lambda: prefix_states(adapted, batch, 4)):
            with pytest.raises(RuntimeError, match="not today"):
                call()
    assert [dict(vars(layer)) for layer in layers] == before
    assert not any(layer._forward_hooks for layer in layers)
