"""`veneer generate`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import veneer
from veneer.cli.models import load, sampling_from
from veneer.cli.output import AdapterFolder, Json, Set, answers_bar, log_to_stderr, print_json
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from veneer.config import SamplingConfig

EXAMPLE = "Example: veneer generate smollm2 --adapter runs/tickets/adapter --prompt 'Hello' --set max_new_tokens=50"


def generate(
    base: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file or embedded model.")],
    adapter: AdapterFolder = None,
    prompt: Annotated[str | None, typer.Option(help="What to answer.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts: rows (.jsonl, .csv), or one a line (.txt).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk, turn by turn, until an empty line.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Let a model answer a prompt, a file of prompts, or you.

    Settings: max_new_tokens, temperature (0 is greedy), top_p, seed.
    """
    if sum((prompt is not None, file is not None, chat)) != 1:
        raise ConfigError("expected one of --prompt TEXT, --file FILE and --chat")
    log_to_stderr()
    sampling = sampling_from(settings)
    prompts = _from_file(file) if file is not None else [] if prompt is None else [prompt]
    model, tokenizer = load(base, adapter)
    if not raw and tokenizer.chat_template is not None:
        prompts = [_turn(one) for one in prompts]
    if chat:
        _talk(model, tokenizer, sampling)
        return
    with answers_bar(len(prompts)) as on_done:
        answers = veneer.generate(model, tokenizer, prompts, sampling=sampling, on_done=on_done)
    if as_json:
        print_json({"answers": answers})
        return
    for answer in answers:
        print(answer)


def _from_file(file: str) -> Sequence[Any]:
    """Return the prompts of a file: rows as they are, lines of text as what a person says."""
    found = veneer.read_prompts(file)
    return [one.start for one in found] if file.endswith(".txt") else found


def _turn(prompt: Any) -> Any:
    """Return what a person says as a turn of a dialogue; rows of a file say themselves what they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _talk(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sampling: "SamplingConfig") -> None:
    """Answer turn by turn until an empty line or the end of the input."""
    if tokenizer.chat_template is None:
        raise ConfigError("this base model has no chat template to talk with; use --prompt")
    turns: list[dict[str, str]] = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        said = sys.stdin.readline().strip()
        if not said:
            return
        turns.append({"role": "user", "content": said})
        answer = veneer.generate(model, tokenizer, [turns], sampling=sampling)[0]
        print(answer, flush=True)
        turns.append({"role": "assistant", "content": answer})
