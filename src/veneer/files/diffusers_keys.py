"""The names of diffusers' LoRA files in all of their styles, as a part, a path, and a side.

    style     a layer of a U-Net                                  a layer of a text encoder
    new       unet.P.lora_A.weight                                text_encoder.P.lora_A.weight
    old       unet.P.lora.down.weight                             text_encoder.P.lora_linear_layer.down.weight
    oldest    [unet.]Q.processor.to_q_lora.down.weight            text_encoder.Q.to_q_lora.down.weight

where `to_out_lora` is `to_out.0` of a U-Net, and `to_q_lora` is `q_proj` of a text encoder. `.processor.` may stand in
the others too, and means nothing. (diffusers 0.42 `utils/state_dict_utils.py`)
"""

import re
from dataclasses import dataclass

from veneer.files.components import component_of

STYLES = ("new", "old", "oldest")

_SIDES = {"lora_A": "A", "lora_B": "B", "down": "A", "up": "B"}
_LEAF = re.compile(
    r"\.(?:"
    r"(?P<new>lora_A|lora_B)\.weight"
    r"|(?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|to_(?P<which>q|k|v|out)_lora\.(?P<oldest>down|up)\.weight"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)"
    r"|(?P<alpha>alpha)"
    r")$"
)
_IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_ATTENTION_OUT = re.compile(r"\.to_out$")


@dataclass(frozen=True)
class Key:
    """What a key stands for.

    Args:
        component: The part of the pipeline, or None where none is said.
        path: The module's path in it.
        side: A, B, magnitude or alpha.
    """

    component: str | None
    path: str
    side: str


def parse_key(key: str) -> Key | None:
    """Return what a key stands for; None where it is none of this format.

    Example:
        >>> parse_key("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight")
        Key(component='unet', path='mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0', side='B')
        >>> parse_key("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight").path
        'text_model.encoder.layers.0.self_attn.q_proj'
    """
    found = _LEAF.search(key)
    if found is None:
        return None
    component = component_of(key)
    path = key[: found.start()].removeprefix(f"{component}." if component else "").replace(".processor", "")
    if found["which"]:
        is_text = component is not None and component.startswith("text_encoder")
        path = f"{path}.{(_IN_TEXT if is_text else _IN_UNET)[found['which']]}"
    if found["magnitude"] or found["alpha"]:
        # As diffusers names kohya's magnitudes: by the old name of an attention's output.
        path = _ATTENTION_OUT.sub(".to_out.0", path)
        return Key(component, path, "magnitude" if found["magnitude"] else "alpha")
    return Key(component, path, _SIDES[found["new"] or found["old"] or found["oldest"]])


def old_key(component: str, path: str, side: str) -> str:
    """Return a key in the old style.

    Example:
        >>> old_key("unet", "conv_in", "A"), old_key("text_encoder", "text_model.fc1", "B")
        ('unet.conv_in.lora.down.weight', 'text_encoder.text_model.fc1.lora_linear_layer.up.weight')
    """
    leaf = "lora_linear_layer" if component.startswith("text_encoder") else "lora"
    return f"{component}.{path}.{leaf}.{'down' if side == 'A' else 'up'}.weight"


def oldest_key(component: str, path: str, side: str) -> str | None:
    """Return a key in the oldest style; None for what it has no name for: all but a U-Net's attention.

    Example:
        >>> oldest_key("unet", "mid_block.attn1.to_out.0", "A"), oldest_key("unet", "conv_in", "A")
        ('mid_block.attn1.processor.to_out_lora.down.weight', None)
    """
    which = next((short for short, name in _IN_UNET.items() if path.endswith(f".{name}")), None)
    if component != "unet" or which is None:
        return None
    owner = path.removesuffix(f".{_IN_UNET[which]}")
    return f"{owner}.processor.to_{which}_lora.{'down' if side == 'A' else 'up'}.weight"
