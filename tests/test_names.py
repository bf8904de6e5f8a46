"""Matching is PEFT's, so that a configuration means the same in both."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.names import (
    by_number,
    did_you_mean,
    last_name,
    layer_index,
    matches,
    matches_suffix,
    nearest,
    pattern_matches,
    value_for,
)

words = st.sampled_from(["a", "b", "ab", "layers", "0", "12", "q_proj"])
paths = st.lists(words, min_size=1, max_size=5).map(".".join)


@given(paths, paths)
def test_suffixes_end_at_dots(path, entry):
    assert matches_suffix(path, entry) == (path.split(".")[-len(entry.split(".")) :] == entry.split("."))


@given(paths, paths)
def test_patterns_are_pefts_regular_expression(path, pattern):
    assert pattern_matches(path, pattern) == bool(re.match(rf"(.*\.)?({pattern})$", path))


def test_a_string_is_a_regex_for_the_whole_path_and_a_list_holds_suffixes():
    assert matches("a.q_proj", r".*q_proj")
    assert not matches("a.q_proj.x", r".*q_proj")
    assert not matches("a.q_proj", "q_proj")
    assert matches("a.q_proj", ["q_proj"])
    assert not matches("a.q_proj", [])


@pytest.mark.parametrize(
    ("path", "pattern", "index"),
    [
        ("model.layers.7.mlp.experts.3.up", None, 7),
        ("layers.7.mlp", None, 7),
        ("model.embed", None, None),
        ("model.layers.7", None, None),
        ("vision.blocks.2.text.h.5.attn", "h", 5),
        ("h.5.attn", "h", 5),
        ("model.layers.7.mlp", "h", None),
    ],
)
def test_layer_index(path, pattern, index):
    assert layer_index(path, pattern) == index


def test_the_first_pattern_wins():
    assert value_for("a.q", {"q": 1, "a.q": 2}, 0) == 1
    assert value_for("a.k", {"q": 1}, 0) == 0


def test_near_misses():
    assert nearest("q_prj", ["q_proj", "q_proj", "zzz"]) == ["q_proj"]
    assert did_you_mean("xyz", ["abc"]) == ""


def test_names_that_end_in_numbers_keep_the_name_before_them():
    assert last_name("up_blocks.1.attn1.to_out.0") == "to_out.0"
    assert last_name("net.0.proj.2.3") == "proj.2.3"


def test_layers_are_counted():
    assert sorted(["layers.10.k", "layers.2.q", "layers.2.k"], key=by_number) == [
        "layers.2.k",
        "layers.2.q",
        "layers.10.k",
    ]
