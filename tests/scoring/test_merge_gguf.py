"""The proof of an exported GGUF file: its logits, as transformers reads it."""

import pytest
import torch
from tests.files.gguf_bases import tiny, write_base

from veneer.base.catalog import EMBEDDED
from veneer.base.gguf import converted_gguf
from veneer.errors import AdapterError
from veneer.scoring import merge_gguf as module
from veneer.scoring.merge_gguf import gguf_proof
from veneer.tools.merge_gguf import export_gguf

READ_BY_TRANSFORMERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "qwen2_moe", "qwen3_moe"]


@pytest.fixture
def made(tmp_path):
    def make(kind: str):
        write_base(tiny(kind, seed=1), kind, tmp_path / "like.gguf", words=True)
        tiny(kind).save_pretrained(tmp_path / "model")
        return tmp_path / "model", tmp_path / "like.gguf", tmp_path / "out.gguf"

    return make


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_gives_the_logits_of_the_checkpoint(kind, made):
    folder, like, out = made(kind)
    found = export_gguf(folder, like, out, prove=gguf_proof(folder)).probe
    assert found.probed, found.reason
    assert found.relative_difference < 1e-5


def test_16_bit_files_are_compared_as_their_type_allows(made):
    folder, like, out = made("llama")
    proof = gguf_proof(folder, torch.bfloat16)
    found = export_gguf(folder, like, out, dtype="bfloat16", prove=proof).probe
    assert 1e-5 < found.relative_difference < found.tolerance == 0.15


def test_other_logits_are_refused_and_the_file_is_gone(made, tmp_path):
    folder, like, out = made("llama")
    proof = gguf_proof(folder)
    tiny("llama", seed=2).save_pretrained(folder)
    with pytest.raises(AdapterError, match="does not compute what"):
        export_gguf(folder, like, out, prove=proof)
    assert not list(tmp_path.glob("*out.gguf*"))


def test_without_a_proof_the_reason_is_said(made, monkeypatch):
    folder, like, out = made("olmo2")
    found = export_gguf(folder, like, out, prove=gguf_proof(folder)).probe
    assert (found.probed, "transformers does not read it" in found.reason) == (False, True)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 0)
    assert "GB are free" in gguf_proof(folder).reason


@pytest.mark.model
def test_the_embedded_model_comes_back_as_it_was(smollm2, tmp_path):
    like = EMBEDDED["smollm2"].path()
    folder = converted_gguf(like)
    found = export_gguf(folder, like, tmp_path / "out.gguf", prove=gguf_proof(folder))
    assert (found.tensors, found.probe.difference) == (272, 0.0)
