"""A step whose rows share a prompt gives the loss and the gradients of rows alone, from fewer tokens."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.base.test_fast import attached, model_of
from tests.data.test_sharing import chat

from veneer.base.batching import Way
from veneer.config import TrainConfig
from veneer.data.batches import pack
from veneer.data.encode import EncodedRow
from veneer.scoring.loss import evaluate_loss
from veneer.train.step import step_gradient
from veneer.train.ways import computing


def rows_of(prompts: int, count: int) -> list[EncodedRow]:
    found = [chat(number % prompts, 40, question=3 + number, answer=2 + number % 3) for number in range(count)]
    return [replace(one, token_ids=one.token_ids % 250 + 3) for one in found]


@contextmanager
def counting(model):
    """Yield a list that gets the tokens of each forward."""
    seen: list[int] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield seen
    handle.remove()


def gradient(model, rows, step, way):
    model.zero_grad()
    with counting(model) as seen:
        found = step_gradient(model, rows, step, lambda _: None, way=way)
    return found, [one.grad.clone() for one in model.parameters() if one.grad is not None], sum(seen)


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_a_step_equals_that_of_rows_alone(prompts):
    model, rows = attached(model_of("Llama", {})).double(), rows_of(prompts, 8)
    lengths = [len(one.token_ids) for one in rows]
    step = pack(range(8), lengths, 260)
    with computing(model, TrainConfig()) as way:
        ours, gradients, computed = gradient(model, rows, step, way)
        theirs, expected, all_tokens = gradient(model, rows, step, Way(alone="for the test"))
    assert (ours.tokens, ours.supervised) == (theirs.tokens, theirs.supervised)
    assert all_tokens == sum(lengths)
    assert computed - 31 * len(step) <= all_tokens - 40 * (8 - prompts - len(step))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    assert max(one.abs().max() for one in expected) > 0


def test_an_evaluation_computes_a_prompt_once_for_each_forward():
    model, rows = attached(model_of("Llama", {})).double(), rows_of(1, 8)
    with counting(model) as seen:
        alone = evaluate_loss(model, rows, way=Way(alone="for the test"))
        shared = evaluate_loss(model, rows, way=Way())
    assert shared.mean == pytest.approx(alone.mean, rel=1e-9)
    assert shared.num_supervised == alone.num_supervised
    assert seen[1] == seen[0] - 7 * 40


@pytest.mark.parametrize("settings", [{"fast": False}, {}], ids=["plain", "dropout"])
def test_the_plain_reference_and_dropout_compute_each_row(settings):
    model, rows = attached(model_of("Llama", {}), **({} if settings else {"dropout": 0.1})), rows_of(1, 4)
    with computing(model, TrainConfig(**settings)) as way:
        own = sum(len(one.token_ids) for one in rows)
        assert gradient(model, rows, [[0, 1, 2, 3]], way)[2] == own + -own % way.multiple
