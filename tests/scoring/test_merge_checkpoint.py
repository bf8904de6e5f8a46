"""The proof of a merge on files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from veneer.config import LoRAConfig
from veneer.errors import AdapterError, ConfigError
from veneer.files.peft import save_adapter
from veneer.files.shards import read_checkpoint, read_tensor
from veneer.nn.attach import attach, detach
from veneer.scoring import merge_checkpoint as module
from veneer.scoring.merge_checkpoint import merge_checkpoint
from veneer.tools import merge_checkpoint as tool
from veneer.tools.merge_checkpoint_record import RECORD


def made(folder, **config):
    model = LlamaForCausalLM.from_pretrained(folder)
    attachment = attach(model, LoRAConfig(rank=2, **config))
    for parameter in attachment.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return detach(model)


def test_the_merged_files_compute_what_the_attached_adapter_does(tiny_base, tmp_path):
    save_adapter(made(tiny_base), tmp_path / "adapter")
    record = merge_checkpoint(tiny_base, tmp_path / "adapter", tmp_path / "out")
    assert record.probe.probed
    assert record.probe.relative_difference < 1e-5 < record.probe.relative_effect
    assert json.loads((tmp_path / "out" / RECORD).read_text())["probe"]["probed"] is True


def test_several_adapters_are_proved_as_their_sum(tiny_base, tmp_path):
    parts = [(made(tiny_base, target_modules=[name]), weight) for name, weight in (("q_proj", 0.5), ("lm_head", -1.0))]
    record = merge_checkpoint(tiny_base, parts, tmp_path / "out")
    assert record.probe.relative_difference < 1e-5 < record.probe.relative_effect
    assert record.untied == ("lm_head.weight",)


def test_files_that_compute_something_else_are_refused_and_gone(tiny_base, tmp_path, monkeypatch):
    right = tool.add_update

    def spoilt(weight, out, *rest, **options):
        weight.neg_()
        return right(weight, out, *rest, **options)

    monkeypatch.setattr(tool, "add_update", spoilt)
    with pytest.raises(AdapterError, match="does not compute what the adapter did"):
        merge_checkpoint(tiny_base, made(tiny_base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused_before_anything_is_written(tiny_base, tmp_path):
    adapter = made(tiny_base)
    other = tmp_path / "other"
    LlamaForCausalLM.from_pretrained(tiny_base).apply(_shifted).save_pretrained(other)
    with pytest.raises(AdapterError, match="made for other weights"):
        merge_checkpoint(other, adapter, tmp_path / "out")
    beside = made(other)  # the other one of two is looked at too
    with pytest.raises(AdapterError, match="made for other weights"):
        merge_checkpoint(other, [(beside, 1.0), (adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge_checkpoint(other, adapter, tmp_path / "out", any_base=True).probe.probed


def _shifted(one):
    if isinstance(one, nn.Linear):
        one.weight.data += 0.01


def test_a_probe_of_ones_own_is_asked_and_none_is_not(tiny_base, tmp_path):
    ids = torch.tensor([[5, 6]])
    record = merge_checkpoint(tiny_base, made(tiny_base), tmp_path / "a", probe=lambda one: one(input_ids=ids).logits)
    assert record.probe.probed
    assert merge_checkpoint(tiny_base, made(tiny_base), tmp_path / "b", probe=None).probe.reason == "not asked for"


def test_where_memory_does_not_suffice_it_is_said(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1000)
    record = merge_checkpoint(tiny_base, made(tiny_base), tmp_path / "out")
    assert "are free" in record.probe.reason
    assert (tmp_path / "out").exists()


def test_a_base_that_is_no_language_model_is_merged_without_a_proof(tiny_base, tmp_path):
    adapter = made(tiny_base)
    checkpoint = read_checkpoint(tiny_base)
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: read_tensor(checkpoint, name) for name in checkpoint.tensors}, base / "model.safetensors")
    record = merge_checkpoint(base, adapter, tmp_path / "out")
    assert record.probe.reason.startswith("the base is not loaded as a causal language model")


def test_no_adapter_is_an_error(tiny_base, tmp_path):
    with pytest.raises(ConfigError, match="no adapter"):
        merge_checkpoint(tiny_base, [], tmp_path / "out")
