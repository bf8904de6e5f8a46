"""Makes the golden files of diffusers: a tiny U-Net with PEFT's layers, saved by diffusers, and what they do.

    pip install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0
    python tests/golden/make_diffusers.py

`diffusers_new.safetensors` is saved with metadata, `diffusers_old.safetensors` by `convert_state_dict_to_diffusers`
without. `diffusers_expected.safetensors` holds the delta of each layer: PEFT's own, and by loading the old file.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

HERE = Path(__file__).parent
TARGETS = ["to_q", "to_out.0", "proj_in", "conv1"]


def unet() -> UNet2DConditionModel:
    """A U-Net of one level, with random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def config() -> LoraConfig:
    return LoraConfig(
        r=2, lora_alpha=6, target_modules=TARGETS, rank_pattern={"to_q": 3}, alpha_pattern={"conv1": 1}, use_dora=False
    )


def deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        path: one.get_delta_weight(one.active_adapters[0]).detach().clone().contiguous()
        for path, one in model.named_modules()
        if isinstance(one, LoraLayer)
    }


def adapted() -> UNet2DConditionModel:
    """The U-Net with random factors."""
    model = unet()
    model.add_adapter(config())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value))
    return model


def main() -> None:
    model = adapted()
    layers = get_peft_model_state_dict(model, adapter_name="default")
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        HERE,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        weight_name="diffusers_new.safetensors",
    )
    # The attentions alone: of a file with both ways of naming, diffusers 0.42.1 loads the newer half and warns.
    attentions = convert_state_dict_to_diffusers({key: one for key, one in layers.items() if ".attn" in key})
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        HERE, unet_lora_layers=attentions, weight_name="diffusers_old.safetensors"
    )
    expected = {f"new/{path}": one for path, one in deltas(model).items()}
    again = unet()
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(HERE / "diffusers_old.safetensors")
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, again)
    expected |= {f"old/{path}": one for path, one in deltas(again).items()}
    save_file(expected, HERE / "diffusers_expected.safetensors")


if __name__ == "__main__":
    main()
