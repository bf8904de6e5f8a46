"""`veneer convert`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from veneer.adapter import Adapter, LowRank
from veneer.cli.main import app
from veneer.errors import AdapterError, ConfigError
from veneer.files.foreign import settings_for
from veneer.files.peft import save_adapter


@pytest.fixture
def start(tmp_path):
    pair = LowRank(torch.randn(2, 3), torch.randn(4, 2), 3.0)
    modules = {f"model.layers.{index}.self_attn.q_proj": pair for index in range(3)}
    save_adapter(Adapter(modules, settings_for(modules)), tmp_path / "start")
    return tmp_path / "start"


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)


def test_a_table_with_the_error_of_each_group(start, tmp_path):
    done = run(start, "--to", "kohya", "--out", tmp_path / "a.safetensors")
    assert done.exit_code == 0
    assert "largest error" in done.output
    assert "q_proj" in done.output
    assert (tmp_path / "a.safetensors").is_file()


def test_json_for_machines(start, tmp_path):
    done = run(start, "--to", "kohya", "--out", tmp_path / "a.safetensors", "--json")
    said = json.loads(done.output)
    assert (said["from"], said["to"], len(said["modules"])) == ("peft", "kohya", 3)
    assert max(one["relative_error"] for one in said["modules"]) == said["worst_error"] <= 1e-6


def test_the_list_of_formats():
    assert "kohya" in run("--list").output
    names = [row["name"] for row in json.loads(run("--list", "--json").output)["formats"]]
    assert {"peft", "kohya", "diffusers"} <= set(names)


def test_the_list_says_what_a_format_needs():
    rows = {row["name"]: row for row in json.loads(run("--list", "--json").output)["formats"]}
    assert rows["loralib"]["needs"] == ["--alpha ALPHA"]
    assert rows["peft-bin"]["writes"] is False
    assert "--base BASE" in run("--list").output


def test_what_is_missing_is_told_at_once():
    with pytest.raises(ConfigError, match=r"convert needs PATH, --to, --out"):
        run()


def test_misspelt_hints_are_told_all_at_once_before_anything_is_read(tmp_path):
    hints = ("--component", "unt", "--fused", "prt", "--style", "odl")
    with pytest.raises(AdapterError) as caught:
        run(tmp_path / "none", "--to", "kohya", "--out", tmp_path / "a.safetensors", *hints)
    component, fused, style = caught.value.problems
    assert "'unt'; nearest: 'unet'" in component
    assert fused == "fused: expected one of part, whole, got 'prt'; nearest: 'part'"
    assert style.startswith("style: expected one of new, old, oldest, flux, sd3, got 'odl'")
