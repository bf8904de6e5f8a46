"""May sequences continue another one, computed once for all? Proved for a model on a few tokens."""

import torch
from transformers import PreTrainedModel

from veneer.base.activation import invocation_of
from veneer.base.ragged import RaggedBatch, hidden_states, probe_batch, ragged_attention, relative_error
from veneer.errors import BaseModelError
from veneer.nn.modes import evaluating


def check_sharing(model: PreTrainedModel) -> None:
    """Prove on two short sequences that a beginning computed once gives what it gives in each sequence.

    The adapter takes part as it is. What is drawn at random is left out here, see `draws_at_random`.

    Raises:
        BaseModelError: If it does not, or whether it pays is not known, with the reason.
    """
    name = type(model).__name__
    if model.device.type != "cpu":
        raise BaseModelError(f"whether it pays on {model.device.type} to share what rows begin with is not measured")
    if invocation_of(model):
        raise BaseModelError("an activated adapter begins at another place in each row")
    batch = _probe(model)
    places = torch.cat(batch.expanded_places())
    with evaluating(model), torch.no_grad(), ragged_attention(model):
        got_TD = hidden_states(model, batch)[places]
        expected_TD = hidden_states(model, batch.expanded())
    difference = relative_error(got_TD, expected_TD)
    tolerance = 1e-3 if got_TD.dtype.itemsize >= 4 else 5e-2
    if not difference <= tolerance:
        raise BaseModelError(
            f"{name} gives something else for rows that share their beginning "
            f"(by {difference:.2g} of its size, allowed {tolerance:g})"
        )


def draws_at_random(model: PreTrainedModel) -> bool:
    """Tell whether a forward in training mode draws random numbers; the caller's stay as they are. On a CPU."""
    with torch.random.fork_rng(devices=[]), evaluating(model), torch.no_grad(), ragged_attention(model):
        model.train()  # `evaluating` puts every module's mode back
        before = torch.get_rng_state()
        hidden_states(model, probe_batch(model))
        return not torch.get_rng_state().equal(before)


def _probe(model: PreTrainedModel) -> RaggedBatch:
    """Return two sequences of 6 and 7 tokens that begin with the same 5."""
    lengths = (5, 1, 2)
    token_ids = torch.arange(sum(lengths)) * 7 % min(model.get_input_embeddings().weight.shape[0], 1000)
    return RaggedBatch(token_ids, torch.zeros(sum(lengths), dtype=torch.bool), lengths, prefixes=(None, 0, 0))
