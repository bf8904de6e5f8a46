"""By which names paths go in the files."""

import pytest

from veneer.errors import AdapterError
from veneer.tools.merge_checkpoint_names import Renaming, find_renaming, split_names


@pytest.mark.parametrize(
    ("wanted", "names", "rule"),
    [
        ("a.0.q.weight", "a.0.q.weight", Renaming()),
        ("layers.0.q.weight", "model.layers.0.q.weight", Renaming("", "model.")),
        ("model.layers.0.q.weight", "layers.0.q.weight", Renaming("model.", "")),
        ("model.vision.h.0.q.weight", "vision.model.h.0.q.weight", Renaming("model.vision.", "vision.model.")),
    ],
)
def test_first_parts_are_added_taken_away_or_turned_round(wanted, names, rule):
    assert find_renaming([wanted], [names, "norm.weight"]) == rule
    assert rule(wanted) == names


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("decoder.q.weight", ["encoder.q.weight"]),  # another module
        ("layers.1.q.weight", ["layers.0.q.weight"]),  # another layer
        ("layers.0.qq.weight", ["layers.0.q.weight"]),
        ("0.q.weight", ["layers.0.0.q.weight"]),  # a number is never put before
    ],
)
def test_another_module_is_never_taken_for_it(wanted, names):
    with pytest.raises(AdapterError) as caught:
        find_renaming([wanted], names)
    assert caught.value.problems[0].startswith(f"{wanted}: the files hold no such tensor")


def test_one_rule_must_bring_all_names_and_only_one_may():
    with pytest.raises(AdapterError, match=r"no such tensor"):
        find_renaming(["a.0.q.weight", "a.1.q.weight"], ["x.a.0.q.weight"])
    with pytest.raises(AdapterError, match=r"may be x\.a\.0\.q\.weight or y\.a\.0\.q\.weight"):
        find_renaming(["a.0.q.weight"], ["x.a.0.q.weight", "y.a.0.q.weight"])


def test_a_gate_comes_before_what_it_opens():
    assert split_names("m.experts.gate_up_proj", 1) == ["m.experts.0.gate_proj.weight", "m.experts.0.up_proj.weight"]
    assert split_names("m.experts.other", 2) == []
