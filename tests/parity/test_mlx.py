"""What is written in mlx-lm's layout, mlx-lm loads: its fused weights are the base's and the delta.

Runs where `mlx` and `mlx_lm` are installed (`pip install "mlx[cpu]" mlx-lm`); tests/golden/mlx holds what it wrote.
"""

import numpy as np
import pytest
import torch
from tests.files.drawn import pair_of

from veneer.files.foreign import foreign_adapter
from veneer.files.mlx import write_mlx

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

SIZES = {
    "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 2, "rms_norm_eps": 1e-6,
    "vocab_size": 11, "num_key_value_heads": 1, "head_dim": 4, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 4, "max_position_embeddings": 64, "norm_topk_prob": True, "model_type": "qwen3_moe",
}  # fmt: skip
LAYER = "model.layers.1"


def loaded(adapter, folder):
    """A model of zeros with an adapter loaded, as `mlx_lm.fuse` does it: path to the layers that can be fused."""
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3_moe
    from mlx_lm.tuner.utils import load_adapters

    for name, content in write_mlx(adapter).items():
        (folder / name).write_bytes(content)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs(**SIZES))
    model.update(tree_map(mx.ones_like if adapter.config.use_dora else mx.zeros_like, model.parameters()))
    load_adapters(model, str(folder))
    return {path: one for path, one in model.named_modules() if "fuse" in dir(one)}


def test_deltas_are_those_that_mlx_lm_fuses(tmp_path):
    modules = {
        f"{LAYER}.self_attn.q_proj": pair_of(8, 8, 2, 0.5, 0),
        f"{LAYER}.self_attn.v_proj": pair_of(4, 8, 1, 2.0, 1),
        f"{LAYER}.mlp.experts.gate_up_proj": pair_of(8, 8, 3, 0.25, 2, form="experts", experts=2),
        f"{LAYER}.mlp.experts.down_proj": pair_of(8, 4, 2, 0.5, 3, form="experts", experts=2),
        "model.embed_tokens": pair_of(8, 11, 2, 0.5, 4, form="embedding"),
    }
    layers = loaded(foreign_adapter(modules), tmp_path)
    deltas = {path: torch.from_numpy(np.array(one.fuse().weight)) for path, one in layers.items()}
    switch = f"{LAYER}.mlp.switch_mlp"
    deltas[f"{LAYER}.mlp.experts.gate_up_proj"] = torch.cat(
        [deltas.pop(f"{switch}.gate_proj"), deltas.pop(f"{switch}.up_proj")], 1
    )
    deltas[f"{LAYER}.mlp.experts.down_proj"] = deltas.pop(f"{switch}.down_proj")
    assert deltas.keys() == modules.keys()
    for path, delta in deltas.items():
        assert torch.allclose(delta, modules[path].delta().float(), rtol=1e-5, atol=1e-6), path


def test_magnitudes_are_those_that_mlx_lm_fuses(tmp_path):
    pair = pair_of(8, 8, 2, 0.5, 0, dora=True)
    layers = loaded(foreign_adapter({f"{LAYER}.self_attn.q_proj": pair}), tmp_path)
    (fused,) = (torch.from_numpy(np.array(one.fuse().weight)) for one in layers.values())
    adapted = 1 + pair.delta()
    expected = pair.magnitude.double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    assert torch.allclose(fused, expected.float(), rtol=1e-5, atol=1e-6)
