"""What holds for every verb: one JSON object, begun alike; errors as JSON; what may be overwritten."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import veneer
from veneer.cli import main as cli
from veneer.config import LoRAConfig
from veneer.demo.run import DemoExample, DemoResult

VERBS = tuple(one.name for one in cli.app.registered_commands)
WRITING = ("combine", "resize", "extract", "convert", "merge")
NOT_ONE_ADAPTER = ("check", "merge")
"""Verbs whose result is no adapter, or whose adapter may be none."""
FIGURES = ("error", "errors", "bytes", "rows", "steps", "tokens", "bad_rows_count")
"""Words that say too little, or are those of a failure."""


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """An adapter, another of the same targets, a fine-tuned base, rows and a run file."""
    folder = tmp_path_factory.mktemp("made")
    for name in "ab":
        model = LlamaForCausalLM.from_pretrained(tiny_base)
        for parameter in veneer.attach(model, LoRAConfig(rank=2, target_modules=["q_proj"])).parameters().values():
            nn.init.normal_(parameter, std=0.2)
        veneer.save_adapter(veneer.detach(model), folder / name)
    veneer.merge_files(tiny_base, [(veneer.load_adapter(folder / "a"), 1.0)], folder / "tuned")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 1?", "completion": "2"}) + "\n")
    run = folder / "run.yaml"
    run.write_text(f"base: {tiny_base}\nadapter: {{rank: 2}}\ndata: {{train: {rows}}}\ntrain: {{epochs: 1}}\nout: x\n")
    return folder


def commands(made: Path, base: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """A call of each verb that succeeds."""
    return {
        "train": (made / "run.yaml", "--out", out),
        "eval": (base, made / "rows.jsonl", "--adapter", made / "a"),
        "generate": (base, "--adapter", made / "a", "--prompt", "x", "--set", "max_new_tokens=1"),
        "show": (made / "a",),
        "convert": (made / "a", "--to", "kohya", "--out", f"{out}.safetensors"),
        "check": (made / "a",),
        "combine": (made / "a", made / "b", "--out", out),
        "resize": (made / "a", "--rank", 1, "--out", out),
        "merge": (base, made / "a", out, "--no-probe"),
        "extract": (base, made / "tuned", "--rank", 2, "--out", out),
        "demo": ("--out", out),
    }


WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "train": (("none.yaml",), "ConfigError"),
    "eval": (("none/at/all", "none.jsonl"), "DataError"),
    "generate": (("none/at/all", "--prompt", "x"), "BaseModelError"),
    "show": (("none",), "AdapterError"),
    "convert": (("none", "--to", "peft", "--out", "x"), "AdapterError"),
    "check": ((), "ConfigError"),
    "combine": (("none", "--out", "x"), "AdapterError"),
    "resize": (("none", "--rank", 1, "--out", "x"), "AdapterError"),
    "merge": (("none", "none", "x", "--weight", "nan"), "ConfigError"),
    "extract": (("none/at/all", "none", "--rank", 1, "--out", "x"), "BaseModelError"),
    "demo": (("--out", "taken"), "OutputError"),
}


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo without its training: what it returns."""
    examples = (DemoExample("a", "b", "c", "d"),)

    def demo(out: str, **_: object) -> DemoResult:
        return DemoResult("dates", 1, 2, 0.0, 1.0, 1.0, 1.0, 1, 1, 0.1, "0" * 64, f"{out}/run", examples)

    monkeypatch.setattr(veneer, "run_demo", demo)


