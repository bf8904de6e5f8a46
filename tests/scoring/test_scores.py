import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError, DataError, MissingDependencyError
from veneer.scoring.scores import SCORES, score

OWN = ["exact_match", "accuracy", "json"]

texts = st.text(max_size=6) | st.sampled_from(
    ["yes", " Yes", "no", "", "{}", '{"a": 1}', '{"a": 1.0, "b": [true]}', "[1"]
)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def of_json(prediction, reference):
    result = score(["json"], [prediction], [reference])
    return [result[f"json_{name}"] for name in ("precision", "recall", "field_f1", "exact_match", "valid")]


def test_registry():
    assert list(SCORES) == ["exact_match", "accuracy", "json", "bleu", "chrf"]


def test_exact_match():
    result = score(["exact_match"], [" a\n", "A", "b c", "b  c"], ["a", "a", "b c", "b c"])
    assert result == {"exact_match": 0.5}


def test_accuracy_and_macro_f1():
    # spam: 2 of its 3 found, 2 right of 3 said, F1 2/3; ham: 1 of 2, 1 right of 1, F1 2/3; eggs: never said, 0.
    predictions = ["spam", "SPAM", "ham", " ham ", "spam", "I am not sure"]
    references = ["spam", "spam", "spam", "ham", "ham", "eggs"]
    # ham is said twice here: once rightly, 2 * 1 / (2 + 2); spam thrice, 2 * 2 / (3 + 3).
    result = score(["accuracy"], predictions, references)
    assert result == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}


@pytest.mark.parametrize(
    ("prediction", "reference", "precision", "recall", "f1", "exact", "valid"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1.0}', 1, 1, 1, 1, 1),
        ('{"a": 1}', '{"a": 1, "b": "x", "c": null}', 1, 1 / 3, 1 / 2, 0, 1),
        ('{"a": 1, "b": 2, "c": 3, "d": 4}', '{"a": 1}', 1 / 4, 1, 2 / 5, 0, 1),
        ('{"a": {"b": [1, 2, 3]}}', '{"a": {"b": [1, 3, 2]}}', 1 / 3, 1 / 3, 1 / 3, 0, 1),
        ('{"a": true}', '{"a": 1}', 0, 0, 0, 0, 1),
        ('{"a": false}', '{"a": 0}', 0, 0, 0, 0, 1),
        ('{"a": "1"}', '{"a": 1}', 0, 0, 0, 0, 1),
        ('{"a": "X"}', '{"a": "x"}', 0, 0, 0, 0, 1),
        ('{"a": 1e2}', '{"a": 100}', 1, 1, 1, 1, 1),
        ('{"a": 1e400}', '{"a": 1e401}', 0, 0, 0, 0, 1),
        ('{"0": 1}', "[1]", 0, 0, 0, 0, 1),
        ('{"a": []}', '{"a": {}}', 0, 0, 0, 0, 1),
        ('{"a": []}', '{"a": []}', 1, 1, 1, 1, 1),
        ("{}", "{}", 1, 1, 1, 1, 1),
        ("{}", '{"a": 1}', 0, 0, 0, 0, 1),
        (' {"a": 1}\n', '{"a": 1}', 1, 1, 1, 1, 1),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 0, 0, 0, 0, 0),
        ('{"a": 1} done', '{"a": 1}', 0, 0, 0, 0, 0),
        ('{"a": 1, "a": 1}', '{"a": 1}', 0, 0, 0, 0, 0),
        ('{"a": NaN}', '{"a": 1}', 0, 0, 0, 0, 0),
        ('{"a": 1e9999999999999999999999}', '{"a": 1}', 0, 0, 0, 0, 0),
        ("[" * 100_000, '{"a": 1}', 0, 0, 0, 0, 0),
        ("9" * 5000, "9" * 5000, 1, 1, 1, 1, 1),
        ("", "1", 0, 0, 0, 0, 0),
    ],
)
def test_json(prediction, reference, precision, recall, f1, exact, valid):
    assert of_json(prediction, reference) == pytest.approx([precision, recall, f1, exact, valid], abs=1e-15)


