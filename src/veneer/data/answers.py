"""What a model answers to prompts, rendered and tokenised exactly as in training."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.base.generate import GREEDY, generate_ids
from veneer.config import SamplingConfig
from veneer.data.encode import prompt_ids
from veneer.data.rows import Message, Prompt
from veneer.errors import DataError

Asked: TypeAlias = str | Sequence[Mapping[str, str]] | Prompt
"""A text to continue, the turns of a dialogue, or a prompt read from a file."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    *,
    sampling: SamplingConfig = GREEDY,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Let a model answer prompts; return the answers in their order.

    Args:
        model: A language model; an attached adapter is used.
        tokenizer: Its tokenizer, with a chat template where dialogues are asked.
        prompts: A string is continued as it is; a list of `{"role", "content"}` goes through the chat template.
        sampling: How tokens are chosen; greedily by default.
        on_done: Called with the number of prompts that were finished.

    Raises:
        DataError: If a prompt is empty or the template rejects a dialogue.

    Example:
        model, tokenizer = load_base("smollm2")
        generate(model, tokenizer, [[{"role": "user", "content": "What is 2 + 2?"}]])
    """
    asked = [_as_prompt(prompt, number) for number, prompt in enumerate(prompts, start=1)]
    ids = [prompt_ids(prompt, tokenizer) for prompt in asked]
    empty = [prompt.source for prompt, tokens in zip(asked, ids, strict=True) if not tokens]
    if empty:
        raise DataError("a prompt needs at least one token", empty)
    return generate_ids(model, tokenizer, ids, sampling=sampling, on_done=on_done)


def _as_prompt(asked: Asked, number: int) -> Prompt:
    if isinstance(asked, Prompt):
        return asked
    source = f"prompt {number}"
    if isinstance(asked, str):
        return Prompt(source, asked, None)
    return Prompt(source, tuple(Message(turn["role"], turn["content"]) for turn in asked), None)
