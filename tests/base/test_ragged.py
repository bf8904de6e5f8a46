"""Ragged batches: sequences in one row give what each gives alone, and never see each other."""

import pytest
import torch
from tests.conftest import SIZES
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from veneer.base.ragged import RaggedBatch, check_ragged, hidden_states, ragged_attention
from veneer.config import LoRAConfig
from veneer.errors import BaseModelError
from veneer.nn.attach import attach

LENGTHS = (3, 7, 7, 1, 12)


def batch_of(lengths=LENGTHS, seed: int = 0) -> RaggedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (sum(lengths),), generator=generator)
    return RaggedBatch(ids, torch.zeros_like(ids, dtype=torch.bool), tuple(lengths))


def ragged_logits(model, batch: RaggedBatch) -> torch.Tensor:
    with torch.no_grad(), ragged_attention(model):
        return model.get_output_embeddings()(hidden_states(model, batch))


def logits_alone(model, batch: RaggedBatch) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None]).logits[0] for part in batch.token_ids.split(batch.lengths)])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_logits_equal_those_of_each_sequence_alone(name, tiny):
    make = {
        "llama": tiny,
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    }[name]
    model = make().eval()
    check_ragged(model)
    torch.testing.assert_close(ragged_logits(model, batch_of()), logits_alone(model, batch_of()), rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_feel_another(tiny):
    """Change one sequence: every other's logits stay bit for bit."""
    model, batch = tiny(), batch_of()
    before = ragged_logits(model, batch)
    changed = batch.token_ids.clone()
    changed[3:10] = 5
    after = ragged_logits(model, RaggedBatch(changed, batch.supervised, batch.lengths))
    outside = torch.tensor([place < 3 or place >= 10 for place in range(sum(LENGTHS))])
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[3:10], after[3:10])


def test_gradients_equal_those_of_each_sequence_alone(tiny):
    model, batch = tiny(), batch_of()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    weights = torch.randn(sum(LENGTHS), 259, generator=torch.Generator().manual_seed(1))
    with ragged_attention(model):
        (model.lm_head(hidden_states(model, batch)) * weights).sum().backward()
    got = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    for part, weight in zip(batch.token_ids.split(LENGTHS), weights.split(LENGTHS), strict=True):
        (model(input_ids=part[None]).logits[0] * weight).sum().backward()
    torch.testing.assert_close(got, model.model.layers[0].self_attn.k_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_the_model_is_as_before_afterwards(tiny):
    model = tiny()
    before = model.config._attn_implementation
    with ragged_attention(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    model.train()
    check_ragged(model)
    assert model.training


def test_without_ragged_attention_a_ragged_batch_is_refused(tiny):
    with pytest.raises(BaseModelError, match="outside of ragged_attention"):
        hidden_states(tiny(), batch_of())


def test_models_that_cannot_are_refused_with_the_reason():
    torch.manual_seed(0)
    soft_capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    with pytest.raises(BaseModelError, match="soft-capped"):
        check_ragged(soft_capped)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2))
    try:
        check_ragged(gpt2)
    except BaseModelError as error:
        assert "GPT2" in str(error)  # noqa: PT017 (either answer is right, silence about a wrong one is not)
    else:
        gpt2.eval()
        torch.testing.assert_close(
            ragged_logits(gpt2, batch_of()), logits_alone(gpt2, batch_of()), rtol=1e-4, atol=1e-5
        )


def test_sizes_that_disagree_are_refused():
    ids, marks = torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.bool)
    for lengths, slots in (((2, 2), None), ((5, 0), None), ((2, 3), (0,))):
        with pytest.raises(ValueError, match="disagree"):
            RaggedBatch(ids, marks, lengths, slots)


def test_a_sequence_continues_only_what_it_can():
    ids, marks = torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.bool)
    for prefixes, slots, reason in (
        ((None,), None, "disagree"),
        ((0, None, None), None, "sequence 0 continues 0"),
        ((1, None, None), None, "sequence 0 continues 1"),
        ((None, -1, None), None, "sequence 1 continues -1"),
        ((None, 0, 1), None, "sequence 2 continues 1"),
        ((None, 0, None), (0, None, 0), "another slot"),
    ):
        with pytest.raises(ValueError, match=reason):
            RaggedBatch(ids, marks, (2, 2, 1), slots, prefixes)
    with pytest.raises(ValueError, match="supervised in a sequence that others continue"):
        RaggedBatch(ids, marks.clone().index_fill_(0, torch.tensor([1]), True), (2, 2, 1), None, (None, 0, None))


def test_expanding_a_batch_gives_whole_sequences():
    ids, marks = torch.arange(6), torch.tensor([False, False, True, False, False, True])
    whole = RaggedBatch(ids, marks, (2, 1, 1, 2), (0, 0, 0, None), (None, 0, 0, None)).expanded()
    assert whole.token_ids.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert whole.supervised.tolist() == [False, False, True, False, False, False, False, True]
    assert (whole.lengths, whole.slots, whole.prefixes) == ((3, 3, 2), (0, 0, None), None)
    assert whole.expanded().token_ids.tolist() == whole.token_ids.tolist()


def test_each_sequence_goes_through_the_slot_that_the_batch_names(tiny):
    model, batch = tiny(), batch_of()
    base = ragged_logits(model, batch)
    attachment = attach(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.add_(0.1)
    adapted = ragged_logits(model, batch)
    slots = (0, None, None, 0, None)
    mixed = ragged_logits(model, RaggedBatch(batch.token_ids, batch.supervised, batch.lengths, slots))
    own = torch.tensor([slot == 0 for slot, length in zip(slots, LENGTHS, strict=True) for _ in range(length)])
    torch.testing.assert_close(mixed[own], adapted[own])
    torch.testing.assert_close(mixed[~own], base[~own])
    assert not torch.allclose(adapted, base)
