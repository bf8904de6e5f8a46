"""Generation: what a prompt gives does not depend on what else is in the batch."""

import torch

from veneer.base.generate import generate_ids
from veneer.config import SamplingConfig
from veneer.data.answers import generate

PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15], [20, 21]]


def test_batched_equals_alone_and_greedy_by_hand(tiny, tokenizer):
    model = tiny()
    sampling = SamplingConfig(max_new_tokens=6)
    done = []
    together = generate_ids(model, tokenizer, PROMPTS, sampling=sampling, on_done=done.append)
    alone = [generate_ids(model, tokenizer, [prompt], sampling=sampling)[0] for prompt in PROMPTS]
    assert together == alone
    assert sum(done) == len(PROMPTS)
    ids = list(PROMPTS[0])
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert together[0] == tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_small_batches_change_nothing(tiny, tokenizer):
    model, sampling = tiny(), SamplingConfig(max_new_tokens=4)
    whole = generate_ids(model, tokenizer, PROMPTS, sampling=sampling)
    assert generate_ids(model, tokenizer, PROMPTS, sampling=sampling, tokens_per_batch=8) == whole


def test_the_seed_fixes_what_is_drawn_and_the_caller_keeps_its_random_state(tiny, tokenizer):
    model = tiny().train()
    state = torch.get_rng_state()

    def drawn(seed: int) -> list[str]:
        settings = SamplingConfig(max_new_tokens=12, temperature=1.5, seed=seed)
        return generate_ids(model, tokenizer, PROMPTS, sampling=settings)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_dialogues_go_through_the_template_and_texts_do_not(tiny, tokenizer):
    model, sampling = tiny(), SamplingConfig(max_new_tokens=4)
    said = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert generate(model, tokenizer, [said], sampling=sampling) == generate(
        model, tokenizer, [rendered], sampling=sampling
    )


def test_a_checkpoints_own_generation_settings_do_not_act(tiny, tokenizer):
    model, sampling = tiny(), SamplingConfig(max_new_tokens=8)
    expected = generate_ids(model, tokenizer, PROMPTS, sampling=sampling)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(100, 200))
    assert generate_ids(model, tokenizer, PROMPTS, sampling=sampling) == expected
    assert model.generation_config.repetition_penalty == 5.0
