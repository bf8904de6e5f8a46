"""How good a model is on a file of rows: its loss, and scores of what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.base.generate import GREEDY
from veneer.base.load import num_positions
from veneer.config import SamplingConfig
from veneer.data.answers import generate
from veneer.data.encode import EncodedRows
from veneer.data.records import Tick
from veneer.data.rows import CheckedRows, Prompt, Row, as_prompt
from veneer.data.store import Settings, encode_checked, recall_or_check
from veneer.errors import DataError, shortened
from veneer.scoring.loss import evaluate_loss
from veneer.scoring.scores import score

_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class PreparedRows:
    """Rows that an evaluation can use, see `prepare_evaluation`.

    Args:
        encoded: The rows as the model sees them.
        prompts: What to ask for each row, where scores are asked for.
        scores: Names of the scores.
        bad_rows: "file:line: what is wrong" for every row left out.
    """

    encoded: EncodedRows
    prompts: tuple[Prompt, ...]
    scores: tuple[str, ...]
    bad_rows: tuple[str, ...]


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
    data: str | PreparedRows,
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
        data: File of rows, or rows that `prepare_evaluation` prepared, with scores and all.
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
    if isinstance(data, str):
        positions = num_positions(model.config)
        data = prepare_evaluation(tokenizer, data, scores=scores, positions=positions, skip_bad_rows=skip_bad_rows)
    loss = evaluate_loss(model, data.encoded)
    got = generate(model, tokenizer, data.prompts, sampling=sampling, on_done=on_done) if data.prompts else []
    return Evaluation(
        num_rows=data.encoded.num_sources,
        num_supervised=loss.num_supervised,
        loss=loss.mean,
        perplexity=loss.perplexity,
        scores=score(data.scores, got, _expected(data.prompts)) if data.scores else {},
        answers=tuple(
            Answer(prompt.source, _text(prompt), prompt.answer or "", text)
            for prompt, text in zip(data.prompts, got, strict=True)
        ),
        bad_rows=data.bad_rows,
    )


def prepare_evaluation(
    tokenizer: PreTrainedTokenizerBase,
    data: str | CheckedRows,
    *,
    scores: Sequence[str] = (),
    positions: int | None = None,
    skip_bad_rows: bool = False,
    tick: Tick | None = None,
) -> PreparedRows:
    """Read and encode rows for an evaluation; all that can be wrong with them is said before a model is loaded.

    Args:
        tokenizer: The model's tokenizer.
        data: File of rows, or what `check_rows` returned; the rows themselves are not held.
        scores: Names of the scores.
        positions: Longest row that the model can take; None for any.
        skip_bad_rows: Leave out rows that cannot be used.
        tick: Called now and then with the share of the work that is done; what it raises ends the work.

    Raises:
        DataError: If rows cannot be used.
        ConfigError: If a score is unknown.
    """
    tick = tick or _go_on
    found = recall_or_check(data, skip_bad_rows=skip_bad_rows, tick=tick) if isinstance(data, str) else data
    encoded = encode_checked(found, Settings(tokenizer, positions or _NO_LIMIT, skip_bad_rows), tick)
    prompts: list[Prompt] = []
    if scores:  # an answer is written for each: these rows are few
        used = set(encoded.sources)
        prompts = _prompts([row for _, row in found.rows(tick) if row.source in used])
    if scores:  # names, packages and references are right, or it is said before any work
        score(scores, _expected(prompts), _expected(prompts))
    return PreparedRows(encoded, tuple(prompts), tuple(scores), (*found.bad_lines, *encoded.bad))


def _go_on(share: float) -> None:
    """Nobody looks, nobody stops the work."""


def _expected(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.answer or "" for prompt in prompts]


def _prompts(rows: Sequence[Row]) -> list[Prompt]:
    """Return what to ask for each row.

    Raises:
        DataError: If a row has no answer to compare with.
    """
    prompts = [as_prompt(row) for row in rows]
    lacking = [f"{prompt.source}: the last turn is not the assistant's" for prompt in prompts if prompt.answer is None]
    if lacking:
        raise DataError(f"{len(lacking)} of {len(rows)} rows have no answer to compare with", shortened(lacking, 20))
    return prompts


def _text(prompt: Prompt) -> str:
    """Return what a person would call the prompt: the text, or the last turn before the answer."""
    return prompt.start if isinstance(prompt.start, str) else prompt.start[-1].content
