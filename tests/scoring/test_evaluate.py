"""Loss and scores of a model on a file of rows."""

import json

import pytest
import torch
import torch.nn.functional as F

import veneer
from veneer.base.ragged import ragged_attention
from veneer.data.batches import make_batch
from veneer.data.encode import encode_rows
from veneer.data.rows import read_rows
from veneer.errors import ConfigError, DataError
from veneer.scoring.evaluate import evaluate
from veneer.scoring.loss import evaluate_loss, summed_loss


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [("What is 2 + 2?", "4"), ("Say hello to the whole wide world", "hello, world"), ("x", "y")]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in turns
        )
    )
    return str(path)


def encoded(rows, tokenizer):
    return encode_rows(read_rows(rows).rows, tokenizer, max_length=500).rows


def loss_by_hand(model, one) -> tuple[float, int]:
    """Cross-entropy of a row's supervised tokens, from the model's own logits."""
    ids = one.token_ids.long()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")[one.supervised[1:]]
    return losses.sum().item(), len(losses)


def test_the_loss_is_the_mean_over_supervised_tokens(tiny, tokenizer, rows):
    model = tiny().train()
    parts = [loss_by_hand(model, one) for one in encoded(rows, tokenizer)]
    for budget in (1, 60, 4096):
        found = evaluate_loss(model, encoded(rows, tokenizer), tokens_per_batch=budget)
        assert found.mean == pytest.approx(sum(a for a, _ in parts) / sum(b for _, b in parts), rel=1e-5)
        assert found.num_supervised == sum(b for _, b in parts)
    assert model.training


@pytest.mark.parametrize("how", ["adapted", "trained"])
def test_a_head_that_trains_gives_the_same_loss_and_its_gradients(how, tiny, tokenizer, rows):
    model = tiny(tie_word_embeddings=False)
    batch = make_batch(encoded(rows, tokenizer))
    with ragged_attention(model):
        expected = summed_loss(model, batch)
    config = {"target_modules": ["lm_head"]} if how == "adapted" else {"modules_to_save": ["lm_head"]}
    attachment = veneer.attach(model, veneer.LoRAConfig(**config))
    with ragged_attention(model):
        loss = summed_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    head = [parameter for name, parameter in attachment.parameters().items() if "lm_head" in name]
    assert any(parameter.grad.any() for parameter in head)


def test_scores_compare_what_the_model_answers(tiny, tokenizer, rows):
    model = tiny()
    done = []
    found = evaluate(
        model,
        tokenizer,
        rows,
        scores=["exact_match", "accuracy"],
        sampling=veneer.SamplingConfig(max_new_tokens=4),
        on_done=done.append,
    )
    assert found.num_rows == len(found.answers) == sum(done) == 3
    assert [answer.expected for answer in found.answers] == ["4", "hello, world", "y"]
    assert found.answers[0].prompt == "What is 2 + 2?"
    assert set(found.scores) == {"exact_match", "accuracy", "macro_f1"}
    assert found.perplexity == pytest.approx(torch.tensor(found.loss).exp().item(), rel=1e-5)
    right = veneer.evaluate(model, tokenizer, rows)
    assert (right.loss, right.scores, right.answers) == (found.loss, {}, ())


def test_mistakes_are_said_before_any_work(tiny, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.scoring.evaluate.evaluate_loss", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match="exact_match"):
        evaluate(tiny(), tokenizer, rows, scores=["exact_mach"])
    with pytest.raises(DataError, match="JSON"):
        evaluate(tiny(), tokenizer, rows, scores=["json"])
    open_end = tmp_path / "open.jsonl"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    open_end.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="no answer to compare with"):
        evaluate(tiny(), tokenizer, str(open_end), scores=["exact_match"])


def test_rows_left_out_are_left_out_of_loss_and_scores(tiny, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, bad, good)) + "{\n")
    found = evaluate(
        tiny(),
        tokenizer,
        str(path),
        scores=["exact_match"],
        sampling=veneer.SamplingConfig(max_new_tokens=2),
        skip_bad_rows=True,
    )
    assert (found.num_rows, len(found.answers), len(found.bad_rows)) == (2, 2, 2)
