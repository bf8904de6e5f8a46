"""A beginning that rows share, computed once, gives what it gives in each row: logits, loss and gradients."""

import pytest
import torch
from tests.base.test_batching import mamba, soft_capped
from tests.base.test_fast import GEMMA, attached, model_of

from veneer.base.batching import Way, batching, find_way, padded_logits
from veneer.base.fast import fast_modules
from veneer.base.ragged import RaggedBatch, hidden_states, ragged_attention
from veneer.base.sharing import check_sharing, draws_at_random
from veneer.errors import BaseModelError
from veneer.scoring.loss import summed_loss

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Gemma3": {**GEMMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 5},
}
LENGTHS, PREFIXES = (9, 4, 4, 2, 6, 5, 1, 3), (None, 0, 0, 0, None, None, 5, 5)


def shared_batch(seed: int = 0) -> RaggedBatch:
    ids = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    parts = [torch.arange(length) > 0 for length in LENGTHS]
    for prefix in set(PREFIXES) - {None}:
        parts[prefix] = torch.zeros(LENGTHS[prefix], dtype=torch.bool)
    return RaggedBatch(ids, torch.cat(parts), LENGTHS, None, PREFIXES)


def results(model, batch: RaggedBatch, places: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits of the tokens of all whole sequences, the loss, and the gradients of what trains."""
    model.zero_grad()
    with torch.no_grad():
        hidden_TD = hidden_states(model, batch)
        logits = model.get_output_embeddings()(hidden_TD if places is None else hidden_TD[places])
    loss = summed_loss(model, batch)
    loss.backward()
    return [logits, loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Compare by the largest value: a sum over rows rounds by its largest part."""
    assert len(got) == len(expected) > 10
    largest = max(one.abs().max() for one in expected[2:])
    assert largest > 0
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        size = theirs.abs().max() if place < 2 else max(theirs.abs().max(), largest * 1e-3)
        assert (ours - theirs).abs().max() <= tolerance * size, place


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_expanded_batch(name, dtype, tolerance):
    model, batch = attached(model_of(name, FAMILIES[name])).to(dtype), shared_batch()
    with ragged_attention(model), fast_modules(model) as found:
        assert len(found.blocks) == 2
        expected = results(model, batch.expanded(), None)
        got = results(model, batch, torch.cat(batch.expanded_places()))
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_expanded_batch_in_layers_of_transformers(name, fast):
    """By our attention or by torch's, and with their norms, which round to 32 bits also in float64."""
    model, batch = attached(model_of(name, FAMILIES[name])).double(), shared_batch()
    with ragged_attention(model, fast=fast):
        expected = results(model, batch.expanded(), None)
        got = results(model, batch, torch.cat(batch.expanded_places()))
    assert_same(got, expected, 1e-6)


def test_checkpointed_activations_give_the_same():
    model = attached(model_of("Llama", {})).double()
    batch = shared_batch()
    with ragged_attention(model), fast_modules(model):
        expected = results(model, batch, None)
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(results(model, batch, None), expected, rtol=1e-9, atol=1e-9)


def test_a_row_does_not_feel_another_that_shares_its_beginning():
    model, batch = attached(model_of("Llama", {})), shared_batch()
    changed = batch.token_ids.clone()
    changed[9:13] = 5
    other = RaggedBatch(changed, batch.supervised, LENGTHS, None, PREFIXES)
    with torch.no_grad(), ragged_attention(model), fast_modules(model):
        before, after = hidden_states(model, batch), hidden_states(model, other)
    outside = torch.tensor([not 9 <= place < 13 for place in range(sum(LENGTHS))])
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])


def test_what_may_share_is_found():
    model = attached(model_of("Llama", {}))
    way = find_way(model)
    assert (way, way.shares(training=True)) == (Way(), True)
    assert not find_way(model, fast=False).shares(training=False)
    for other in (soft_capped(), mamba()):
        assert not find_way(other).shares(training=False)


@pytest.mark.parametrize("what", ["adapter", "attention"])
def test_what_is_drawn_at_random_is_drawn_for_each_row(what):
    base = model_of("Llama", {"attention_dropout": 0.1} if what == "attention" else {})
    model = attached(base, **({"dropout": 0.1} if what == "adapter" else {}))
    state = torch.get_rng_state()
    assert draws_at_random(model)
    assert torch.equal(torch.get_rng_state(), state)
    way = find_way(model)
    assert (way.shares(training=True), way.shares(training=False)) == (False, True)
    assert model.training


def test_an_activated_adapter_shares_nothing():
    model = attached(model_of("Llama", {}), invocation_tokens=(7, 8))
    assert "begins at another place" in find_way(model).alone
    with ragged_attention(model), pytest.raises(BaseModelError, match="expand them"):
        hidden_states(model, shared_batch())


def test_a_model_whose_tokens_look_at_more_is_refused(monkeypatch):
    model = model_of("Llama", {})
    own = model.model.layers[0].mlp.forward
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda x: own(x) + x.mean(1, keepdim=True))
    with pytest.raises(BaseModelError, match="something else for rows that share"):
        check_sharing(model)


def test_padded_rows_cannot_continue_each_other():
    model = model_of("Llama", {})
    with batching(model, Way(padded="for the test")), pytest.raises(ValueError, match="expand"):
        padded_logits(model, shared_batch())
