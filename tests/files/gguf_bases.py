"""Tiny random models of each family that llama.cpp has, and GGUF files of them as its converter would write them."""

import gguf
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from veneer.files.gguf_lora import FAMILIES
from veneer.files.rotary import to_pairs

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
MORE_SETTINGS = {
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "qwen2_moe": EXPERTS | {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1,
    },
}  # fmt: skip
"""Families that only whole models are written of, not adapters."""


def tiny(kind: str, seed: int = 0, **changes):
    """A tiny random model of a family."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, **changes)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        config = CONFIG_MAPPING[kind](**(sizes | {**FAMILY_SETTINGS, **MORE_SETTINGS}[kind] | changes))
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
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)
    if kind == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def write_base(model, kind: str, path, *, words: bool = False) -> None:
    """The model as llama.cpp's converter would write it; with words, which transformers counts."""
    family, config = FAMILIES[kind], model.config
    writer = gguf.GGUFWriter(path, family.architecture)
    write_fields(writer, config, kind)
    if words:
        writer.add_token_list([f"w{number}" for number in range(VOCABULARY)])
        writer.add_pad_token_id(0)
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
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
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
