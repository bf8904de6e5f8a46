"""The strict JSON reader refuses what readers disagree about, and takes back what the writer writes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError, DamagedArtefactError
from veneer.files.strict_json import MAX_DEPTH, dump_json, parse_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@settings(max_examples=60)
@given(VALUES)
def test_what_is_written_is_read_back_and_written_the_same(value):
    text = dump_json(value)
    assert parse_json(text, "x") == value
    assert dump_json(parse_json(text, "x")) == text


@settings(max_examples=60)
@given(st.binary(max_size=30))
def test_any_bytes_give_a_value_or_our_error(data):
    try:
        value = parse_json(data, "x")
    except AdapterError:
        return
    assert json.loads(data) == value


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1, "b": {"r": 1, "r": 2}}', "key 'r' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "1e999 does not fit"),
        (b"[-1e999]", "-1e999 does not fit"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7 (0xff)"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
        (rb'["\ud800"]', "half of a surrogate pair"),
        (rb'{"\udc00": 1}', "half of a surrogate pair"),
        (b"[" + b"9" * 31 + b"]", "an integer of 31 digits"),
        (b"[" + b"9" * 5000 + b"]", "an integer of 5000 digits"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested deeper than 64"),
        (b"", "not JSON at line 1, column 1"),
        (b"{} {}", "not JSON at line 1, column 4"),
        (b"{'a': 1}", "not JSON"),
        (b"// no\n{}", "not JSON"),
        (b" " * ((1 << 20) + 1), "at most 1048576 bytes"),
    ],
)
def test_hostile_text_is_refused(data, said):
    with pytest.raises(AdapterError) as caught:
        parse_json(data, "config.json")
    assert said in str(caught.value)
    assert "config.json" in caught.value.message


def test_the_limits_themselves_are_taken():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x") is not None
    assert parse_json(b"-" + b"9" * 30, "x") == -(10**30 - 1)
    assert parse_json(b"{}" + b" " * 8, "x", max_bytes=10) == {}
    with pytest.raises(AdapterError):
        parse_json(b"{}" + b" " * 9, "x", max_bytes=10)


def test_all_problems_are_listed_at_once_under_the_error_that_was_asked_for():
    with pytest.raises(DamagedArtefactError) as caught:
        parse_json(b'{"a": NaN, "a": 1e999, "b": "\\ud800"}', "m", error=DamagedArtefactError)
    assert [problem.split()[0] for problem in caught.value.problems] == ["NaN", "number", "key", "string"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {"\udfff": 1}])
def test_what_could_not_be_read_back_is_not_written(value):
    with pytest.raises(ValueError, match=r"JSON compliant|surrogates"):
        dump_json({"a": value})
