"""GGUF adapters in llama.cpp itself: its logits are those of the base with the deltas added, for each family.

Runs where `llama_cpp` (llama-cpp-python 0.3.36) is installed. Bases are tiny, random, float32, and made here by the
names and the order of rows that the adapter's writer uses; llama.cpp computing their logits right proves both.
"""

import pytest
import torch
from tests.files.drawn import error_between, pair_of
from tests.files.gguf_bases import FAMILY_SETTINGS, VOCABULARY, WIDTH, tiny, write_base

from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints
from veneer.files.gguf_lora import FILE, read_gguf_lora, write_gguf_lora
from veneer.files.shards import read_checkpoint

pytest.importorskip("llama_cpp")

from tests.parity.llama import difference, logits_in_llama_cpp, logits_of


def adapter_for(model, kind: str):
    """Random factors for every layer that has a place, of several ranks and scalings."""
    tied, modules = model.config.tie_word_embeddings, {}
    for path, module in model.named_modules():
        seed = len(modules)
        more = {"rank": 2 + seed % 3, "scaling": 0.05 + 0.05 * (seed % 2), "seed": seed}
        if isinstance(module, torch.nn.Linear) and not (path == "lm_head" and tied):
            modules[path] = pair_of(*module.weight.shape, **more)
        elif type(module).__name__ == "Conv1D":
            modules[path] = pair_of(*module.weight.shape[::-1], **more, form="transposed")
        elif path.endswith("mlp.experts"):
            for leaf in ("gate_up_proj", "down_proj"):
                count, *sizes = getattr(module, leaf).shape
                modules[f"{path}.{leaf}"] = pair_of(*sizes, **more, form="experts", experts=count)
        elif path == "model.embed_tokens" and not tied:
            modules[path] = pair_of(WIDTH, VOCABULARY, **more, form="embedding")
    return foreign_adapter({path: one for path, one in modules.items() if not path.endswith("mlp.gate")})


@pytest.mark.parametrize("kind", [*FAMILY_SETTINGS, "gpt2"])
def test_llama_cpp_gives_the_logits_of_base_and_adapter(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    hints = Hints(base=read_checkpoint(tmp_path))
    write_base(model, kind, tmp_path / "base.gguf")
    adapter = adapter_for(model, kind)
    (tmp_path / FILE).write_bytes(write_gguf_lora(adapter, hints)[FILE])
    assert error_between(read_gguf_lora(tmp_path / FILE, hints), adapter) < 1e-6
    base = logits_of(model)
    weights = dict(model.named_parameters())
    for path, pair in adapter.modules.items():
        weights[path if pair.form == "experts" else f"{path}.weight"] += pair.delta().float()
    adapted = logits_of(model)
    # gelu is a table of 16 bits there
    close = 1e-3 if kind in ("gpt2", "gemma", "gemma2") else 1e-5
    assert difference(logits_in_llama_cpp(tmp_path / "base.gguf"), base) < close
    assert difference(logits_in_llama_cpp(tmp_path / "base.gguf", tmp_path / FILE), adapted) < close
    assert difference(base, adapted) > 50 * close
