"""A base is named in one way, whichever verb reads its files."""

import sys

import pytest
import torch
from huggingface_hub import constants

import veneer
from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.base.source import Source
from veneer.cli import main as cli
from veneer.config import LoRAConfig
from veneer.files.peft import save_adapter


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard error)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["veneer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def adapter(tmp_path):
    pair = LowRank(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    modules = {"model.layers.0.self_attn.q_proj": pair}
    save_adapter(Adapter(modules, LoRAConfig(rank=2, alpha=2.0), metadata=AdapterMetadata()), tmp_path / "adapter")
    return tmp_path / "adapter"


def verbs(adapter, out, base):
    yield "show", adapter, "--base", base
    yield "check", adapter, "--base", base, "--no-probe"
    yield "convert", adapter, "--to", "mlx", "--out", out / "mlx", "--base", base
    yield "merge", base, adapter, out / "merged", "--no-probe"
    yield "extract", base, out / "merged", "--rank", "2", "--out", out / "extracted"


def test_a_name_stands_for_a_folder_in_every_verb(call, adapter, tiny_base, tmp_path, monkeypatch):
    found = Source("org/tiny", str(tiny_base), is_local=True)
    monkeypatch.setattr(veneer, "find_source", lambda _: found)
    monkeypatch.setattr("veneer.base.source.find_source", lambda _: found)
    for verb in verbs(adapter, tmp_path, "tiny"):
        assert call(*verb)[0] == 0, verb


def test_a_hub_id_in_the_cache_is_its_folder_in_every_verb(call, adapter, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for file in tiny_base.iterdir():  # links, as the hub has them
        (place / "snapshots" / ("a" * 40) / file.name).symlink_to(file)
    for verb in verbs(adapter, tmp_path, "org/tiny"):
        assert call(*verb)[0] == 0, verb
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_a_base_that_is_not_here_is_told_alike_by_every_verb(call, adapter, tmp_path):
    told = {call(*verb) for verb in verbs(adapter, tmp_path, "smollm")}
    assert len(told) == 1
    code, error = told.pop()
    assert code == 2
    assert "base 'smollm': this reads files" in error
    assert "smollm2" in error
