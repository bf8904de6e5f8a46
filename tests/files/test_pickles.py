"""Pickles: what torch saved is read as torch reads it; what would do anything else is refused, and nothing was run."""

import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.errors import AdapterError
from veneer.files import unpickle
from veneer.files.format import Sight
from veneer.files.pickles import FORMAT, read_peft_bin, read_pickle

REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "gpt2-thesotti-bin"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int8, torch.bool]


@pytest.fixture(autouse=True)
def _this_process_names_nothing(request):
    """No test here may unpickle anything in this process, but where it compares with torch."""
    named = []
    active = [True]

    def hook(event, args):
        if active and event == "pickle.find_class":
            named.append(args)

    sys.addaudithook(hook)
    yield
    active.clear()
    assert named == []


def zipped(folder: Path, data: bytes, *, root: str = "a", **storages: bytes) -> Path:
    """A file as `torch.save` writes it, with any pickle in it."""
    path = folder / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr(f"{root}/byteorder", b"little")
        for key, content in storages.items():
            archive.writestr(f"{root}/data/{key[1:]}", content)
    return path


def tensor_pickle(shape=(2,), strides=(1,), offset=0, count=2, kind="FloatStorage", key="0", build=b"") -> bytes:
    """The pickle of `{"x": tensor}`, written by hand."""

    def item(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    parts = [b"\x80\x02}", item("x"), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
    parts += [item("storage"), f"ctorch\n{kind}\n".encode(), item(key), item("cuda:0"), item(count), b"tQ"]
    parts += [item(offset), item(shape), item(strides), item(False), b"ccollections\nOrderedDict\n)RtR", build, b"s."]
    return b"".join(parts)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    new=st.booleans(),
    wrap=st.booleans(),
)
def test_what_torch_saved_is_read(shapes, dtype, new, wrap, tmp_path):
    tensors = {f"t.{index}": torch.randint(0, 2, shape).to(dtype) for index, shape in enumerate(shapes)}
    tensors["view"] = torch.arange(24).reshape(4, 6).to(dtype).T[1::2, 1:]
    tensors["same"] = tensors["view"]
    held = {"state_dict": tensors, "epoch": 3, "note": None} if wrap else tensors
    torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    found = read_pickle(tmp_path / "a.pt")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) and found[name].dtype == dtype for name, one in tensors.items())


