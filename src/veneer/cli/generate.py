"""`veneer generate`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import veneer
from veneer.cli.models import open_base, sampling_from
from veneer.cli.output import (
    AdapterFolder,
    AnyBase,
    Dtype,
    Json,
    Set,
    Storage,
    answers_bar,
    log_to_stderr,
    print_result,
)
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from veneer.config import SamplingConfig

EXAMPLE = "Example: veneer generate smollm2 --adapter runs/tickets/adapter --prompt 'Hello' --set max_new_tokens=50"


def generate(
    base: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file or embedded model.")],
    adapter: AdapterFolder = None,
    any_base: AnyBase = False,
    storage: Storage = None,
    dtype: Dtype = None,
    prompt: Annotated[str | None, typer.Option(help="What to answer.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts: rows (.jsonl, .csv), or one a line (.txt).")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message before what you say.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Let a model answer a prompt, a file of prompts, or, without either, you: a chat until an empty line.

    Settings: max_new_tokens, temperature (0 is greedy), top_p, seed.
    """
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --file exclude each other; choose one, or neither for a chat")
    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out; choose one")
    talking = prompt is None and file is None
    if talking and as_json:
        raise ConfigError("--json needs --prompt or --file; a chat is for people")
    log_to_stderr()
    sampling = sampling_from(settings)
    prompts = _from_file(file, system) if file is not None else [] if prompt is None else [prompt]
    opened = open_base(base, adapter, any_base, storage, dtype)
    tokenizer = opened.tokenizer
    opening = [] if system is None else [{"role": "system", "content": system}]
    if not raw and tokenizer.chat_template is not None:
        prompts = [_turns(one, opening) for one in prompts]
    elif system is not None or talking:
        raise ConfigError("this base model has no chat template to talk with, or for --system; use --prompt alone")
    model = opened.model()
    if talking:
        _talk(model, tokenizer, sampling, opening)
        return
    with answers_bar(len(prompts)) as on_done:
        answers = veneer.generate(model, tokenizer, prompts, sampling=sampling, on_done=on_done)
    if as_json:
        inputs = {"base": base, "adapter": adapter, "file": file}
        print_result("generate", inputs, {"digest": opened.digest, "answers": answers})
        return
    print(*answers, sep="\n\n")


def _from_file(file: str, system: str | None) -> Sequence[Any]:
    """Return the prompts of a file: rows as they are, lines of text as what a person says.

    Raises:
        ConfigError: If a system message is given for rows, which say themselves what they begin with.
    """
    if file.lower().endswith(".txt"):
        return [one.start for one in veneer.read_prompts(file)]
    if system is not None:
        raise ConfigError(f"--system goes with --prompt or a .txt file; the rows of {file} bring their own messages")
    return veneer.read_prompts(file)


def _turns(prompt: Any, opening: list[dict[str, str]]) -> Any:
    """Return what a person says as a turn of a dialogue; rows of a file say themselves what they are."""
    return [*opening, {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _talk(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sampling: "SamplingConfig",
    opening: list[dict[str, str]],
) -> None:
    """Answer turn by turn until an empty line or the end of the input."""
    turns = list(opening)
    print("Say something; an empty line ends the chat.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        said = sys.stdin.readline().strip()
        if not said:
            return
        turns.append({"role": "user", "content": said})
        answer = veneer.generate(model, tokenizer, [turns], sampling=sampling)[0]
        print(answer, flush=True)
        turns.append({"role": "assistant", "content": answer})
