"""How good a model is on a file of rows: its loss, and scores of what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.base.generate import GREEDY
from veneer.base.ragged import check_ragged
from veneer.config import SamplingConfig
from veneer.data.answers import generate
from veneer.data.encode import encode_rows
from veneer.data.rows import Prompt, Row, RowsRead, as_prompt, read_rows
from veneer.errors import DataError
from veneer.scoring.loss import evaluate_loss
from veneer.scoring.scores import score

_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Answer:
    """What a model answered to one row."""

    source: str
    prompt: str
    expected: str
    got: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        num_rows: Rows evaluated.
        num_supervised: Tokens that the loss is the mean over.
        loss: Nats per supervised token.
        perplexity: `exp(loss)`.
        scores: Score by name.
        answers: What was answered, where scores were asked for.
        bad_rows: "file:line: what is wrong" for every row left out.
    """

    num_rows: int
    num_supervised: int
    loss: float
    perplexity: float
    scores: dict[str, float]
    answers: tuple[Answer, ...]
    bad_rows: tuple[str, ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | RowsRead,
    *,
    scores: Sequence[str] = (),
    sampling: SamplingConfig = GREEDY,
    skip_bad_rows: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate a model, with the adapter that is attached, on a file of rows.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        data: File of rows, or what `read_rows` returned.
        scores: Names in `veneer.scoring.scores.SCORES`; each compares generated answers with the rows'.
        sampling: How answers are generated.
        skip_bad_rows: Leave out rows that cannot be used.
        on_done: Called with the number of answers that were finished.

    Raises:
        DataError: If rows cannot be used.
        ConfigError: If a score is unknown.
        BaseModelError: If the model cannot take ragged batches.

    Example:
        evaluate(model, tokenizer, "valid.jsonl", scores=["exact_match"]).scores["exact_match"]
    """
    found = read_rows(data, skip_bad_rows=skip_bad_rows) if isinstance(data, str) else data
    encoded = encode_rows(found.rows, tokenizer, max_length=_NO_LIMIT, skip_bad_rows=skip_bad_rows)
    used = {row.source for row in encoded.rows}
    rows = [row for row in found.rows if row.source in used]
    prompts = _prompts(rows) if scores else []
    expected = [prompt.answer or "" for prompt in prompts]
    if scores:
        score(scores, expected, expected)  # names, packages and references are right, or it is said before any work
    check_ragged(model)
    loss = evaluate_loss(model, encoded.rows)
    got = generate(model, tokenizer, prompts, sampling=sampling, on_done=on_done) if scores else []
    return Evaluation(
        num_rows=len(rows),
        num_supervised=loss.num_supervised,
        loss=loss.mean,
        perplexity=loss.perplexity,
        scores=score(scores, got, expected) if scores else {},
        answers=tuple(
            Answer(prompt.source, _text(prompt), prompt.answer or "", text)
            for prompt, text in zip(prompts, got, strict=True)
        ),
        bad_rows=(*found.bad, *encoded.bad),
    )


def _prompts(rows: Sequence[Row]) -> list[Prompt]:
    """Return what to ask for each row.

    Raises:
        DataError: If a row has no answer to compare with.
    """
    prompts = [as_prompt(row) for row in rows]
    lacking = [f"{prompt.source}: the last turn is not the assistant's" for prompt in prompts if prompt.answer is None]
    if lacking:
        raise DataError(f"{len(lacking)} of {len(rows)} rows have no answer to compare with", lacking[:20])
    return prompts


def _text(prompt: Prompt) -> str:
    """Return what a person would call the prompt: the text, or the last turn before the answer."""
    return prompt.start if isinstance(prompt.start, str) else prompt.start[-1].content
