"""The safetensors reader: what is true is read, every lie is an error that names it."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError
from veneer.files import tensors as module
from veneer.files.tensors import dump_tensors, non_finite, parse_tensors, read_tensors, tensor_pieces

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def file_of(header, values=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + values


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(data):
    with pytest.raises(AdapterError) as caught:
        parse_tensors(data, "a.safetensors")
    assert "a.safetensors" in caught.value.message
    return str(caught.value)


@st.composite
def dictionaries(draw):
    names = draw(st.lists(st.text("abc.é", min_size=1, max_size=5), max_size=4, unique=True))
    return {
        name: torch.arange(0, 27)[: torch.Size(shape).numel()].reshape(shape).to(draw(st.sampled_from(DTYPES)))
        for name in names
        for shape in [draw(SHAPES)]
    }


@settings(max_examples=40)
@given(dictionaries())
def test_what_is_written_is_read_back_and_written_the_same(tensors):
    data = dump_tensors(tensors)
    again = parse_tensors(data, "x")
    assert list(again) == sorted(tensors)
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
    assert dump_tensors(again) == data


def test_the_metadata_is_peft_s():
    data = dump_tensors({"x": torch.zeros(1)})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_a_file_is_read_into_memory_of_its_own(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(dump_tensors({"x": torch.arange(4.0)}))
    tensors = read_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert tensors["x"].tolist() == [0, 1, 2, 3]


def test_every_truncation_and_every_trailing_byte_is_refused():
    data = dump_tensors({"x": torch.arange(4.0), "y": torch.ones(2, 2)})
    for size in range(len(data)):
        refused(data[:size])
    assert "1 bytes at the end belong to no tensor" in refused(data + b"\0")
    assert "1 bytes are missing at the end" in refused(data[:-1])


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_gives_finite_tensors_or_our_error(place, mask):
    data = bytearray(dump_tensors({"x": torch.arange(4.0), "y": torch.ones(2, 2)}))
    data[place % len(data)] ^= mask
    try:
        tensors = parse_tensors(bytes(data), "x")
    except AdapterError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, (16 << 20) + 1, 10_000, 0])
def test_a_header_length_that_lies_is_refused(length):
    refused(file_of({"x": entry()}, b"\0" * 8, length=length))


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, "'y': shares 4 bytes"),
        ({"x": entry(), "y": entry()}, 8, "'y': shares 8 bytes"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, 20, "'y': 4 bytes before it belong to no tensor"),
        ({"x": entry(offsets=(4, 12))}, 12, "4 bytes before it"),
        ({"x": entry(offsets=(8, 0))}, 8, "must be [begin, end]"),
        ({"x": entry(offsets=(-8, 0))}, 8, "must be [begin, end]"),
        ({"x": entry(offsets=(0, 8.0))}, 8, "must be [begin, end]"),
        ({"x": entry(offsets=(False, 8))}, 8, "must be [begin, end]"),
        ({"x": entry(shape=(3,))}, 8, "takes 12 bytes, data_offsets [0, 8] give 8"),
        ({"x": entry(dtype="F64")}, 8, "takes 16 bytes"),
        ({"x": entry(shape=(2**62, 4, 2))}, 8, "shape must be"),
        ({"x": entry(shape=(2**31, 2**31, 2**31))}, 8, f"takes {4 * 2**93} bytes"),
        ({"x": entry(shape=(-1, -2))}, 8, "shape must be"),
        ({"x": entry(shape=(True, 2))}, 8, "shape must be"),
        ({"x": entry(shape=[1] * 17 + [2])}, 8, "shape must be"),
        ({"x": entry(dtype="F8_E4M3", shape=(8,))}, 8, "'F8_E4M3' is not supported"),
        ({"x": entry(dtype="f32")}, 8, "'f32' is not supported"),
        ({"x": entry(dtype=["F32"])}, 8, "is not supported"),
        ({"x": entry(dtype="C64", shape=(1,))}, 8, "'C64' is not supported"),
        ({"x": {**entry(), "more": 1}}, 8, "expected an object of dtype"),
        ({"x": [0, 8]}, 8, "expected an object of dtype"),
        ({"__metadata__": {"a": 1}, "x": entry()}, 8, "must map strings to strings"),
        ({"__metadata__": [], "x": entry()}, 8, "must map strings to strings"),
        (b'{"x": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "x": 1}', 8, "key 'x' stands twice"),
        (b' {"x": {}}', 0, "begins with '{'"),
        (b"[]", 0, "begins with '{'"),
        (b'{"x": NaN}', 0, "NaN is not JSON"),
        (b'{"\xff": 1}', 0, "not UTF-8"),
    ],
)
def test_a_header_that_lies_is_refused(header, size, said):
    assert said in refused(file_of(header, b"\0" * size))


def test_too_many_tensors_are_refused_before_they_are_parsed(monkeypatch):
    empty = entry(shape=(0,), offsets=(0, 0))
    monkeypatch.setattr(module, "MAX_TENSORS", 3)
    assert len(parse_tensors(file_of({str(n): empty for n in range(3)}), "x")) == 3
    assert "4 tensors; at most 3" in refused(file_of({str(n): empty for n in range(4)}))
    assert "more than 3 tensors" in refused(file_of({str(n): empty for n in range(40)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_values_that_are_not_finite_are_named_and_counted(dtype, place):
    bad = torch.zeros(6, dtype=dtype)
    bad[place] = float("nan")
    infinite = torch.full((2,), -float("inf"), dtype=dtype)
    text = refused(dump_tensors({"good": torch.ones(1), "bad": bad, "worse": infinite}))
    assert "'bad': 1 NaN and 0 infinite of 6 values" in text
    assert "'worse': 0 NaN and 2 infinite of 2 values" in text
    assert "good" not in text


def test_all_problems_of_a_header_are_listed_at_once():
    text = refused(file_of({"x": entry(dtype="F9"), "y": entry(shape=(5,)), "z": 1}, b"\0" * 8))
    assert all(f"'{name}'" in text for name in "xyz")


def test_a_file_that_cannot_be_read_is_our_error(tmp_path):
    with pytest.raises(AdapterError, match=r"cannot be read"):
        read_tensors(tmp_path / "none")
    with pytest.raises(AdapterError, match=r"not a regular file"):
        read_tensors(tmp_path)
    path = tmp_path / "long"
    path.write_bytes(dump_tensors({"x": torch.ones(100)}))
    with pytest.raises(AdapterError, match=r"longer than the limit of 100 bytes"):
        read_tensors(path, max_bytes=100)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
def test_the_pieces_are_the_bytes_that_safetensors_writes(drawn):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in drawn.items()}
    assert b"".join(tensor_pieces(tensors)) == safetensors.torch.save(tensors, metadata={"format": "pt"})


def test_pieces_are_the_tensors_own_memory():
    tensor = torch.zeros(3)
    pieces = tensor_pieces({"x": tensor})
    tensor[1] = 1.0
    assert bytes(pieces[1]) == tensor.numpy().tobytes()


def test_a_dtype_that_the_format_does_not_know_is_refused():
    with pytest.raises(AdapterError, match=r"cannot be written(.|\n)*'x': torch\.complex64"):
        tensor_pieces({"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_finite_values_whose_sum_overflows_are_finite(dtype):
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert non_finite({"x": largest}) == []
    largest[500] = -torch.inf
    assert non_finite({"x": largest}) == ["'x': 0 NaN and 1 infinite of 1000 values"]
    both = torch.tensor([torch.inf, -torch.inf, 1.0], dtype=dtype)
    assert non_finite({"x": both}) == ["'x': 0 NaN and 2 infinite of 3 values"]


def test_moments_may_be_infinite_where_that_is_allowed():
    data = dump_tensors({"x": torch.tensor([torch.inf])})
    assert parse_tensors(data, "x", finite=False)["x"].isinf().all()
    with pytest.raises(AdapterError, match=r"1 infinite"):
        parse_tensors(data, "x")
