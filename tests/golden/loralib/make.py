"""Makes the golden files beside it with loralib 0.1.2 and torch 2.13: `python tests/golden/loralib/make.py`.

`lora.pt` is what `lora_state_dict` gives; `expected.safetensors` is what each layer's own merge adds to a weight of
zero; `base/` is a checkpoint of the shapes.
"""

from pathlib import Path

import loralib
import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
ALPHA = 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        settings = {"r": 2, "lora_alpha": ALPHA}
        self.embed_tokens = loralib.Embedding(11, 6, **settings)
        self.proj = loralib.Linear(6, 5, **settings)
        self.qv = loralib.MergedLinear(6, 12, enable_lora=[True, False, True], **settings)
        self.qkv = loralib.MergedLinear(6, 12, enable_lora=[True, True, True], **settings)
        self.conv = loralib.Conv2d(3, 4, 3, **settings)


torch.manual_seed(0)
model = Model().train()
for name, parameter in model.named_parameters():
    nn.init.normal_(parameter) if "lora_" in name or "bias" in name else nn.init.zeros_(parameter)
torch.save(loralib.lora_state_dict(model, bias="all"), HERE / "lora.pt")
model.eval()  # merges
merged = {name.replace("conv.conv", "conv"): one.detach() for name, one in model.named_parameters() if "weight" in name}
save_file({name: one.contiguous() for name, one in merged.items()}, HERE / "expected.safetensors")
(HERE / "base").mkdir(exist_ok=True)
save_file({name: torch.zeros_like(one).contiguous() for name, one in merged.items()}, HERE / "base/model.safetensors")