def keys_of(value: object) -> set[str]:
    """Every key of an object, however deep."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("quick_demo")
def test_one_object_that_begins_alike(call, made, tiny_base, tmp_path, verb):
    code, out, err = call(verb, *commands(made, tiny_base, tmp_path / "out")[verb], "--json")
    assert code == 0, err
    said = json.loads(out)
    assert list(said)[:3] == ["command", "inputs", "out"]
    assert said["command"] == verb
    assert said["out"] is None or Path(said["out"]).exists() or verb == "demo"
    assert (said["out"] is not None) == (verb in (*WRITING, "train", "demo"))
    told = said | {"record": None}  # the record of a merge is a file of its own
    assert not keys_of(told) & set(FIGURES)
    assert verb in NOT_ONE_ADAPTER or len(said["digest"]) == 64
    assert all("path" in one for one in said.get("modules", []))
    assert json.loads(json.dumps(said, allow_nan=False)) == said


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_is_one_object_too(call, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    arguments, kind = WRONG[verb]
    code, out, err = call(verb, *arguments, "--json")
    said = json.loads(out)
    assert list(said) == ["error"]
    assert list(said["error"]) == ["type", "message", "problems", "exit_code"]
    assert (said["error"]["type"], said["error"]["exit_code"], code) == (kind, 2, 2)
    assert said["error"]["message"] in err
    plain, out, told = call(verb, *arguments)
    assert (plain, out, told) == (code, "", err)


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_typed_wrong_is_one_object_too(call, verb):
    code, out, err = call(verb, "--no-such-option", "--json")
    assert (code, "--no-such-option" in json.loads(out)["error"]["message"], "--no-such-option" in err) == (
        2,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (OSError(28, "No space left on device"), 1, "OSError"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (veneer.VeneerError("two things", ["one", "two"]), 2, "VeneerError"),
    ],
)
def test_whatever_ends_a_command_is_told(call, monkeypatch, error, code, kind):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(veneer, "load_adapter", fail)
    got, out, err = call("show", "x", "--json")
    said = json.loads(out)["error"]
    assert (got, said["exit_code"], said["type"]) == (code, code, kind)
    assert said["message"] in err
    assert said["problems"] == list(getattr(error, "problems", ()))


def test_a_fault_of_ours_is_told_and_shows_its_traceback(monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(veneer, "load_adapter", fail)
    monkeypatch.setattr("sys.argv", ["veneer", "show", "x", "--json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize("verb", WRITING)
def test_overwrite_replaces_what_veneer_wrote_and_nothing_else(call, made, tiny_base, tmp_path, verb):
    arguments = commands(made, tiny_base, tmp_path / "out")[verb]
    if verb == "convert":
        arguments = (made / "a", "--to", "peft", "--out", tmp_path / "out")
    assert call(verb, *arguments)[0] == 0
    code, _, err = call(verb, *arguments)
    assert (code, "--overwrite" in err) == (2, True)
    assert call(verb, *arguments, "--overwrite")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = call(verb, *arguments, "--overwrite")
    assert (code, "notes.txt" in err) == (2, True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    code, _, err = call(verb, *arguments, "--overwrite")
    assert (code, "file" in err, (tmp_path / "out").read_text()) == (2, True, "a file")


@pytest.mark.parametrize("verb", [*WRITING, "show"])
def test_nothing_is_written_into_veneers_own_cache(call, made, tiny_base, tmp_path, monkeypatch, verb):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    arguments = commands(made, tiny_base, tmp_path / "cache" / "deep" / "out")[verb]
    if verb == "show":
        arguments = (*arguments, "--plot", tmp_path / "cache" / "x.png")
    code, _, err = call(verb, *arguments)
    assert (code, "own cache" in err) == (2, True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("verb", ["combine", "resize", "extract", "convert"])
def test_an_adapter_that_is_made_has_a_card(call, made, tiny_base, tmp_path, verb):
    arguments = commands(made, tiny_base, tmp_path / "out")[verb]
    if verb == "convert":
        assert call(verb, *arguments)[0] == 0
        arguments = (f"{tmp_path / 'out'}.safetensors", "--to", "peft", "--out", tmp_path / "out")
    assert call(verb, *arguments)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert veneer.load_adapter(tmp_path / "out").digest in card
    assert "relative error" in card
    assert "None" not in card
    veneer.check(tmp_path / "out")


def test_show_of_two_with_nothing_in_common_says_so(call, made, tmp_path):
    pair = veneer.LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)
    other = veneer.Adapter({"layers.0.self_attn.q_proj": pair}, LoRAConfig(rank=1))
    veneer.save_adapter(other, tmp_path / "other")
    code, out, err = call("show", made / "a", tmp_path / "other")
    assert (code, out) == (2, "")
    assert "no module in common" in err
    assert "nearest: 'layers.0.self_attn.q_proj'" in err
    assert "model.layers.0.self_attn.q_proj" in err
    odd = {"model.layers.0.self_attn.q_proj": veneer.LowRank(torch.ones(1, 3), torch.ones(5, 1), 1.0)}
    veneer.save_adapter(veneer.Adapter(odd, LoRAConfig(rank=1)), tmp_path / "odd")
    code, _, err = call("show", made / "a", tmp_path / "odd")
    assert (code, "no module can be compared" in err, "(1, 5, 3)" in err) == (2, True, True)
