"""The merged model against PEFT's `merge_and_unload`: the same logits in float32, fewer wrong bits in bfloat16."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import veneer
from veneer.nn.attach import attach, attachment_of, detach
from veneer.tools.merge import merge, unmerge
from veneer.tools.merge_weights import round_once

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
peft = pytest.importorskip("peft")

IDS = torch.arange(40).reshape(2, 20) * 7 % 259
SETTINGS = {
    "all linear": {"target_modules": "all-linear"},
    "dora and rslora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "table": {"target_modules": ["embed_tokens", "v_proj"]},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def made(model: nn.Module, settings: dict, folder) -> veneer.Adapter:
    """A filled adapter, saved for PEFT to load."""
    attach(model, veneer.LoRAConfig(rank=4, alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attachment_of(model).parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapter = detach(model)
    veneer.save_adapter(adapter, folder)
    return adapter


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_logits_equal_pefts(name, tiny, tmp_path):
    ours, theirs = (tiny(tie_word_embeddings=False) for _ in range(2))
    base = logits(ours)
    adapter = made(ours, SETTINGS[name], tmp_path / "adapter")
    record = merge(ours, adapter)
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval().merge_and_unload()
    expected = logits(merged)
    assert (logits(ours) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - base).abs().max() > 1e-2 * expected.abs().max()
    assert record.probe.relative_difference < 1e-5
    unmerge(ours, record)
    assert torch.equal(logits(ours), base)


def test_in_bfloat16_ours_is_the_nearest_and_pefts_is_not(tiny, tmp_path):
    """With the adapter's own bfloat16 kept, PEFT rounds the update before it adds it."""
    ours, theirs = (tiny(tie_word_embeddings=False).bfloat16() for _ in range(2))
    adapter = made(ours, SETTINGS["all linear"], tmp_path / "wide")
    narrow = {
        path: replace(pair, lora_A=pair.lora_A.bfloat16(), lora_B=pair.lora_B.bfloat16())
        for path, pair in adapter.modules.items()
    }
    adapter = replace(adapter, modules=narrow)
    veneer.save_adapter(adapter, tmp_path / "adapter")
    exact = {
        path: round_once(ours.get_parameter(f"{path}.weight").double() + pair.delta(), torch.bfloat16)
        for path, pair in adapter.modules.items()
    }
    merge(ours, adapter)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False)
    merged = loaded.eval().merge_and_unload()
    wrong = {"ours": 0, "peft": 0}
    for path, weight in exact.items():
        wrong["ours"] += (ours.get_parameter(f"{path}.weight") != weight).sum().item()
        wrong["peft"] += (merged.get_parameter(f"{path}.weight") != weight).sum().item()
    assert wrong["ours"] == 0
    assert wrong["peft"] > 0.01 * sum(weight.numel() for weight in exact.values())
