"""Patterns: the same answers as PEFT's rule, in bounded time; ranks and alphas that come out exactly."""

import math
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from veneer.adapter import Adapter, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.patterns import alpha_giving, divisor, pattern_problem, resolve, scales_for

PATHS = st.lists(st.sampled_from(["a", "b", "q", "q_proj", "10", "x-y"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    PATHS,
    PATHS.map(re.escape),
    PATHS.map(lambda path: "^" + re.escape(path)),
    st.sampled_from([r".*q", r"a.*", r"(a|b)\.q", r"\d+\.q", "q$", "a|b", r"[ab]", "q_pro.", ""]),
)


@settings(max_examples=150)
@given(st.lists(PATHS, max_size=4), st.dictionaries(PATTERNS, st.integers(1, 9), max_size=5))
def test_resolving_is_peft_s_rule(paths, patterns):
    expected = {path: patterns.get(get_pattern_key(list(patterns), path), 0) for path in paths}
    assert resolve(paths, patterns, 0) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"model\.layers\.0\.q",
        "model.layers.0.q",
        r".*\.(q|k|v)_proj",
        r"layers\.\d+\.mlp\..*",
        r"(?:a|b)\.c?",
    ],
)
def test_ordinary_patterns_are_read(pattern):
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$",
     "(a|aa)+", "a?" * 30 + "a" * 30, ".*" * 9, "(a|a)" * 30, r"(a)\1", "(?=a)", "(?P<n>a)", "(?i)a",
     "(a){2,}", "[", "a{99999999999}", "(" * 600, "a" * 513],
)  # fmt: skip
def test_patterns_that_could_take_long_are_refused(pattern):
    assert pattern_problem(pattern)


@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")
@settings(max_examples=100)
@given(st.text("a.*+?|()[]{2,}\\d^$", max_size=12), st.sampled_from(["a" * 256, "a." * 128, "aa." * 85]))
def test_a_pattern_that_is_read_is_fast(pattern, path):
    if pattern_problem(pattern) is None:
        start = time.process_time()
        re.match(rf"(.*\.)?({pattern})$", path)
        assert time.process_time() - start < 2


def test_many_slow_patterns_run_into_the_time_limit():
    patterns = {f".*.*.*x{number}": 1 for number in range(500)}
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"takes over 2 s"):
        resolve(["a." * 128] * 50, patterns, 0)
    assert time.monotonic() - start < 6


@settings(max_examples=200)
@given(st.floats(1e-6, 1e6), st.integers(1, 4096), st.booleans())
def test_alpha_gives_the_scaling_to_the_last_digit(scaling, rank, use_rslora):
    derived = alpha_giving(scaling, rank, use_rslora) / divisor(rank, use_rslora)
    assert abs(derived - scaling) <= 1e-15 * scaling


@settings(max_examples=200)
@given(st.integers(1, 1000), st.integers(1, 4096), st.booleans())
def test_a_whole_alpha_comes_back_whole(alpha, rank, use_rslora):
    assert alpha_giving(alpha / divisor(rank, use_rslora), rank, use_rslora) == alpha


def pair(rank, scaling):
    return LowRank(torch.zeros(rank, 3), torch.zeros(2, rank), scaling)


@settings(max_examples=80)
@given(
    st.dictionaries(PATHS, st.tuples(st.integers(1, 5), st.sampled_from([0.5, 1.0, 4.0, 1 / 3])), min_size=1),
    st.dictionaries(PATTERNS, st.integers(1, 5), max_size=3),
    st.booleans(),
)  # fmt: skip
def test_what_is_written_gives_every_module_what_it_has(modules, rank_pattern, use_rslora):
    config = LoRAConfig(rank=2, alpha=2, rank_pattern=rank_pattern, use_rslora=use_rslora)
    scales = scales_for(Adapter({path: pair(*one) for path, one in modules.items()}, config))
    ranks, alphas = (
        {key: one[key] for key in sorted(one)} for one in (scales.rank_pattern, scales.alpha_pattern)
    )  # as JSON will have them
    for path, (rank, scaling) in modules.items():
        assert ranks.get(get_pattern_key(list(ranks), path), scales.rank) == rank
        alpha = alphas.get(get_pattern_key(list(alphas), path), scales.alpha)
        assert math.isclose(alpha / (math.sqrt(rank) if use_rslora else rank), scaling, rel_tol=1e-15)


def test_the_configuration_s_own_patterns_stay_where_they_fit():
    config = LoRAConfig(rank=2, alpha=4, rank_pattern={"q": 4}, alpha_pattern={"v": 8})
    scales = scales_for(Adapter({"l.q": pair(4, 1.0), "l.v": pair(2, 4.0), "l.k": pair(2, 2.0)}, config))
    assert (scales.rank, scales.alpha, scales.rank_pattern, scales.alpha_pattern) == (2, 4.0, {"q": 4}, {"v": 8.0})


def test_patterns_whose_order_json_would_change_are_written_exactly():
    config = LoRAConfig(rank=2, alpha=2, rank_pattern={r"l\.q": 4, ".*q": 8})
    adapter = Adapter({"l.q": pair(4, 0.5), "m.q": pair(8, 0.25)}, config)
    assert dict(scales_for(adapter).rank_pattern) == {r"m\.q": 8}


def test_the_pattern_of_a_path_does_not_stand_for_a_longer_one():
    adapter = Adapter({"q": pair(4, 1.0), "a.q": pair(2, 1.0), "b.q": pair(2, 1.0)}, LoRAConfig(rank=2))
    assert dict(scales_for(adapter).rank_pattern) == {"^q": 4}


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
def test_a_scaling_that_alpha_cannot_give_is_refused(scaling):
    with pytest.raises(AdapterError, match=r"positive and finite"):
        scales_for(Adapter({"q": pair(1, scaling)}, LoRAConfig(rank=1)))
