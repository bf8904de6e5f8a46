"""GGUF adapters in llama.cpp itself: its logits are those of the base with the deltas added, for each family.

Runs where `llama_cpp` (llama-cpp-python 0.3.36) is installed. Bases are tiny, random, float32, and made here by the
names and the order of rows that the adapter's writer uses; llama.cpp computing their logits right proves both.
"""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from tests.files.drawn import error_between, pair_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints
from veneer.files.gguf_lora import FAMILIES, FILE, read_gguf_lora, write_gguf_lora
from veneer.files.rotary import to_pairs
from veneer.files.shards import read_checkpoint

llama_cpp = pytest.importorskip("llama_cpp")

VOCABULARY, WIDTH, TOKENS = 64, 64, [token * 5 % 64 for token in range(12)]
EXPERTS = {"num_experts_per_tok": 2}
FAMILY_SETTINGS = {
    "llama": {}, "mistral": {}, "smollm3": {"tie_word_embeddings": True}, "granite": {}, "arcee": {}, "olmo2": {},
    "qwen2": {}, "qwen3": {}, "phi3": {}, "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4, "num_key_value_heads": 4},
    "qwen3_moe": EXPERTS | {
        "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1,
    },
}  # fmt: skip


def tiny(kind: str):
    """A tiny random model of a family."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        config = CONFIG_MAPPING[kind](**(sizes | FAMILY_SETTINGS[kind]))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return model.requires_grad_(False).eval()


def write_fields(writer: gguf.GGUFWriter, config, kind: str) -> None:
    """What llama.cpp must know of a model."""
    heads = config.num_attention_heads
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_head_count(heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * WIDTH)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    if experts := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def write_base(model, kind: str, path) -> None:
    """The model as llama.cpp's converter would write it."""
    family, config = FAMILIES[kind], model.config
    writer = gguf.GGUFWriter(path, family.architecture)
    write_fields(writer, config, kind)
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family.pairs and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_pairs(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        parts = {name: tensor}
        if name.endswith("experts.gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True)
            parts = {f"{name.replace('gate_up_proj', leaf)}.weight": half for leaf, half in halves}
        elif name.endswith("experts.down_proj"):
            parts = {f"{name}.weight": tensor}
        for one, values in parts.items():
            writer.add_tensor(names.get_name(one, (".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
