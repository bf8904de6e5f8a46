"""Scores of what a model writes: a registry of plain functions, predictions and references in, numbers out.

A new score is a function and `@_score("name")`. All of them count in whole numbers and divide once, so that
the order of the rows changes no bit of the result.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any, TypeAlias

from veneer.errors import ConfigError, DataError, MissingDependencyError, shortened
from veneer.names import did_you_mean

ScoreFunction: TypeAlias = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
Field: TypeAlias = tuple[tuple[str | int, ...], str, object]

SCORES: dict[str, ScoreFunction] = {}

_LISTED = 20


def _score(name: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Enter a function into the registry under a name."""

    def enter(function: ScoreFunction) -> ScoreFunction:
        SCORES[name] = function
        return function

    return enter


def score(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the named scores of predictions against references, in one dictionary.

    Equals the union of `SCORES[name](predictions, references)` over the names.

    Args:
        names: Keys of `SCORES`: exact_match, json, accuracy, bleu, chrf.
        predictions: What the model wrote, one for each row.
        references: What it should have written, in the same order.

    Raises:
        ConfigError: No name, an unknown name, or one string in place of a list of names.
        DataError: No rows, unequal lengths, something that is not a string, or a reference that a score cannot read.
        MissingDependencyError: bleu or chrf without sacrebleu.

    Example:
        >>> score(["exact_match", "accuracy"], ["Yes ", "no"], ["yes", "no"])
        {'exact_match': 0.5, 'accuracy': 1.0, 'macro_f1': 1.0}
    """
    if isinstance(names, str) or not names:
        raise ConfigError(f"scores must be a list of at least one of {', '.join(SCORES)}; got {names!r}")
    check_scores(names)
    if len(predictions) != len(references) or not references:
        raise DataError(
            "scores need one prediction for each reference, and at least one row; "
            f"got {len(predictions)} predictions and {len(references)} references"
        )
    problems = (
        f"row {number}: the {what} must be a string, is {value!r:.60}"
        for what, values in (("prediction", predictions), ("reference", references))
        for number, value in enumerate(values, 1)
        if not isinstance(value, str)
    )
    _refuse("scores compare strings", problems)
    return {key: value for name in names for key, value in SCORES[name](predictions, references).items()}


def check_scores(names: Sequence[str]) -> None:
    """Raise unless every name is a score's; cheap, to be called before a model is loaded.

    Raises:
        ConfigError: Naming each that is unknown, with the nearest.

    Example:
        >>> check_scores(["exact_match"])
    """
    unknown = [f"{name!r} is not a score{did_you_mean(name, SCORES)}" for name in names if name not in SCORES]
    if unknown:
        raise ConfigError(f"unknown score; choose from {', '.join(SCORES)}", unknown)


def _refuse(message: str, problems: Iterator[str]) -> None:
    """Raise if there is a problem; list the first ones and count the rest."""
    listed = list(islice(problems, _LISTED))
    more = sum(1 for _ in problems)
    if listed:
        raise DataError(message, shortened(listed, _LISTED, len(listed) + more))


@_score("exact_match")
def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    r"""Return the share of predictions equal to their reference, white space at both ends aside.

    Example:
        >>> exact_match(["2024-01-31\n", "2024-02-01"], ["2024-01-31", "2024-02-02"])
        {'exact_match': 0.5}
    """
    hits = sum(one.strip() == other.strip() for one, other in zip(predictions, references, strict=True))
    return {"exact_match": hits / len(references)}


@_score("accuracy")
def accuracy(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the share of right labels, and F1 averaged over the labels of the references.

    With `hits`, `predicted` and `true` the counts of one label, its F1 is `2 * hits / (predicted + true)`.
    Labels are compared without white space at the ends and without case.

    Example:
        >>> accuracy(["CARD ", "I think it is a loan"], ["card", "loan"])
        {'accuracy': 0.5, 'macro_f1': 0.5}

    Source:
        scikit-learn's `f1_score(average="macro")`. Differs: a prediction that is no reference's label counts
        as a miss of its row's label, not as one more label, as free text would add a label for each wording.
    """
    predicted = [text.strip().casefold() for text in predictions]
    true = [text.strip().casefold() for text in references]
    hits = Counter(other for one, other in zip(predicted, true, strict=True) if one == other)
    count_predicted, count_true = Counter(predicted), Counter(true)
    each = [2 * hits[label] / (count_predicted[label] + count) for label, count in count_true.items()]
    return {"accuracy": sum(hits.values()) / len(true), "macro_f1": math.fsum(each) / len(each)}


@_score("json")
def json_fields(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return how much of the references' JSON the predictions hold, field by field, counted over all rows.

    A field is a pair of path and value: objects and lists are flattened, list items go by index, and an empty
    object or list is a value of its own. Numbers are compared by value (1 equals 1.0), strings exactly, and
    true or false equals no number. With `P_i`, `R_i` the sets of fields of row i:

        hits = sum(len(P_i & R_i)); precision = hits / sum(len(P_i)); recall = hits / sum(len(R_i))
        field_f1 = 2 * hits / (sum(len(P_i)) + sum(len(R_i)))

    A prediction that is not strict JSON (a fence or words around it, a key twice, NaN) has no fields.

    Raises:
        DataError: References that are not JSON, each with its row, counted from 1.

    Example:
        >>> json_fields(['{"a": 1.0, "b": "x"}'], ['{"a": 1, "b": "y"}'])["json_field_f1"]
        0.5
    """
    parsed = [_parse(text) for text in references]
    problems = (
        f"row {at}: {one} in {references[at - 1]!r:.60}" for at, one in enumerate(parsed, 1) if type(one) is str
    )
    _refuse("the score 'json' needs references that are JSON", problems)
    valid = exact = hits = count_predicted = count_true = 0
    for text, true in zip(predictions, parsed, strict=True):
        fields = _parse(text)
        count_true += len(true)
        if isinstance(fields, set):
            valid += 1
            exact += fields == true
            hits += len(fields & true)  # type: ignore[operator]
            count_predicted += len(fields)
    return {
        "json_exact_match": exact / len(references),
        "json_field_f1": 2 * hits / (count_predicted + count_true),
        "json_precision": hits / count_predicted if count_predicted else 0.0,
        "json_recall": hits / count_true,
        "json_valid": valid / len(references),
    }


def _parse(text: str) -> set[Field] | str:
    """Return the fields of a JSON text, or what is wrong with it."""
    try:
        return set(_fields(_DECODER.decode(text.strip())))
    except RecursionError:
        return "nested too deep"
    except (ValueError, ArithmeticError) as error:  # not JSON; a number with an exponent out of all range
        return f"not JSON ({error})"


def _fields(tree: Any) -> Iterator[Field]:
    """Flatten a JSON value into (path, kind, value); on a stack, as the depth is the model's to choose."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), tree)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict) and value:
            stack.extend(((*path, key), item) for key, item in value.items())
        elif isinstance(value, list) and value:
            stack.extend(((*path, index), item) for index, item in enumerate(value))
        elif isinstance(value, (dict, list)):
            yield path, type(value).__name__, None
        else:
            yield path, type(value).__name__, value  # the kind keeps True apart from 1


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# Decimal: 1 and 1.0 are equal, 1e400 is not infinite, and long integers are no error.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_int=Decimal, parse_float=Decimal, parse_constant=_no_constant
)


@_score("bleu")
def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the corpus BLEU, 0 to 100, of one reference for each prediction, as sacrebleu counts it.

    A corpus whose predictions hold no four tokens in a row has a BLEU of 0, however right they are.

    Raises:
        MissingDependencyError: Without sacrebleu.

    Source:
        Papineni et al. 2002; Post 2018, arXiv:1804.08771 (tokenizer 13a, exponential smoothing).
    """
    return {"bleu": float(_sacrebleu("bleu").corpus_bleu(list(predictions), [list(references)], force=True).score)}


@_score("chrf")
def chrf(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the corpus chrF2, 0 to 100, of one reference for each prediction, as sacrebleu counts it.

    Raises:
        MissingDependencyError: Without sacrebleu.

    Source:
        Popović 2015, chrF: character n-gram F-score.
    """
    return {"chrf": float(_sacrebleu("chrf").corpus_chrf(list(predictions), [list(references)]).score)}


def _sacrebleu(name: str) -> Any:
    """Import sacrebleu where it is needed: it is optional, and slow to load."""
    try:
        import sacrebleu
    except ImportError:
        raise MissingDependencyError(f"the score {name!r} needs sacrebleu: pip install 'veneer[eval]'") from None
    return sacrebleu
