"""Makes the golden files beside it with torchtune 0.6.1: `python tests/golden/torchtune/make.py`.

`adapter_model.pt` is a DoRA adapter of torchtune's own names; `expected.safetensors` is what torchtune's own
`tune_to_peft_adapter_weights` makes of it for a llama model (its magnitudes of q and k stay in the order of pairs), and
`rows`: which row of a projection in transformers' order `hf_to_tune` puts where.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from safetensors.torch import save_file

# The one file alone: torchtune itself needs a torchao that this torch has not.
folder = Path(find_spec("torchtune").submodule_search_locations[0])
spec = spec_from_file_location("convert_weights", folder / "models/convert_weights.py")
theirs = module_from_spec(spec)
spec.loader.exec_module(theirs)

HERE = Path(__file__).parent
HEADS = {"num_heads": 4, "num_kv_heads": 2, "dim": 32, "head_dim": 8}
LAYERS = {
    "attn.q_proj": (32, 32), "attn.k_proj": (16, 32), "attn.v_proj": (16, 32), "attn.output_proj": (32, 32),
    "mlp.w1": (24, 32), "mlp.w2": (32, 24), "mlp.w3": (24, 32),
}  # fmt: skip

torch.manual_seed(0)
adapter = {}
for path, (outputs, inputs) in LAYERS.items():
    adapter[f"layers.1.{path}.lora_a.weight"] = torch.randn(2, inputs)
    adapter[f"layers.1.{path}.lora_b.weight"] = torch.randn(outputs, 2)
    adapter[f"layers.1.{path}.magnitude"] = torch.rand(outputs) + 0.5
torch.save(adapter, HERE / "adapter_model.pt")
expected = theirs.tune_to_peft_adapter_weights(adapter, **HEADS)
rows = torch.arange(32.0)[:, None].expand(32, 32).contiguous()
moved = theirs.hf_to_tune({"model.layers.0.self_attn.q_proj.weight": rows}, **HEADS)
expected["rows"] = moved["layers.0.attn.q_proj.weight"][:, 0]
save_file({name: one.contiguous() for name, one in expected.items()}, HERE / "expected.safetensors")
