"""Loading a base: where from, frozen, tied, in which dtype."""

import gc
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import veneer
from veneer.base import load as load_module
from veneer.base.cache import cache_folder
from veneer.base.catalog import EMBEDDED
from veneer.base.gguf import converted_gguf
from veneer.base.load import check_storage, compute_dtype, has_bf16_units, load_base, quantise_base
from veneer.errors import BaseModelError, ConfigError
from veneer.nn.fingerprint import fingerprint
from veneer.storage.int8 import Int8Linear
from veneer.storage.nf4 import NF4Linear


def test_a_folder_loads_frozen_and_tied(tiny_base):
    model, tokenizer = load_base(str(tiny_base))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template is not None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_16_bit_weights_compute_in_float32_without_units_and_the_log_says_so(tiny_base, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "half"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    monkeypatch.setattr(load_module, "has_bf16_units", lambda: False)
    with caplog.at_level(logging.INFO, logger="veneer"):
        model, _ = load_base(str(folder))
    assert model.dtype == torch.float32
    assert "computes in float32: this processor has no units for bfloat16" in caplog.text
    monkeypatch.setattr(load_module, "has_bf16_units", lambda: True)
    half, _ = load_base(str(folder))
    assert half.dtype == torch.bfloat16
    assert fingerprint(half) == fingerprint(model), "the fingerprint does not depend on the loading dtype"


@pytest.mark.parametrize(("storage", "kind"), [("int8", Int8Linear), ("nf4", NF4Linear)])
def test_a_base_is_quantised_while_it_is_loaded(tiny_base, caplog, storage, kind):
    plain, _ = load_base(str(tiny_base), storage="plain")
    with caplog.at_level(logging.INFO, logger="veneer"):
        model, _ = load_base(str(tiny_base), storage=storage)
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) == 14
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    before = sum(one.nbytes for one in (*plain.parameters(), *plain.buffers()))
    after = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    said = f"tiny: 14 linear layers stored as {storage}, {before:,} bytes before, {after:,} after"
    assert said in caplog.text
    assert after < before / 1.5
    assert fingerprint(model) != fingerprint(plain)
    tokens = torch.arange(9)[None]
    difference = model(input_ids=tokens).logits - plain(input_ids=tokens).logits
    assert difference.norm() < {"int8": 0.02, "nf4": 0.2}[storage] * plain(input_ids=tokens).logits.norm()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_quantised_base_lets_its_file_go(tiny_base):
    """The file is mapped into memory while it is read; one table that still lay in it would keep all of it there."""
    model, _ = load_base(str(tiny_base), storage="nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gc.collect()
    assert str(tiny_base) not in Path("/proc/self/maps").read_text()


def test_a_head_of_its_own_is_left_as_it_is(tiny):
    model = tiny(tie_word_embeddings=False)
    quantise_base(model, "int8")
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)


def test_what_transformers_keeps_in_float32_is_left_as_it_is(tiny):
    """T5 reads the dtype of such a layer's weight in its forward."""
    model = tiny()
    model._keep_in_fp32_modules = {"o_proj"}
    quantise_base(model, "nf4")
    layer = model.model.layers[0].self_attn
    assert (type(layer.o_proj), type(layer.q_proj)) == (nn.Linear, NF4Linear)
    settings = T5Config(
        d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    t5 = T5ForConditionalGeneration(settings).eval()
    quantise_base(t5, "int8")
    inner = t5.encoder.block[0].layer
    assert (type(inner[0].SelfAttention.q), type(inner[1].DenseReluDense.wo)) == (Int8Linear, nn.Linear)
    tokens = torch.arange(5)[None]
    assert t5(input_ids=tokens, labels=tokens).logits.shape == (1, 5, 50)


def test_storage_that_cannot_be_had(tiny_base):
    for load in (lambda: load_base("no/such/folder/at/all", storage="nf5"), lambda: check_storage("nf5")):
        with pytest.raises(ConfigError, match=r"is not one of plain, int8, nf4; nearest: 'nf4'"):
            load()
    quantised = load_base(tiny_base, storage="int8")[0]
    for storage in ("int8", "nf4"):
        message = rf"are quantised already \(14 as int8\), and no other .* load the base anew with storage='{storage}'"
        with pytest.raises(BaseModelError, match=message):
            quantise_base(quantised, storage)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(BaseModelError, match="GPT2LMHeadModel has no linear layer that can be stored as nf4"):
        quantise_base(gpt2, "nf4")


@pytest.mark.parametrize("stored", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_one_that_the_processor_is_fast_in(stored):
    dtype, reason = compute_dtype(stored, torch.device("cpu"))
    assert dtype in (torch.float32, torch.float64, *([torch.bfloat16] if has_bf16_units() else []))
    assert reason
    assert compute_dtype(stored, torch.device("cuda"))[0] == (stored or torch.float32)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("no/such/folder/at all", "no such file or directory"),
        ("smollm", "nearest: .smollm2."),
        ("missing.gguf", "no such file"),
        ("org/model", "cannot be loaded from the hub"),
    ],
)
def test_a_base_that_is_not_there_is_one_clear_error(base, message):
    with pytest.raises(BaseModelError, match=message):
        load_base(base)


def test_files_and_folders_that_hold_no_model(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(BaseModelError, match=r"expected a directory, a hub id or a .gguf file"):
        load_base(str(tmp_path / "a.txt"))
    with pytest.raises(BaseModelError, match="without config"):
        load_base(str(tmp_path / "tiny"))
    with pytest.raises(BaseModelError, match="nearest"):
        load_base(str(tmp_path / "tiny.gguf"))


def test_a_file_that_is_no_gguf_is_refused_and_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BaseModelError, match="cannot be read as a GGUF model"):
        load_base(str(fake))
    assert [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]
    with pytest.raises(BaseModelError, match="is damaged: expected SHA-256 00"):
        converted_gguf(fake, expected_sha256="00")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("VENEER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "veneer"
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.model
def test_the_embedded_model_is_converted_once_and_tied(smollm2):
    model, tokenizer = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert len([path for path in (cache_folder() / "gguf").glob("b179c95*") if path.is_dir()]) == 1
    assert "assistant" in tokenizer.chat_template


@pytest.mark.model
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, smollm2, caplog):
    """The copy in the cache is vouched for by its manifest; one that was changed is not loaded."""
    source = next(path for path in (cache_folder() / "gguf").glob("b179c95*") if path.is_dir())
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    copy = tmp_path / "gguf" / source.name
    shutil.copytree(source, copy)
    (copy / "config.json").write_text("{}")
    made = []
    monkeypatch.setattr("veneer.base.gguf._convert", lambda _, folder: made.append((folder / "new").write_text("x")))

    assert converted_gguf(EMBEDDED["smollm2"].path()) == copy
    assert made
    assert "damaged" in caplog.text
    assert (copy / "new").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "truncated"])
def test_a_checkpoint_that_is_not_whole_is_refused(change, tiny_base, tmp_path):
    """transformers would fill what is missing at random."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_base, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
    elif change == "extra":
        weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(BaseModelError, match=r"up_proj|cannot be loaded"):
        load_base(str(folder))


def test_a_base_under_an_adapter_is_not_quantised(tiny):
    model = tiny()
    veneer.attach(model, veneer.LoRAConfig(rank=2, target_modules=["q_proj"]))
    with pytest.raises(veneer.VeneerError, match="detach"):
        quantise_base(model, "nf4")
    assert any(parameter.requires_grad for parameter in model.parameters())
