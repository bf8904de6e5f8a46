"""Let a model write: prompts of any lengths in, their continuations out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.base.activation import generation_segments, invocation_of
from veneer.config import SamplingConfig
from veneer.nn.attach import attachment_of
from veneer.nn.modes import evaluating

GREEDY = SamplingConfig()


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig = GREEDY,
    tokens_per_batch: int = 4096,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue prompts; return the texts in their order, without special tokens.

    Prompts of like length go through the model together, padded on the left; the padding is masked.

    Args:
        model: A language model; an attached adapter is used.
        tokenizer: Its tokenizer.
        prompts: Token ids, see `veneer.data.encode.prompt_ids`; none empty.
        sampling: How tokens are chosen.
        tokens_per_batch: Token budget of a batch, continuation included.
        on_done: Called with the number of prompts that were finished.

    Cost:
        Two forward products of the model's weights per token; keys and values of a batch are cached.
    """
    texts = [""] * len(prompts)
    with evaluating(model):
        for part in _batches([len(prompt) for prompt in prompts], sampling.max_new_tokens, tokens_per_batch):
            for index, ids in zip(part, _continue(model, tokenizer, [prompts[i] for i in part], sampling), strict=True):
                texts[index] = tokenizer.decode(ids, skip_special_tokens=True)
            if on_done is not None:
                on_done(len(part))
    return texts


def _batches(lengths: Sequence[int], new_tokens: int, budget: int) -> Iterator[list[int]]:
    """Yield the prompts' numbers, the longest first, as many at once as the budget holds."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, budget // (lengths[order[0]] + new_tokens))
        yield order[:count]
        order = order[count:]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]), torch.no_grad():
        torch.manual_seed(sampling.seed)
        settings = _settings(model, tokenizer, sampling)
        with _own_settings(model), _activated(model, ids):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
    return out[:, width:].tolist()


def _activated(model: PreTrainedModel, ids: torch.Tensor) -> AbstractContextManager[None]:
    """Let an adapter act from its invocation on, where it has one."""
    invocation = invocation_of(model)
    if not invocation:
        return nullcontext()
    return attachment_of(model).routing.by_rows(generation_segments(ids.tolist(), invocation).values())


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Take a checkpoint's own generation settings away within the block: transformers fills ours up with them."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig) -> GenerationConfig:
    """Return exactly our settings: a checkpoint's own sampling defaults are not ours to inherit."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0),
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
