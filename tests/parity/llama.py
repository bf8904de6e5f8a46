"""Logits of llama.cpp, by its C interface: where llama-cpp-python 0.3.36 is installed."""

import ctypes

import numpy as np
import pytest
import torch
from tests.files.gguf_bases import TOKENS, VOCABULARY

llama_cpp = pytest.importorskip("llama_cpp")


def logits_of(model) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def logits_in_llama_cpp(base, lora=None) -> np.ndarray:
    """The logits that llama.cpp computes, by its C interface: there is no tokenizer."""
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap = False
    settings.use_extra_bufts = False  # repacked weights are multiplied in fewer bits
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), settings)
    assert model
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    settings.n_threads = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    if lora is not None:
        adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
        assert adapter
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
    count = len(TOKENS)
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for place, token in enumerate(TOKENS):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
        batch.seq_id[place][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [llama_cpp.llama_get_logits_ith(context, place) for place in range(count)]
    found = np.stack([np.ctypeslib.as_array(row, (VOCABULARY,)).copy() for row in rows])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())
