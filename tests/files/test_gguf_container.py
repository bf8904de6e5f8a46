"""The GGUF container: the gguf package reads what we write and the reverse, and no bytes break the reader."""

from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.errors import AdapterError
from veneer.files.gguf_container import dump_gguf, parse_gguf, read_gguf_head, read_gguf_tensor

FIELDS = {"general.type": "adapter", "adapter.lora.alpha": 16.0, "tokens": (1, 2, 3)}


def sample() -> bytes:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16)}
    return dump_gguf(FIELDS, tensors)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_round_trip(shapes, dtype):
    tensors = {f"t{index}": torch.randn(shape).to(dtype) for index, shape in enumerate(shapes)}
    data = dump_gguf(FIELDS, tensors)
    assert data == dump_gguf(FIELDS, tensors)
    found = parse_gguf(data, "a.gguf")
    assert found.fields == FIELDS
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], one) for name, one in tensors.items())


def test_the_gguf_package_reads_what_is_written(tmp_path):
    (tmp_path / "a.gguf").write_bytes(sample())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 16.0
    assert reader.fields["tokens"].contents() == [1, 2, 3]
    assert [tensor.name for tensor in reader.tensors] == ["a", "b"]
    assert reader.tensors[0].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert reader.tensors[1].data.tolist() == [1] * 5


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_what_the_gguf_package_writes_is_read(kind, tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("names", ["a", "b"])
    writer.add_tensor("plain", values)
    writer.add_tensor("packed", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = parse_gguf((tmp_path / "a.gguf").read_bytes(), "a.gguf")
    assert found.fields["names"] == ("a", "b")
    assert torch.equal(found.tensors["plain"], torch.from_numpy(values))
    packed = found.tensors["packed"]
    assert packed.shape == (3, 64)
    assert (packed - torch.from_numpy(values)).abs().max() < 0.2


@settings(max_examples=400)
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 500), cutting=st.booleans())
def test_any_changed_byte_is_read_or_a_typed_error(place, value, cut, cutting):
    data = bytearray(sample())
    if cutting:
        data = data[:cut]
    else:
        data[place % len(data)] = value
    try:
        parse_gguf(bytes(data), "a.gguf")
    except AdapterError:
        pass
    else:
        assert not cutting or cut >= len(sample()) - 22  # what pads the last tensor may be missing


def patched(old: bytes, new: bytes) -> bytes:
    data = sample()
    assert data.count(old) == 1
    return data.replace(old, new)


COUNT = b"\x03\x00\x00\x00" + (2).to_bytes(8, "little")
HOSTILE = [
    (b"", "ends at byte 0"),
    (b"GGML" + sample()[4:], "begins with b'GGUF'"),
    (sample()[:4] + b"\x09" + sample()[5:], "version 2 or 3"),
    (patched(COUNT, COUNT[:4] + b"\xff" * 8), "at most 20000 tensors"),
    (sample() + bytes(32), "before the file"),
    (sample()[:-32], "behind the file"),
    (patched(b"\x06\x00\x00\x00\x00\x00\x80\x41", b"\x63\x00\x00\x00\x00\x00\x80\x41"), "field of type 99"),
    (patched((12).to_bytes(8, "little") + b"general.type", b"\xff" * 8 + b"general.type"), "a text of"),
    (patched(b"general.type", b"general.\xfftyp"), "not UTF-8"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_malformed_files_are_typed_errors(data, message):
    with pytest.raises(AdapterError, match=message):
        parse_gguf(data, "a.gguf")


def test_tensors_that_stand_twice_or_overlap_are_refused():
    data = sample()
    entry = data.index((1).to_bytes(8, "little") + b"b" + (1).to_bytes(4, "little"))
    with pytest.raises(AdapterError, match="'a': stands twice"):
        parse_gguf(data[: entry + 8] + b"a" + data[entry + 9 :], "a.gguf")
    offset = entry + 8 + 1 + 4 + 8 + 4
    with pytest.raises(AdapterError, match=r"'b': begins at 0, the tensor before ends|'a': begins at 0"):
        parse_gguf(data[:offset] + bytes(8) + data[offset + 8 :], "a.gguf")
    with pytest.raises(AdapterError, match="offset 7 is not possible"):
        parse_gguf(data[:offset] + (7).to_bytes(8, "little") + data[offset + 8 :], "a.gguf")
    with pytest.raises(AdapterError, match="type 250 of shape"):
        parse_gguf(data[: offset - 4] + (250).to_bytes(4, "little") + data[offset:], "a.gguf")
    with pytest.raises(AdapterError, match=r"ends at byte|behind the file"):
        parse_gguf(data[: offset - 12] + (2**60).to_bytes(8, "little") + data[offset - 4 :], "a.gguf")


def test_a_dtype_without_a_place_is_refused():
    with pytest.raises(AdapterError, match=r"'x': torch\.int64"):
        dump_gguf({}, {"x": torch.ones(2, dtype=torch.int64)})


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 500), cutting=st.booleans())
def test_any_changed_byte_of_a_models_file_is_read_or_a_typed_error(place, value, cut, cutting, tmp_path):
    data = bytearray(sample())
    if cutting:
        data = data[:cut]
    else:
        data[place % len(data)] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with suppress(AdapterError):
        head = read_gguf_head(path)
        for name in head.tensors:
            read_gguf_tensor(path, head, name)


def test_head_and_tensors_of_a_models_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(sample())
    head, whole = read_gguf_head(path), parse_gguf(sample(), "a")
    assert head.fields == whole.fields
    assert head.packed["general.type"] == b"\x08\0\0\0\x07\0\0\0\0\0\0\0adapter"
    assert all(torch.equal(read_gguf_tensor(path, head, name), one) for name, one in whole.tensors.items())
    with pytest.raises(AdapterError, match="holds no such tensor"):
        read_gguf_tensor(path, head, "c")
