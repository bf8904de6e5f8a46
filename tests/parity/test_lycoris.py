"""What we write, LyCORIS reads as what it is."""

import pytest
import torch
from torch import nn

from veneer.adapter import Adapter, LowRank
from veneer.files.foreign import settings_for
from veneer.files.format import Hints
from veneer.files.kohya import FILE, FORMAT

wrapper = pytest.importorskip("lycoris.wrapper", reason="LyCORIS is not here (pip install lycoris-lora==4.1.3)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_magnitudes", [False, True])
def test_lycoris_reads_what_we_write(with_magnitudes, tmp_path):
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 8), "conv1": nn.Conv2d(4, 6, 3)})
    magnitudes = {
        name: torch.rand(one.weight.shape[0]) + 0.5 if with_magnitudes else None for name, one in model.items()
    }
    modules = {
        "q_proj": LowRank(torch.randn(2, 6), torch.randn(8, 2), 1.5, magnitude=magnitudes["q_proj"]),
        "conv1": LowRank(torch.randn(3, 4, 3, 3), torch.randn(6, 3, 1, 1), 1 / 3, "conv", magnitudes["conv1"]),
    }
    path = tmp_path / FILE
    path.write_bytes(b"".join(FORMAT.write(Adapter(modules, settings_for(modules)), Hints())[FILE]))
    wrapper.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    # As of 4.1.3 `make_module_from_state_dict` copies a magnitude into a leaf that needs a gradient.
    with torch.no_grad():
        network, _ = wrapper.create_lycoris_from_weights(1.0, str(path), model)
    assert len(network.loras) == 2
    for lora in network.loras:
        name = lora.lora_name.removeprefix("lycoris_")
        weight = model[name].weight.double()
        expected = weight + modules[name].delta()
        if with_magnitudes:
            axes = tuple(range(1, weight.ndim))
            norms = torch.linalg.vector_norm(expected, dim=axes, keepdim=True)
            expected = expected / norms * magnitudes[name].double().reshape(norms.shape)
        got = lora.get_merged_weight()[0].double()
        assert torch.linalg.vector_norm(got - expected) <= 1e-6 * torch.linalg.vector_norm(expected)
