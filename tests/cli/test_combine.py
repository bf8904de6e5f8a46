"""`veneer combine` and `veneer resize`: what people see, what machines read, how they fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tools.algebra import adapter_of, pair_of

import veneer

REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters"


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate("ab"):
        modules = {f"layers.{layer}.{leaf}": pair_of("linear", 3, seed + layer) for layer in range(2) for leaf in "qv"}
        veneer.save_adapter(adapter_of(**modules), tmp_path / name)
    return tmp_path


def test_combine_writes_what_the_library_makes(call, folders):
    a, b = (veneer.load_adapter(folders / name) for name in "ab")
    arguments = ("combine", folders / "a", folders / "b", "--weights", "0.7,-0.3", "--rank", 2)
    code, out, _ = call(*arguments, "--module-weights", "q=1,0", "--out", folders / "ab", "--json")
    expected = veneer.combine([a, b], [0.7, -0.3], rank=2, module_weights={"q": [1.0, 0.0]})
    told = json.loads(out)
    assert (code, told["digest"], told["relative_error"]) == (0, expected.adapter.digest, expected.total.error)
    assert [one["digest"] for one in told["of"]] == [a.digest, b.digest]
    assert veneer.load_adapter(folders / "ab").digest == expected.adapter.digest
    card = (folders / "ab" / "README.md").read_text()
    assert all(text in card for text in (a.digest, b.digest, "| -0.3 |", 'method: "linear"', str(folders / "a")))
    code, out, _ = call(*arguments, "--out", folders / "again")
    assert code == 0
    assert all(text in out for text in ("rank before", "kept", "8 × 6", "linear, rank 2"))


def test_combine_by_entries(call, folders):
    arguments = ("--method", "ties", "--density", 0.5, "--space", "core", "--rank", 2, "--json")
    code, out, _ = call("combine", folders / "a", folders / "b", *arguments, "--out", folders / "ab")
    assert code == 0
    assert json.loads(out)["options"] == {"rank": 2, "trained": "exact", "density": 0.5, "space": "core"}


def test_resize_writes_what_the_library_makes(call, folders):
    a = veneer.load_adapter(folders / "a")
    code, out, _ = call("resize", folders / "a", "--rank", 1, "--out", folders / "small", "--json")
    told, expected = json.loads(out), veneer.resize(a, rank=1)
    assert (code, told["digest"], told["of"]) == (0, expected.adapter.digest, [{"digest": a.digest}])
    assert told["num_bytes"] < told["num_bytes_before"] == a.num_bytes
    assert a.digest in (folders / "small" / "README.md").read_text()
    code, out, _ = call("resize", folders / "a", "--energy", 0.9, "--spread", "--out", folders / "spread")
    assert code == 0
    assert "energy kept" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--weights", "1,x"), "expected numbers with commas"),
        (("--weights", "1"), "weights: expected a number for each adapter, 2 in all"),
        (("--module-weights", "q"), "expected PATTERN=W,W"),
        (("--module-weights", "z=1,1"), "stands for none"),
        (("--method", "tie"), "nearest: 'ties'"),
        (("--density", 0.5), "linear adds whole updates"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(call, folders, arguments, text):
    code, out, err = call("combine", folders / "a", folders / "b", "--out", folders / "ab", *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert not (folders / "ab").exists()


def test_a_folder_that_exists_is_refused_before_any_work(call, folders):
    for verb in ("combine", "resize"):
        code, _, err = call(verb, folders / "nowhere", "--out", folders / "a")
        assert code == 2
        assert "exists already" in err
    code, _, err = call("resize", folders / "b", "--rank", 1, "--out", folders / "a", "--overwrite")
    assert (code, err) == (0, "")
    code, _, err = call("resize", folders / "b", "--out", folders / "new")
    assert code == 2
    assert "give --rank or --energy, one of them" in err


def test_neither_needs_transformers(folders):
    code = (
        "import sys; sys.argv = ['veneer', *sys.argv[1:]]\n"
        "from veneer.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'transformers' not in sys.modules"
    )
    commands = (
        ["combine", folders / "a", folders / "b", "--out", folders / "ab"],
        ["resize", folders / "a", "--rank", "1", "--out", folders / "r"],
    )
    for one in commands:
        subprocess.run([sys.executable, "-c", code, *one], check=True, capture_output=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real adapters are not here")
def test_adapters_of_other_people(call, tmp_path):
    names = [REAL / f"justbautista-{one}" for one in ("emotion", "keywords", "therapist")]
    code, out, _ = call("combine", *names, "--weights", "0.5,0.3,-0.2", "--out", tmp_path / "sum", "--json")
    assert code == 0
    assert json.loads(out)["relative_error"] < 1e-7
    adapters = [veneer.load_adapter(name) for name in names]
    made = veneer.load_adapter(tmp_path / "sum")
    for path in list(made.modules)[:3]:
        expected = sum(
            weight * one.modules[path].delta() for weight, one in zip((0.5, 0.3, -0.2), adapters, strict=True)
        )
        assert (made.modules[path].delta() - expected).norm() < 1e-7 * expected.norm()
    code, _, err = call("combine", names[0], REAL / "gemma3-270m-zouhe0", "--out", tmp_path / "no")
    assert code == 2
    assert "made for different" in err
