"""What is written with loralib's keys, loralib's layers load: what they merge is the delta.

Runs where `loralib` is installed (0.1.2); tests/golden/loralib holds what it wrote.
"""

import pytest
import torch
from safetensors.torch import load
from tests.files.drawn import pair_of
from torch import nn

from veneer.files.foreign import foreign_adapter
from veneer.files.format import Hints
from veneer.files.loralib import FILE, write_loralib

loralib = pytest.importorskip("loralib")


def test_deltas_are_those_that_loralib_merges():
    settings = {"lora_alpha": 3}
    layers = {
        "proj": (loralib.Linear(5, 4, r=2, **settings), pair_of(4, 5, 2, 0.7, 0)),
        "table": (loralib.Embedding(7, 4, r=3, **settings), pair_of(4, 7, 3, 1.5, 1, form="embedding")),
        "conv": (loralib.Conv2d(3, 4, 3, r=2, **settings), pair_of(4, 3, 2, 0.2, 2, form="conv")),
        "flat": (loralib.Conv2d(3, 4, 1, r=1, **settings), pair_of(4, 3, 1, 0.2, 3, form="conv", kernel=1)),
    }
    model = nn.ModuleDict({path: layer for path, (layer, _) in layers.items()})
    adapter = foreign_adapter({path: pair for path, (_, pair) in layers.items()})
    tensors = load(write_loralib(adapter, Hints(alpha=3))[FILE])
    assert set(tensors) == {name for name in model.state_dict() if "lora_" in name}
    model.load_state_dict(tensors, strict=False)
    for path, (layer, pair) in layers.items():
        weight = layer.conv.weight if "conv" in dir(layer) else layer.weight
        before = weight.detach().clone()
        layer.eval()
        assert torch.allclose(weight - before, pair.delta().float(), rtol=1e-4, atol=1e-5), path
