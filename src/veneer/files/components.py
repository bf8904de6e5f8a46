"""The parts of a diffusion pipeline, and the names that its files give to them.

An adapter for several of them has paths that begin with the part: `unet.down_blocks.0…`, `text_encoder.text_model…`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from veneer.adapter import Adapter
from veneer.errors import AdapterError
from veneer.files.foreign import settings_for
from veneer.files.peft_other import OtherAdapter
from veneer.names import did_you_mean

Value = TypeVar("Value")
AnyAdapter = TypeVar("AnyAdapter", Adapter, OtherAdapter)

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet",
)  # fmt: skip
"""The parts by diffusers' names."""

_BY_FIRST_NAME = {
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"), "unet"
    ),
    **dict.fromkeys(
        ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "proj_out"), "transformer"
    ),
    "text_model": "text_encoder",
}

# GPT-2, Bloom, Falcon and others call the whole of their own model so.
_LANGUAGE_MODEL = re.compile(
    r"transformer\.(h|wte|wpe|ln_f|layers?|word_embeddings\w*|embedding|encoder|output_layer|embd)(\.|$)"
)

_LAYERS_PER_BLOCK = 2
_INSIDE = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_BLOCK = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)\.(?P<index>\d+)(?:\.(?P<rest>.+))?")


def component_of(path: str) -> str | None:
    """Return the part that a path begins with, or None.

    Example:
        >>> component_of("unet.conv_in"), component_of("model.layers.0.q_proj")
        ('unet', None)
        >>> component_of("transformer.transformer_blocks.0.attn.to_q"), component_of("transformer.h.0.attn.c_attn")
        ('transformer', None)
    """
    first = path.partition(".")[0]
    return first if first in COMPONENTS and not _LANGUAGE_MODEL.match(path) else None


def likely_component(paths: Iterable[str]) -> str | None:
    """Return the part that paths without one belong to, by the names that only it has; None where they do not tell.

    Example:
        >>> likely_component(["down_blocks.0.attentions.0.proj_in"]), likely_component(["model.layers.0.q_proj"])
        ('unet', None)
    """
    found = {_BY_FIRST_NAME.get(path.partition(".")[0]) for path in paths}
    return found.pop() if len(found) == 1 else None


def components_in(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the parts that paths begin with, sorted."""
    return tuple(sorted({found for path in paths if (found := component_of(path))}))


def paths_of(adapter: Adapter | OtherAdapter) -> list[str]:
    """Return every path that an adapter speaks of.

    Example:
        >>> import torch
        >>> from veneer.adapter import LowRank
        >>> paths_of(Adapter({"q": LowRank(torch.zeros(1, 2), torch.zeros(3, 1), 1.0)}, settings_for({})))
        ['q']
    """
    tokens = adapter.tokens if isinstance(adapter, Adapter) else {}
    return [*adapter.modules, *adapter.trained, *tokens]


def select(adapter: AnyAdapter, component: str | None, where: object) -> AnyAdapter:
    """Return what an adapter holds of one part, by that model's own paths; all of it for None.

    Args:
        adapter: Its paths begin with parts.
        component: The part.
        where: What errors call the file.

    Raises:
        AdapterError: If it holds nothing of the part.
    """
    if component is None:
        return adapter
    held = components_in(paths_of(adapter))
    if component not in held:
        raise AdapterError(
            f"{where}: holds nothing of the component {component!r}, but of {', '.join(held) or 'none'}"
            f"{did_you_mean(component, held)}"
        )
    modules, trained = _within(adapter.modules, component), _within(adapter.trained, component)
    if isinstance(adapter, OtherAdapter):
        return replace(adapter, modules=MappingProxyType(modules), trained=MappingProxyType(trained))
    saved = _within(dict.fromkeys(adapter.config.modules_to_save), component)
    config = settings_for(modules, saved=saved, base=adapter.config) if modules else adapter.config
    return replace(adapter, modules=modules, trained=trained, tokens=_within(adapter.tokens, component), config=config)


def under(component: str | None, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values by paths that begin with a part; as they are for None.

    Example:
        >>> under("unet", {"conv_in": 1}), under(None, {"conv_in": 1})
        ({'unet.conv_in': 1}, {'conv_in': 1})
    """
    return dict(values) if component is None else {f"{component}.{path}": one for path, one in values.items()}


def base_name(name: str, base: Collection[str]) -> str:
    """Return a parameter's name in a base, which is one part of a pipeline or holds them all.

    Example:
        >>> base_name("unet.conv_in.weight", ["conv_in.weight"])
        'conv_in.weight'
    """
    component = component_of(name)
    return name if component is None or name in base else name.removeprefix(f"{component}.")


def _within(values: Mapping[str, Value], component: str) -> dict[str, Value]:
    start = f"{component}."
    return {path.removeprefix(start): one for path, one in values.items() if path.startswith(start)}


def diffusers_unet_path(path: str) -> str | None:
    """Return diffusers' path of a module of a U-Net by its original one; None where that is none of the original's.

    Both of Stable Diffusion 1 and XL have two layers in each block, which the numbers follow from.

    Example:
        >>> diffusers_unet_path("input_blocks.4.1.transformer_blocks.0.attn1.to_q")
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
        >>> diffusers_unet_path("output_blocks.2.1.conv"), diffusers_unet_path("mid_block.resnets.0.conv1")
        ('up_blocks.0.upsamplers.0.conv', None)

    Source:
        diffusers 0.42 `loaders/lora_conversion_utils.py`, `_maybe_map_sgm_blocks_to_diffusers`.
    """
    for original, ours in _OUTSIDE.items():
        if path == original or path.startswith(f"{original}."):
            return ours + path.removeprefix(original)
    found = _BLOCK.fullmatch(path)
    if found is None or not found["rest"]:
        return None
    index, rest = int(found["index"]), found["rest"]
    if found["side"] == "middle_block":
        place = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}.get(index)
        return None if place is None else f"mid_block.{place}.{_inside(rest)}"
    number, _, rest = rest.partition(".")
    if not rest:
        return None
    down = found["side"] == "input_blocks"
    block, layer = divmod(index - 1 if down else index, _LAYERS_PER_BLOCK + 1)
    side = f"{'down' if down else 'up'}_blocks.{block}"
    if down and rest == "op":
        return f"{side}.downsamplers.0.conv"
    if not down and rest == "conv":
        return f"{side}.upsamplers.0.conv"
    kinds = {"0": f"resnets.{layer}", "1": f"attentions.{layer}"}
    return f"{side}.{kinds[number]}.{_inside(rest)}" if number in kinds else None


def _inside(rest: str) -> str:
    for original, ours in _INSIDE:
        if rest == original or rest.startswith(f"{original}."):
            return ours + rest.removeprefix(original)
    return rest
