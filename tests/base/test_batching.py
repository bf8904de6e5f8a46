"""Models that cannot take ragged rows take padded ones, with the same losses; the reason is said."""

import pytest
import torch
from tests.base.test_fast import batch, model_of
from tests.conftest import SIZES
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from veneer.base.batching import Way, batching, find_way, padded_logits, routed
from veneer.base.ragged import RaggedBatch
from veneer.config import LoRAConfig
from veneer.errors import BaseModelError
from veneer.nn.attach import attach, attachment_of
from veneer.scoring.loss import summed_loss


def soft_capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8)).requires_grad_(False)


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4))


def alone(model, given: RaggedBatch) -> torch.Tensor:
    return torch.cat([model(input_ids=part[None]).logits[0] for part in given.token_ids.split(given.lengths)])


@pytest.mark.parametrize(("make", "reason"), [(soft_capped, "soft-capped"), (mamba, "ragged")])
def test_what_cannot_be_ragged_is_padded_and_gives_what_each_sequence_gives(make, reason):
    model = make().eval()
    way = find_way(model)
    assert reason in way.padded
    with torch.no_grad(), batching(model, way):
        torch.testing.assert_close(padded_logits(model, batch()), alone(model, batch()), rtol=1e-4, atol=1e-5)
        loss = summed_loss(model, batch(), way=way)
    places, targets = batch().predictions()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(alone(model, batch())[places], targets, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_a_model_of_the_usual_build_is_ragged():
    model = model_of("Llama", {})
    assert find_way(model) == Way()
    assert find_way(model, fast=False) == Way(fast=False)


def test_both_ways_give_the_same_loss_and_gradient():
    model = model_of("Llama", {})
    attachment = attach(model, LoRAConfig(rank=2, init="gaussian"))
    found = []
    for way in (Way(), Way(fast=False), Way(padded="for the test")):
        model.zero_grad()
        with batching(model, way):
            loss = summed_loss(model, batch(), way=way)
            loss.backward()
        found.append((loss.detach(), {name: one.grad.clone() for name, one in attachment.parameters().items()}))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0])
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(other[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_slots_are_routed_in_padded_rows():
    model = model_of("Llama", {})
    attachment = attach(model, LoRAConfig(rank=2))
    for name, parameter in attachment.parameters().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    given = batch()
    mixed = RaggedBatch(given.token_ids, given.supervised, given.lengths, (None, 0, 0, None, 0))
    losses = []
    for way in (Way(), Way(padded="for the test")):
        with torch.no_grad(), batching(model, way), routed(model, mixed, way):
            losses.append(summed_loss(model, mixed, way=way))
    torch.testing.assert_close(*losses)
    with torch.no_grad(), batching(model, Way()):
        assert not torch.isclose(summed_loss(model, given), losses[0])
    assert attachment_of(model).routing.all_slots() == (0,)


def test_a_model_that_sees_its_padding_is_refused_with_both_reasons(monkeypatch):
    model = soft_capped()
    own = model.forward
    # Its padding is not masked, and the sequences of a batch are mixed.
    monkeypatch.setattr(model, "forward", lambda **given: own(input_ids=given["input_ids"].roll(1, 1)))
    with pytest.raises(BaseModelError, match=r"neither padded .* nor ragged: .*soft-capped"):
        find_way(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(BaseModelError, match="no language-model head"):
        find_way(model_of("Llama", {}).model)
