"""Makes the golden files of LyCORIS: its own networks with random weights, saved by itself, and what they do.

    pip install lycoris-lora==4.1.3 torch==2.13.0
    python tests/golden/make_lycoris.py

`lycoris_NAME.safetensors` is what `LycorisNetwork.save_weights` writes. `lycoris_expected.safetensors` holds the base's
parameters (`base/…`), and by `NAME/…` the weight that each adapted layer then has: from the layer's own forward for
linear layers, from LyCORIS's merge for convolutions. (4.1.3 merges LoHa and LoKr with the square of their scale, where
its forward has the scale; so the convolutions of these two have a scale of 1.)
"""

from pathlib import Path

import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
VARIANTS = {
    "lora": {"algo": "lora", "linear_alpha": 3.0, "conv_alpha": 5.0},
    "rslora": {"algo": "lora", "linear_alpha": 3.0, "conv_alpha": 5.0},
    "tucker": {"algo": "lora", "use_tucker": True, "linear_alpha": 1.0, "conv_alpha": 1.0},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True, "linear_alpha": 2.0, "conv_alpha": 2.0},
    "dora_inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False, "linear_alpha": 2.0, "conv_alpha": 2.0},
    "loha": {"algo": "loha", "linear_alpha": 3.0, "conv_alpha": 2.0},
    "lokr": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1, "linear_alpha": 0.5, "conv_alpha": 1.0},
    "full": {"algo": "full", "train_norm": True},
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.o_proj = nn.Linear(8, 6, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.norm1 = nn.LayerNorm(6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])


def weight_of(lora: nn.Module, layer: nn.Module) -> torch.Tensor:
    """The weight that a layer has with its module of LyCORIS."""
    if isinstance(layer, nn.Linear):
        eye = torch.eye(layer.in_features)
        bias = 0 if layer.bias is None else layer.bias
        return (lora(eye) - bias).T.contiguous()
    return lora.get_merged_weight(shape=layer.weight.shape)[0]


def main() -> None:
    expected = {}
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        model = Model().double().float()
        for path, value in model.named_parameters():
            expected[f"base/{path}"] = value.detach().clone()
        LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*"]})
        settings = {"linear_dim": 2, "conv_dim": 2, **settings}
        network = create_lycoris(model, 1.0, rs_lora=name == "rslora", **settings)
        if name == "rslora":  # the wrapper does not hand it on: as sd-scripts' entry does
            network = create_rslora(model, settings)
        torch.manual_seed(1)
        with torch.no_grad():
            for lora in network.loras:
                for path, value in lora.named_parameters():
                    if "dora_scale" in path:
                        value.mul_(1 + 0.1 * torch.rand_like(value))
                    else:
                        value.copy_(torch.randn_like(value))
        whole = name == "full"
        if not whole:
            network.apply_to()
        layers = {f"lycoris_{path}".replace(".", "_"): (path, one) for path, one in model.named_modules()}
        for lora in network.loras:
            path, layer = layers[lora.lora_name]
            if whole:
                merged, bias = lora.get_merged_weight()
                expected[f"{name}/{path}.weight"] = merged.detach().clone()
                if bias is not None:
                    expected[f"{name}/{path}.bias"] = bias.detach().clone()
            else:
                expected[f"{name}/{path}.weight"] = weight_of(lora, layer).detach().clone()
        if whole:
            network.apply_to()
        network.save_weights(str(HERE / f"lycoris_{name}.safetensors"), None, {})
    save_file({key: value.contiguous() for key, value in expected.items()}, HERE / "lycoris_expected.safetensors")


def create_rslora(model: nn.Module, settings: dict[str, object]) -> LycorisNetwork:
    """A network whose modules scale by the root of the rank."""
    from lycoris.modules.locon import LoConModule

    network = LycorisNetwork(model, init_only=True)
    network.loras = []
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            is_conv = isinstance(layer, nn.Conv2d)
            alpha = settings["conv_alpha" if is_conv else "linear_alpha"]
            lora = LoConModule(f"lycoris_{path}".replace(".", "_"), layer, 1.0, 2, alpha, rs_lora=True)
            network.loras.append(lora)
            network.add_module(lora.lora_name, lora)
    return network


if __name__ == "__main__":
    main()
