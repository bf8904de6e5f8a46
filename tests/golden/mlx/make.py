"""Makes the golden files beside it with mlx-lm 0.32.2 and mlx 0.32.4 (CPU): `python tests/golden/mlx/make.py`.

`lora` and `dora` are adapters as mlx-lm saves them; `expected.safetensors` is what mlx-lm's own `fuse` makes of them:
the update alone (over weights of zero) for `lora`, weight and fused weight for `dora`.
"""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tuner.utils import linear_to_lora_layers

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 2, "rms_norm_eps": 1e-6,
    "vocab_size": 11, "num_key_value_heads": 1, "head_dim": 4, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 4, "max_position_embeddings": 64, "norm_topk_prob": True,
}  # fmt: skip


def make(name, model, parameters, dora):
    mx.random.seed(0)
    model.freeze()
    linear_to_lora_layers(model, 1, parameters, use_dora=dora)
    drawn = tree_map(lambda one: mx.random.normal(one.shape) * 0.5, model.trainable_parameters())
    model.update(drawn)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": name, "num_layers": 1, "model": "tiny", "lora_parameters": parameters, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    return {path: one for path, one in model.named_modules() if "fuse" in dir(one)}


lora = qwen3_moe.Model(qwen3_moe.ModelArgs(model_type="qwen3_moe", **SIZES, **EXPERTS))
lora.update(tree_map(mx.zeros_like, lora.parameters()))
keys = [
    "self_attn.q_proj", "self_attn.v_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj",
    "mlp.switch_mlp.down_proj", "model.embed_tokens",
]  # fmt: skip
layers = make("lora", lora, {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys}, dora=False)
expected = {f"delta.{path}": one.fuse().weight for path, one in layers.items()}

dora = llama.Model(llama.ModelArgs(model_type="llama", **SIZES))
weights = dict(tree_flatten(dora.parameters()))
layers = make("dora", dora, {"rank": 2, "scale": 0.5, "dropout": 0.1, "keys": ["self_attn.k_proj"]}, dora=True)
for path, one in layers.items():
    expected |= {f"weight.{path}": weights[f"{path}.weight"], f"fused.{path}": one.fuse().weight}
mx.save_safetensors(str(HERE / "expected.safetensors"), expected)