def test_json_counts_over_all_rows():
    # 1 of 1, 0 of 3 (unparsable), 1 of 2 said: hits 2, said 3, true 1 + 3 + 1 = 5.
    predictions = ['{"a": 1}', "oops", '{"a": 1, "b": 2}']
    references = ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '{"a": 1}']
    assert score(["json"], predictions, references) == {
        "json_exact_match": 1 / 3,
        "json_field_f1": 4 / 8,
        "json_precision": 2 / 3,
        "json_recall": 2 / 5,
        "json_valid": 2 / 3,
    }


def test_references_must_be_json():
    with pytest.raises(DataError, match="row 2: not JSON") as caught:
        score(["json"], ["1"] * 30, ["1", "yes"] + ["{,}"] * 28)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "... and 9 more"


def test_bleu_and_chrf_are_sacrebleus():
    assert score(["bleu", "chrf"], ["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(
        {"bleu": 100, "chrf": 100}
    )
    # Precisions 4/5, 2/4, 1/3, and 0/2 smoothed to 1/(2*2); no brevity penalty.
    result = score(["bleu"], ["the cat sat on mats"], ["the cat sat by mats"])
    assert result["bleu"] == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    assert 0 < score(["chrf"], ["the cat"], ["the cot"])["chrf"] < 100


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_without_sacrebleu(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'veneer\[eval\]'"):
        score([name], ["a"], ["a"])


def test_unknown_names_are_all_listed():
    with pytest.raises(ConfigError, match="nearest: 'exact_match'") as caught:
        score(["exactmatch", "json", "blue"], ["a"], ["a"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("names", [[], "json"])
def test_names_must_be_a_list(names):
    with pytest.raises(ConfigError, match="at least one of exact_match, accuracy, json, bleu, chrf"):
        score(names, ["a"], ["a"])


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), ([], ["a"]), (["a"], ["a", "b"])])
def test_lengths(predictions, references):
    with pytest.raises(DataError, match=f"{len(predictions)} predictions and {len(references)} references"):
        score(["exact_match"], predictions, references)


def test_only_strings():
    with pytest.raises(DataError, match="row 2: the prediction must be a string, is None"):
        score(["exact_match"], ["a", None], ["a", "b"])


@given(st.lists(texts, min_size=1))
def test_perfect_is_one(rows):
    assert set(score(["exact_match", "accuracy"], rows, rows).values()) == {1.0}


@given(st.lists(trees, min_size=1, max_size=5))
def test_perfect_json_is_one(rows):
    written = [json.dumps(tree) for tree in rows]
    spaced = [json.dumps(tree, indent=2, ensure_ascii=False) for tree in rows]
    assert set(score(["json"], spaced, written).values()) == {1.0}


@given(st.lists(st.tuples(texts | trees.map(json.dumps), trees.map(json.dumps)), min_size=1, max_size=6), st.randoms())
def test_laws(rows, draw):
    result = score(OWN, *zip(*rows, strict=True))
    assert all(0 <= value <= 1 for value in result.values())

    low, high = sorted([result["json_precision"], result["json_recall"]])
    assert low - 1e-12 <= result["json_field_f1"] <= high + 1e-12
    assert result["json_exact_match"] <= result["json_valid"]
    assert result["exact_match"] <= result["accuracy"]

    shuffled = draw.sample(rows, len(rows))
    assert score(OWN, *zip(*shuffled, strict=True)) == result  # to the last bit


@given(st.lists(st.tuples(trees, trees), min_size=1, max_size=5))
def test_swapping_the_sides_swaps_precision_and_recall(rows):
    one, other = ([json.dumps(tree) for tree in side] for side in zip(*rows, strict=True))
    there, back = score(["json"], one, other), score(["json"], other, one)
    assert there["json_precision"] == back["json_recall"]
    assert there["json_field_f1"] == back["json_field_f1"]


@given(trees)
def test_key_order_does_not_matter(tree):
    def shuffled(value):
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in random.Random(0).sample(list(value), len(value))}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    assert of_json(json.dumps(shuffled(tree)), json.dumps(tree)) == [1] * 5


def test_sacrebleu_scores_do_not_depend_on_order():
    rows = [("a b c d e", "a b c d"), ("x y", "x z"), ("", "q")]
    assert score(["bleu", "chrf"], *zip(*rows, strict=True)) == score(["bleu", "chrf"], *zip(*rows[::-1], strict=True))
