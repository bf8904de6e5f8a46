"""Exported checkpoints in llama.cpp itself: its logits are transformers', for each family and type."""

import pytest
import torch
from tests.files.gguf_bases import FAMILY_SETTINGS, MORE_SETTINGS, tiny, write_base
from transformers import AutoModelForCausalLM

from veneer.tools.merge_gguf import export_gguf

pytest.importorskip("llama_cpp")

from tests.parity.llama import difference, logits_in_llama_cpp, logits_of

GELU = ("gpt2", "gemma", "gemma2", "gemma3_text")  # which is a table of 16 bits there


@pytest.mark.parametrize("kind", [*FAMILY_SETTINGS, *MORE_SETTINGS, "gpt2"])
def test_llama_cpp_gives_the_logits_of_the_checkpoint(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "model")
    write_base(tiny(kind, seed=1), kind, tmp_path / "like.gguf")
    export_gguf(tmp_path / "model", tmp_path / "like.gguf", tmp_path / "out.gguf")
    expected, close = logits_of(model), 1e-3 if kind in GELU else 1e-5
    assert difference(logits_in_llama_cpp(tmp_path / "out.gguf"), expected) < close
    assert difference(logits_in_llama_cpp(tmp_path / "like.gguf"), expected) > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_are_loaded(kind, dtype, tmp_path):
    # Weights in the dtype already: what differs is how llama.cpp multiplies them.
    tiny(kind).to(dtype).save_pretrained(tmp_path / "model")
    write_base(tiny(kind, seed=1), kind, tmp_path / "like.gguf")
    export_gguf(tmp_path / "model", tmp_path / "like.gguf", tmp_path / "out.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    found = logits_in_llama_cpp(tmp_path / "out.gguf")
    assert difference(found, logits_of(model.requires_grad_(False))) < 3e-2


@pytest.mark.parametrize("kind", ["smollm3", "gemma3_text", "gpt2"])
def test_an_untied_head_is_loaded_beside_the_table(kind, tmp_path):
    write_base(tiny(kind, seed=1), kind, tmp_path / "like.gguf")
    model = tiny(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "like.gguf", tmp_path / "out.gguf")
    close = 1e-3 if kind in GELU else 1e-5
    assert difference(logits_in_llama_cpp(tmp_path / "out.gguf"), logits_of(model)) < close
