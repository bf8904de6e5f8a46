"""`veneer merge` and `veneer extract`, as a user meets them."""

import json

import pytest
import torch
import typer
from tests.files.gguf_bases import tiny as tiny_of
from tests.files.gguf_bases import write_base
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import veneer
from veneer.cli import extract, merge
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, BaseModelError, ConfigError, OutputError, VeneerError
from veneer.files.peft import load_adapter, save_adapter
from veneer.nn.attach import attach, detach


@pytest.fixture
def run():
    """Runs a verb; its output, or the error that main would print."""
    app = typer.Typer()
    app.command("merge")(merge.merge)
    app.command("extract")(extract.extract)

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(one) for one in arguments])
        if isinstance(done.exception, VeneerError):
            raise done.exception
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    return call


@pytest.fixture
def adapter(tiny_base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    attachment = attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    for parameter in attachment.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    save_adapter(detach(model), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merged_shown_and_extracted_again(run, tiny_base, adapter, tmp_path):
    shown = run("merge", tiny_base, adapter, tmp_path / "out")
    assert "model.layers" not in shown  # a line for each target; one for every module is asked for
    assert " q_proj       2  linear" in shown
    assert "logits differ by" in shown
    assert "model.layers.1.self_attn.q_proj" in run("merge", tiny_base, adapter, tmp_path / "by", "--modules")
    shown = run("extract", tiny_base, tmp_path / "out", "--out", tmp_path / "again", "--rank", 2)
    assert "32 × 32" in shown
    before, after = (load_adapter(one).modules for one in (adapter, tmp_path / "again"))
    for path, one in before.items():
        assert torch.linalg.vector_norm(one.delta() - after[path].delta()) <= 1e-5 * torch.linalg.vector_norm(
            one.delta()
        )


def test_weights_dtype_and_json(run, tiny_base, adapter, tmp_path):
    options = ("--also", f"{adapter}=-0.5", "--weight", 2, "--dtype", "bfloat16", "--no-probe", "--json")
    found = json.loads(run("merge", tiny_base, adapter, tmp_path / "out", *options))
    assert [weight for _, weight in found["record"]["adapters"]] == [2.0, -0.5]
    assert found["record"]["dtype"] == "bfloat16"
    assert found["record"]["probe"]["probed"] is False
    shown = run("merge", tiny_base, adapter, tmp_path / "plain", "--no-probe")
    assert "copied bit for bit" in shown
    shown = run("merge", tiny_base, adapter, tmp_path / "rounded", "--no-probe", "--dtype", "bfloat16")
    assert "others stored in bfloat16" in shown
    assert "copied" not in shown
    found = json.loads(run("extract", tiny_base, tmp_path / "out", "--out", tmp_path / "x", "--energy", 0.9, "--json"))
    assert found["modules"]


def test_mistakes_are_told(run, tiny_base, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"--also .*: 'much' is not a number; expected DIR=WEIGHT"):
        run("merge", tiny_base, adapter, tmp_path / "out", "--also", f"{adapter}=much")
    with pytest.raises(BaseModelError, match="this reads files"):
        run("merge", "org/model", adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="--rank or --energy"):
        run("extract", tiny_base, tiny_base, "--out", tmp_path / "x")
    with pytest.raises(OutputError, match="exists already"):
        run("extract", tiny_base, tiny_base, "--out", adapter, "--rank", 2)


def test_extract_groups_what_it_leaves_out_and_names_the_base_as_it_is_called(run, tiny_base, tmp_path, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    command = ("extract", tiny_base, tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "x")
    shown = run(*command).split("left out")[1]
    assert "input_layernorm.weight" in shown
    assert "model.layers.0" not in shown
    assert "model.layers.0.input_layernorm.weight" in run(*command, "--overwrite", "--modules").split("left out")[1]
    monkeypatch.setattr(extract, "folder_of", lambda base: {"org/base": str(tiny_base)}.get(base, base))
    run("extract", "org/base", tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "y")
    assert load_adapter(tmp_path / "y").metadata.base == "org/base"


def test_extract_replaces_where_told_and_lists_modules_where_told(run, tiny_base, adapter, tmp_path):
    run("merge", tiny_base, adapter, tmp_path / "out", "--no-probe")
    extract = ("extract", tiny_base, tmp_path / "out", "--out", tmp_path / "again", "--rank", 2)
    assert "model.layers" not in run(*extract)
    with pytest.raises(OutputError, match=r"exists already; .*--overwrite"):
        run(*extract)
    assert "model.layers.0.self_attn.q_proj" in run(*extract, "--overwrite", "--modules")


def test_what_cannot_be_written_or_weighted_is_told_before_the_base_is_looked_for(run, adapter, tmp_path):
    with pytest.raises(OutputError, match=r"exists already; choose another name, or replace it with --overwrite$"):
        run("merge", tmp_path / "no base", adapter, tmp_path)
    with pytest.raises(ConfigError, match="a weight must be a finite number"):
        run("merge", tmp_path / "no base", adapter, tmp_path / "out", "--weight", "nan")


@pytest.fixture
def with_gguf(tmp_path):
    """A base, a GGUF file like it, and an adapter."""
    model = tiny_of("llama")
    model.save_pretrained(tmp_path / "base")
    write_base(tiny_of("llama", seed=1), "llama", tmp_path / "like.gguf")
    attachment = attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    for parameter in attachment.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    save_adapter(detach(model), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "like.gguf"


def test_a_merge_as_gguf(run, with_gguf, tmp_path):
    base, adapter, like = with_gguf
    out = tmp_path / "out.gguf"
    shown = run("merge", base, adapter, tmp_path / "out", "--gguf", out, "--gguf-like", like)
    assert "bit for bit; logits differ by" in shown
    options = ("--gguf", tmp_path / "2.gguf", "--gguf-like", like, "--dtype", "float16", "--no-probe", "--json")
    found = json.loads(run("merge", base, adapter, tmp_path / "2", *options))["gguf"]
    assert (found["dtype"], found["architecture"], found["probe"]["probed"]) == ("float16", "llama", False)
    assert out.stat().st_size > (tmp_path / "2.gguf").stat().st_size > 0


def test_what_stands_against_gguf_is_told_before_the_merge(run, with_gguf, tiny_base, tmp_path):
    base, adapter, like = with_gguf
    for options, error, told in (
        (("--gguf", tmp_path / "x.gguf"), ConfigError, "--gguf-like FILE.gguf"),
        (("--gguf-like", like), ConfigError, "goes with --gguf"),
        (("--gguf", tmp_path / "out" / "x.gguf", "--gguf-like", like), ConfigError, "name one beside it"),
        (("--gguf", like, "--gguf-like", like), OutputError, "exists already"),
        (("--gguf", tmp_path / "x.gguf", "--gguf-like", base / "config.json"), AdapterError, "begins with"),
    ):
        with pytest.raises(error, match=told):
            run("merge", base, adapter, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()


def test_an_export_that_fails_says_what_stays(run, with_gguf, tmp_path, monkeypatch):
    base, adapter, like = with_gguf

    def full(*_, **__):
        raise OutputError("no room")

    monkeypatch.setattr(veneer, "export_gguf", full)
    with pytest.raises(OutputError, match=r"no room; .*out was merged and stays"):
        run("merge", base, adapter, tmp_path / "out", "--gguf", tmp_path / "x.gguf", "--gguf-like", like, "--no-probe")
    assert (tmp_path / "out" / "model.safetensors").exists()
