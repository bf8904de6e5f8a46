"""Activated LoRA: silent before its invocation, itself from there on, in one pass and in generation."""

import pytest
import torch

import veneer
from veneer.base.activation import activation_start, generation_segments, ragged_segments
from veneer.base.generate import generate_ids
from veneer.base.ragged import RaggedBatch, hidden_states, ragged_attention
from veneer.config import LoRAConfig, SamplingConfig
from veneer.errors import AttachError, BaseModelError
from veneer.nn.attach import attach, attachment_of, detach, disabled
from veneer.scoring.loss import summed_loss

INVOCATION = (40, 41)
CONFIG = LoRAConfig(rank=2, alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], invocation_tokens=INVOCATION)
WITH, WITHOUT = [9, 40, 41, 8, 40, 41, 7, 6], [9, 40, 8, 41, 5]


def filled(model) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attachment_of(model).parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def hidden(model, *sequences):
    ids = torch.tensor([token for one in sequences for token in one])
    batch = RaggedBatch(ids, torch.zeros(len(ids), dtype=torch.bool), tuple(map(len, sequences)))
    with torch.no_grad(), ragged_attention(model):
        return hidden_states(model, batch).split(batch.lengths)


def test_the_last_invocation_counts():
    assert activation_start(WITH, INVOCATION) == 4
    assert activation_start(WITHOUT, INVOCATION) is None
    assert [one.slot for one in ragged_segments([WITH, WITHOUT, WITH], INVOCATION)] == [None, 0, None, 0]
    by_rows = generation_segments([[0, *WITHOUT], WITH[2:]], INVOCATION)
    assert {rows: [one.slot for one in segments] for rows, segments in by_rows.items()} == {2: [None, 0], 12: [None, 0]}


def test_before_the_invocation_all_is_the_base_s(tiny):
    model = tiny()
    base = hidden(model, WITH, WITHOUT)
    attach(model, CONFIG)
    filled(model)
    got = hidden(model, WITH, WITHOUT)
    assert torch.equal(got[0][:4], base[0][:4])
    assert not torch.allclose(got[0][4:], base[0][4:], atol=1e-3)
    torch.testing.assert_close(got[1], base[1])


def test_generation_continues_what_one_pass_would(tiny, tokenizer):
    model = tiny()
    attach(model, CONFIG)
    filled(model)
    sampling = SamplingConfig(max_new_tokens=4)
    texts = generate_ids(model, tokenizer, [WITH, WITHOUT], sampling=sampling)
    for prompt, text in zip((WITH, WITHOUT), texts, strict=True):
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model.lm_head(hidden(model, ids)[0][-1]).argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_an_adapted_head_cannot_be_routed(tiny):
    model = tiny(tie_word_embeddings=False)
    attach(model, LoRAConfig(rank=2, target_modules=["lm_head"], invocation_tokens=INVOCATION))
    batch = RaggedBatch(torch.tensor(WITH), torch.tensor([False] * 6 + [True] * 2), (len(WITH),))
    with ragged_attention(model), pytest.raises(BaseModelError, match="an adapted head"):
        summed_loss(model, batch)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_means_the_same_both_ways(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny()
    attach(model, CONFIG)
    filled(model)
    ours = hidden(model, WITH)[0]
    veneer.save_adapter(detach(model), tmp_path / "ours")
    loaded = veneer.load_adapter(tmp_path / "ours")
    assert loaded.config == CONFIG
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    wrapped.peft_config["default"].task_type = "CAUSAL_LM"
    with torch.no_grad():
        ids = torch.tensor([WITH])
        theirs = peft.PeftModelForCausalLM(tiny(), peft_config(wrapped)).eval()
        theirs.load_state_dict(wrapped.state_dict())
        logits = theirs(input_ids=ids).logits[0]
    torch.testing.assert_close(tiny().lm_head(ours), logits, rtol=1e-4, atol=1e-5)


def peft_config(wrapped):
    return wrapped.peft_config["default"]


def test_a_plain_call_is_refused_and_the_base_alone_is_not(tiny):
    """It would act everywhere: silently another adapter than the one that is saved."""
    model = tiny()
    base = model(input_ids=torch.tensor([WITH])).logits
    attach(model, CONFIG)
    with pytest.raises(AttachError, match="acts from its invocation_tokens on"):
        model(input_ids=torch.tensor([WITH]))
    with disabled(model):
        assert torch.equal(model(input_ids=torch.tensor([WITH])).logits, base)


def test_a_trained_one_is_evaluated(tiny, tokenizer, tmp_path):
    model = tiny()
    attach(model, CONFIG)
    filled(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "abc", "completion": "def"}\n')
    got = veneer.evaluate(model, tokenizer, str(rows))
    with disabled(model):
        silent = veneer.evaluate(model, tokenizer, str(rows))
    assert got.loss == pytest.approx(silent.loss, rel=1e-6)  # no invocation in the row