def test_state_dicts_of_modules_and_parameters_are_read(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert read_pickle(tmp_path / "a.pt").keys() == model.state_dict().keys()
    torch.save(dict(model.named_parameters()), tmp_path / "b.pt")
    found = read_pickle(tmp_path / "b.pt")
    assert torch.equal(found["0.weight"], model[0].weight)
    assert not found["0.weight"].requires_grad


def test_storages_of_a_gpu_come_to_the_cpu(tmp_path):
    found = read_pickle(zipped(tmp_path, tensor_pickle(), _0=struct.pack("<2f", 1, 2)))
    assert found["x"].tolist() == [1, 2]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters of ../shared/data are not here")
def test_a_real_pickle_of_2023_is_an_adapter():
    adapter = read_peft_bin(REAL)
    assert len(adapter.modules) == 24
    assert {pair.form for pair in adapter.modules.values()} == {"transposed"}
    assert list(adapter.trained) == ["score.weight"]
    assert FORMAT.recognise(Sight(REAL, ("adapter_config.json", "adapter_model.bin")))
    assert FORMAT.is_pickle


def named(module: str, name: str, *arguments) -> bytes:
    """A pickle that calls a function by its name, protocol 4, as one `find_class` knows it."""
    body = pickle.dumps(tuple(arguments), protocol=4)[2:-1]
    texts = b"".join(b"\x8c" + bytes([len(one)]) + one.encode() for one in (module, name))
    return b"\x80\x04" + texts + b"\x93" + body + b"R."


CANARY = "touch canary"
PAYLOADS = {
    "posix.system": named("posix", "system", CANARY),
    "os.system": named("os", "system", CANARY),
    "subprocess.Popen": named("subprocess", "Popen", ["touch", "canary"]),
    "builtins.eval": named("builtins", "eval", "__import__('os').system('touch canary')"),
    "builtins.exec": named("builtins", "exec", "open('canary', 'w')"),
    "builtins.getattr": named("builtins", "getattr", "a", "b"),
    "builtins.__import__": named("builtins", "__import__", "os"),
    "builtins.open": named("builtins", "open", "canary", "w"),
    "builtins.compile": named("builtins", "compile", "1", "a", "eval"),
    "builtins.print": named("builtins", "print", "a"),
    "io.open": named("io", "open", "canary", "w"),
    "_io.FileIO": named("_io", "FileIO", "canary", "w"),
    "pathlib.Path": named("pathlib", "Path", "canary"),
    "operator.attrgetter": named("operator", "attrgetter", "system"),
    "operator.methodcaller": named("operator", "methodcaller", "system", CANARY),
    "functools.partial": named("functools", "partial", 1),
    "importlib.import_module": named("importlib", "import_module", "os"),
    "pickle.loads": named("pickle", "loads", b"."),
    "copyreg._reconstructor": named("copyreg", "_reconstructor", 1),
    "torch.load": named("torch", "load", "a.pt"),
    "torch.hub.load": named("torch.hub", "load", "a", "b"),
    "torch.os.system": named("torch", "os.system", CANARY),
    "torch.serialization.os.system": named("torch.serialization", "os.system", CANARY),
    "torch.storage._load_from_bytes": named("torch.storage", "_load_from_bytes", b"."),
    "torch._utils._rebuild_device_tensor_from_numpy": named("torch._utils", "_rebuild_device_tensor_from_numpy"),
    "numpy.core.multiarray._reconstruct": named("numpy.core.multiarray", "_reconstruct"),
    "collections.OrderedDict.fromkeys": named("collections", "OrderedDict.fromkeys", [1]),
    "__main__.main": named("__main__", "main"),
    "sys.exit": named("sys", "exit", 0),
    "argparse.Namespace": named("argparse", "Namespace"),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("container", ["raw", "zip", "inner"])
def test_what_names_anything_else_is_refused_and_not_run(name, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = PAYLOADS[name]
    if container == "raw":
        path = tmp_path / "a.bin"
        path.write_bytes(data)
    else:
        path = zipped(tmp_path, data if container == "zip" else b"\x80\x04}\x8c\x01x" + data[2:-1] + b"s.")
    with pytest.raises(AdapterError, match="it may run any code, so it is not read"):
        read_pickle(path)
    assert not any(folder.exists() for folder in (tmp_path / "canary", Path("/canary")))


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        read_pickle(tmp_path / "a.pt")


LAUGHS = (
    b"\x80\x02" + b"K\x01K\x02\x86" + b"".join(b"q%c0h%ch%c\x86" % ((i,) * 3) for i in range(64)) + b"}h\x3fK\x00s."
)
MALFORMED = {
    "empty": (b"", "cannot be read as a pickle"),
    "text": (b"hello", "cannot be read as a pickle"),
    "cut": (tensor_pickle()[:40], "cannot be read as a pickle"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "more memory|cannot be read as a pickle|it took over"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".", "cannot be read as a pickle|more memory"),
    "long bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "cannot be read as a pickle|more memory"),
    "deep": (b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "expected a dictionary of tensors, got list"),
    "marks": (b"\x80\x02" + b"(" * 300_000 + b".", "cannot be read as a pickle|expected a dictionary"),
    "extension": (b"\x80\x02\x82\x01.", "cannot be read as a pickle"),
    "instance": (b"\x80\x02(S'touch canary'\niposix\nsystem\n.", "names posix.system"),
    "no dictionary": (pickle.dumps([1]), "expected a dictionary of tensors, got list"),
    "numbers": (pickle.dumps({"a": 1, 2: None}), "'a': expected a tensor, got int"),
    "two wrappers": (pickle.dumps({"model": {}, "lora": {}}), "which is meant cannot be told"),
    "beside": (pickle.dumps({"model": {}, "optimizer": [1]}), "only notes are read, got list"),
    "no storage": (tensor_pickle(key="9"), "'9' is missing"),
    "short storage": (tensor_pickle(count=3), "of another size"),
    "huge storage": (tensor_pickle(count=2**60), "of another size|more than"),
    "negative count": (tensor_pickle(count=-1), "without a dtype"),
    "outside": (tensor_pickle(shape=(3,)), r"shape \(3,\) from 0 on leaves its storage of 2 values"),
    "offset": (tensor_pickle(offset=1), "leaves its storage"),
    "negative offset": (tensor_pickle(offset=-1), "expected an offset"),
    "negative stride": (tensor_pickle(strides=(-1,)), "expected an offset"),
    "one value for ever": (tensor_pickle(shape=(2**40,), strides=(0,)), "more than the"),
    "many axes": (tensor_pickle(shape=(1,) * 40, strides=(1,) * 40), "at most 16 are read"),
    "strides": (tensor_pickle(strides=(1, 1)), "1 sizes and 2 strides"),
    "floats": (tensor_pickle(shape=(2.0,)), "not whole numbers"),
    "other storage": (tensor_pickle(kind="QInt8Storage"), r"names torch\.QInt8Storage"),
    "changed": (tensor_pickle(build=b"N}X\x05\x00\x00\x00shapeNs\x86b"), "changes a tensor after it was made"),
    "not finite": (tensor_pickle(), "1 NaN"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pickles_are_typed_errors(name, tmp_path):
    data, message = MALFORMED[name]
    values = (float("nan"), 1) if name == "not finite" else (1, 2)
    with pytest.raises(AdapterError, match=message):
        read_pickle(zipped(tmp_path, data, _0=struct.pack("<2f", *values)))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), new=st.booleans())
def test_any_changed_byte_is_read_or_a_typed_error(place, value, new, tmp_path):
    torch.save({"x": torch.ones(3), "y": torch.ones(2, 2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[place % len(data)] = value
    (tmp_path / "a.pt").write_bytes(data)
    try:
        found = read_pickle(tmp_path / "a.pt")
    except AdapterError:
        return
    assert all(isinstance(one, torch.Tensor) for one in found.values())


def test_what_takes_for_ever_or_all_memory_ends(tmp_path):
    with pytest.raises(AdapterError, match="the process that opened it ended with -"):
        read_pickle(zipped(tmp_path, LAUGHS), seconds=1)
    fat = b"\x80\x02" + b"".join(b"]q" + bytes([index % 256]) for index in range(3_000_000)) + b"."
    with pytest.raises(AdapterError, match=r"memory|ended with"):
        read_pickle(zipped(tmp_path, fat), memory=96 << 20)


def test_zips_that_are_not_of_torch_are_refused(tmp_path):
    def archive(compression=zipfile.ZIP_STORED, **entries):
        with zipfile.ZipFile(tmp_path / "z.pt", "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name.replace("__", "/").replace("_", "."), content)
        return tmp_path / "z.pt"

    with pytest.raises(AdapterError, match="compressed or encrypted"):
        read_pickle(archive(zipfile.ZIP_DEFLATED, a__data_pkl=b"0" * 10_000))
    with pytest.raises(AdapterError, match="TorchScript"):
        read_pickle(archive(a__data_pkl=b".", a__constants_pkl=b"."))
    with pytest.raises(AdapterError, match="not of a pickle"):
        read_pickle(archive(readme=b"hello"))
    with pytest.raises(AdapterError, match="byte order"):
        read_pickle(archive(a__data_pkl=b".", a__byteorder=b"big"))
    whole = zipped(tmp_path, tensor_pickle(), _0=struct.pack("<2f", 1, 2)).read_bytes()
    for cut in (3, 30, len(whole) // 2, len(whole) - 5):
        (tmp_path / "c.pt").write_bytes(whole[:cut])
        with pytest.raises(AdapterError):
            read_pickle(tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(whole.replace(struct.pack("<2f", 1, 2), struct.pack("<2f", 1, 3)))
    with pytest.raises(AdapterError, match="damaged"):
        read_pickle(tmp_path / "c.pt")


def test_files_that_are_none_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for name, message in (
        ("pipe.pt", "not a regular file"),
        ("none.pt", "cannot be read"),
        (".", "not a regular file"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_pickle(tmp_path / name)
    torch.save({"x": torch.ones(1000)}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="at most 1000 bytes"):
        read_pickle(tmp_path / "a.pt", max_bytes=1000)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: cannot be read"):
        read_peft_bin(tmp_path)


def loosened(tmp_path: Path, monkeypatch, *changes: tuple[str, str]) -> None:
    """Let the process run a copy of its program with some of its guards taken away."""
    text = Path(unpickle.__file__).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "loose.py").write_text(text)
    monkeypatch.setattr(unpickle, "__file__", str(tmp_path / "loose.py"))


ANY_NAME = ("found = GLOBALS.get((module, name))", "found = getattr(sys.modules.get(module), name)")
NO_HOOK = ("    sys.addaudithook(_refuse_event)\n", "")


def test_a_process_that_got_past_the_names_meets_the_hook(tmp_path, monkeypatch):
    loosened(tmp_path, monkeypatch, ANY_NAME)
    canary = tmp_path / "canary"
    with pytest.raises(AdapterError, match=r"led to os\.system"):
        read_pickle(zipped(tmp_path, named("posix", "system", f"touch {canary}")))
    with pytest.raises(AdapterError, match="led to open"):
        read_pickle(zipped(tmp_path, named("_io", "open", str(canary), "w")))
    assert not canary.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_process_that_got_past_the_hook_too_has_no_rights(tmp_path, monkeypatch):
    loosened(tmp_path, monkeypatch, ANY_NAME, NO_HOOK)
    canary = tmp_path / "canary"
    for data in (
        named("posix", "system", f"touch {canary}"),
        named("posix", "system", f": > {canary}"),
        named("_io", "open", str(canary), "w"),
    ):
        with pytest.raises(AdapterError):
            read_pickle(zipped(tmp_path, data))
    assert not canary.exists()
