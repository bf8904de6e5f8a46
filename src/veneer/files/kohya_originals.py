"""Flux's and Stable Diffusion 3's own names, which sd-scripts' files have, and diffusers' names for the same layers.

An original layer may hold several of diffusers' layers, whose outputs stand one below another. Then

    lora_A, [B_q; B_k; B_v]   is the same as   (lora_A, B_q), (lora_A, B_k), (lora_A, B_v)

Both ways are exact: what shares lora_A is put together as it was, other factors side by side, with zeros in lora_B.

Source: sd-scripts, `networks/lora_flux.py` and `lora_sd3.py`; diffusers 0.42 `loaders/lora_conversion_utils.py` and
`single_file_utils.py` for the names and for what is swapped, which tests compare with.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.files.kohya_fused import fused_parts
from veneer.files.translate import at_scaling
from veneer.names import did_you_mean

COMPONENT = "transformer"
"""The part of the pipeline that these layers are of."""

_BLOCK = re.compile(r"_blocks_(\d{1,4})(?=_)")


@dataclass(frozen=True)
class Layer:
    """A layer under its original name.

    Args:
        original: Its path, `{}` for the number of the block.
        ours: diffusers' paths of its parts, in the order of their outputs.
        swaps: Whether its outputs are shift and scale, which diffusers has the other way round.
    """

    original: str
    ours: tuple[str, ...]
    swaps: bool = False

    def at(self, block: str) -> "Layer":
        """Return it with the number of a block."""
        return Layer(self.original.format(block), tuple(path.format(block) for path in self.ours), self.swaps)


def _layers(rows: str) -> tuple[Layer, ...]:
    """Return the layers of a table: an original path, a sign where it swaps, and diffusers' paths."""
    layers = []
    for row in filter(None, map(str.strip, rows.splitlines())):
        original, sign, *ours = row.split()
        layers.append(Layer(original, tuple(ours), sign == "~"))
    return tuple(layers)


_FLUX = _layers("""
    double_blocks.{}.img_attn.qkv   = transformer_blocks.{}.attn.to_q transformer_blocks.{}.attn.to_k transformer_blocks.{}.attn.to_v
    double_blocks.{}.txt_attn.qkv   = transformer_blocks.{}.attn.add_q_proj transformer_blocks.{}.attn.add_k_proj transformer_blocks.{}.attn.add_v_proj
    double_blocks.{}.img_attn.proj  = transformer_blocks.{}.attn.to_out.0
    double_blocks.{}.txt_attn.proj  = transformer_blocks.{}.attn.to_add_out
    double_blocks.{}.img_mlp.0      = transformer_blocks.{}.ff.net.0.proj
    double_blocks.{}.img_mlp.2      = transformer_blocks.{}.ff.net.2
    double_blocks.{}.txt_mlp.0      = transformer_blocks.{}.ff_context.net.0.proj
    double_blocks.{}.txt_mlp.2      = transformer_blocks.{}.ff_context.net.2
    double_blocks.{}.img_mod.lin    = transformer_blocks.{}.norm1.linear
    double_blocks.{}.txt_mod.lin    = transformer_blocks.{}.norm1_context.linear
    single_blocks.{}.linear1        = single_transformer_blocks.{}.attn.to_q single_transformer_blocks.{}.attn.to_k single_transformer_blocks.{}.attn.to_v single_transformer_blocks.{}.proj_mlp
    single_blocks.{}.linear2        = single_transformer_blocks.{}.proj_out
    single_blocks.{}.modulation.lin = single_transformer_blocks.{}.norm.linear
    img_in                          = x_embedder
    txt_in                          = context_embedder
    time_in.in_layer                = time_text_embed.timestep_embedder.linear_1
    time_in.out_layer               = time_text_embed.timestep_embedder.linear_2
    vector_in.in_layer              = time_text_embed.text_embedder.linear_1
    vector_in.out_layer             = time_text_embed.text_embedder.linear_2
    guidance_in.in_layer            = time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer           = time_text_embed.guidance_embedder.linear_2
    final_layer.linear              = proj_out
    final_layer.adaLN_modulation.1  ~ norm_out.linear
""")  # noqa: E501 - a table is read by its rows

_SD3 = _layers("""
    joint_blocks.{}.x_block.attn.qkv                   = transformer_blocks.{}.attn.to_q transformer_blocks.{}.attn.to_k transformer_blocks.{}.attn.to_v
    joint_blocks.{}.x_block.attn2.qkv                  = transformer_blocks.{}.attn2.to_q transformer_blocks.{}.attn2.to_k transformer_blocks.{}.attn2.to_v
    joint_blocks.{}.context_block.attn.qkv             = transformer_blocks.{}.attn.add_q_proj transformer_blocks.{}.attn.add_k_proj transformer_blocks.{}.attn.add_v_proj
    joint_blocks.{}.x_block.attn.proj                  = transformer_blocks.{}.attn.to_out.0
    joint_blocks.{}.x_block.attn2.proj                 = transformer_blocks.{}.attn2.to_out.0
    joint_blocks.{}.context_block.attn.proj            = transformer_blocks.{}.attn.to_add_out
    joint_blocks.{}.x_block.mlp.fc1                    = transformer_blocks.{}.ff.net.0.proj
    joint_blocks.{}.x_block.mlp.fc2                    = transformer_blocks.{}.ff.net.2
    joint_blocks.{}.context_block.mlp.fc1              = transformer_blocks.{}.ff_context.net.0.proj
    joint_blocks.{}.context_block.mlp.fc2              = transformer_blocks.{}.ff_context.net.2
    joint_blocks.{}.x_block.adaLN_modulation.1         = transformer_blocks.{}.norm1.linear
    joint_blocks.{}.context_block.adaLN_modulation.1   ~ transformer_blocks.{}.norm1_context.linear
    x_embedder.proj                                    = pos_embed.proj
    context_embedder                                   = context_embedder
    t_embedder.mlp.0                                   = time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2                                   = time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0                                   = time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2                                   = time_text_embed.text_embedder.linear_2
    final_layer.linear                                 = proj_out
    final_layer.adaLN_modulation.1                     ~ norm_out.linear
""")  # noqa: E501

FAMILIES: Mapping[str, tuple[Layer, ...]] = {"flux": _FLUX, "sd3": _SD3}
"""Models that have names of their own in kohya's files."""

_BY_NAME = {
    family: {layer.original.replace(".", "_"): layer for layer in layers} for family, layers in FAMILIES.items()
}


def layers_named(names: Iterable[str]) -> dict[str, Layer]:
    """Return the layers that names without their prefix stand for; nothing unless one family has all of them.

    Example:
        >>> layers_named(["double_blocks_3_img_mlp_0"])["double_blocks_3_img_mlp_0"].ours
        ('transformer_blocks.3.ff.net.0.proj',)
        >>> layers_named(["double_blocks_3_img_mlp_0", "mid_block_resnets_0_conv1"])
        {}
    """
    listed = list(names)
    for known in _BY_NAME.values():
        found = {}
        for name in listed:
            block = _BLOCK.search(name)
            layer = known.get(_BLOCK.sub("_blocks_{}", name))
            if layer is None:
                break
            found[name] = layer.at(block[1]) if block else layer
        else:
            return found
    return {}


def split(layer: Layer, pair: LowRank) -> dict[str, LowRank]:
    """Return the factors of diffusers' layers that are in an original one.

    Raises:
        AdapterError: If its outputs are not those of its parts.

    Example:
        >>> layer = layers_named(["double_blocks_0_img_attn_qkv"])["double_blocks_0_img_attn_qkv"]
        >>> pair = LowRank(torch.ones(2, 4), torch.ones(12, 2), 1.0)
        >>> [(path, one.sizes) for path, one in split(layer, pair).items()][1]
        ('transformer_blocks.0.attn.to_k', (4, 4))
    """
    if len(layer.ours) == 1:
        return {layer.ours[0]: _swapped(layer, pair)}
    count = len(layer.ours)
    if pair.form != "linear":
        raise AdapterError(f"a convolution cannot be {count} layers in one")
    outputs = _outputs(layer, pair.sizes)
    rows = [slice(start, start + size) for start, size in zip(_starts(outputs), outputs, strict=True)]
    ranks = [slice(None)] * count
    if fused_parts(pair) == count:  # trained apart: each part has ranks of its own
        own = [slice(place * pair.rank // count, (place + 1) * pair.rank // count) for place in range(count)]
        inside = sum(int(pair.lora_B[one, its].count_nonzero()) for one, its in zip(rows, own, strict=True))
        ranks = own if inside == int(pair.lora_B.count_nonzero()) else ranks
    return {
        path: replace(
            pair,
            lora_A=pair.lora_A[its].clone(),
            lora_B=pair.lora_B[one, its].clone(),
            magnitude=None if pair.magnitude is None else pair.magnitude[one].clone(),
        )
        for path, one, its in zip(layer.ours, rows, ranks, strict=True)
    }


def join(modules: Mapping[str, LowRank], family: str) -> dict[str, LowRank]:
    """Return factors by the original paths of a family.

    Args:
        modules: By diffusers' paths.
        family: A key of `FAMILIES`.

    Raises:
        AdapterError: If the family has no such layer, or parts of one cannot stand together; all at once.

    Example:
        >>> q = LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)
        >>> whole = join({"transformer_blocks.0.attn.to_q": q}, "flux")["double_blocks.0.img_attn.qkv"]
        >>> whole.sizes, int(whole.lora_B.sum())
        ((12, 4), 4)
    """
    owners: dict[str, tuple[Layer, str]] = {path: (layer, path) for layer in FAMILIES[family] for path in layer.ours}
    gathered: dict[str, dict[str, LowRank]] = {}
    layers: dict[str, Layer] = {}
    problems = []
    for path, pair in modules.items():
        block = re.match(r"\w+_blocks\.(\d{1,4})\.", path)
        known = path if block is None else path.replace(f".{block[1]}.", ".{}.", 1)
        if known not in owners:
            near = did_you_mean(known, owners)
            problems.append(f"{path}: {family} has no such layer{near.replace('{}', block[1]) if block else near}")
            continue
        layer = owners[known][0].at(block[1] if block else "")
        layers[layer.original] = layer
        gathered.setdefault(layer.original, {})[path] = pair
    joined = {}
    for original, parts in gathered.items():
        try:
            joined[original] = _joined(layers[original], parts)
        except AdapterError as error:
            problems.append(f"{original}: {error.message}")
    if problems:
        raise AdapterError(f"{family}'s own names cannot carry this adapter", problems)
    return joined


def _joined(layer: Layer, parts: Mapping[str, LowRank]) -> LowRank:
    """Return the factors of an original layer from those of its parts; a part that is missing adds nothing."""
    if len(layer.ours) == 1:
        return _swapped(layer, next(iter(parts.values())))
    held = {path: parts[path] for path in layer.ours if path in parts}
    first = next(iter(held.values()))
    if any(pair.form != "linear" for pair in held.values()):
        raise AdapterError("its parts are no plain linear layers")
    if len({pair.sizes[1] for pair in held.values()}) > 1:
        raise AdapterError("its parts have other inputs")
    magnitudes = [pair.magnitude for pair in held.values() if pair.magnitude is not None]
    if magnitudes and len(magnitudes) < len(layer.ours):
        raise AdapterError("some of its parts have no magnitude (DoRA)")
    shared = all(pair.scaling == first.scaling and torch.equal(pair.lora_A, first.lora_A) for pair in held.values())
    if not shared:
        held = {path: at_scaling(pair, first.scaling) for path, pair in held.items()}
    dtype = reduce(torch.promote_types, (pair.lora_A.dtype for pair in held.values()))
    A = first.lora_A if shared else torch.cat([pair.lora_A.to(dtype) for pair in held.values()])
    outputs = _part_outputs(layer, held)
    B = torch.zeros(sum(outputs), A.shape[0], dtype=dtype)
    rank = 0
    for path, start, size in zip(layer.ours, _starts(outputs), outputs, strict=True):
        if path in held:
            one = held[path]
            B[start : start + size, rank : rank + one.rank] = one.lora_B
            rank += 0 if shared else one.rank
    magnitude = torch.cat([one.flatten() for one in magnitudes]) if magnitudes else None
    return replace(first, lora_A=A, lora_B=B, magnitude=magnitude)


def _outputs(layer: Layer, sizes: tuple[int, int]) -> list[int]:
    """Return how many outputs each part has: equal ones; beside queries, keys and values as many as are left."""
    outs, ins = sizes
    count = len(layer.ours)
    outputs = [outs // count] * count if count < 4 else [ins, ins, ins, outs - 3 * ins]
    if sum(outputs) != outs or min(outputs) < 1:
        raise AdapterError(f"its {outs} outputs, of {ins} inputs, are not those of {', '.join(layer.ours)}")
    return outputs


def _part_outputs(layer: Layer, held: Mapping[str, LowRank]) -> list[int]:
    """Return how many outputs each part has, a missing one too: as many as the others, or four times the inputs."""
    outs, ins = next(iter(held.values())).sizes
    usual = [outs] * 3 if len(layer.ours) == 3 else [ins, ins, ins, 4 * ins]
    outputs = [held[path].sizes[0] if path in held else size for path, size in zip(layer.ours, usual, strict=True)]
    if outputs[:3] != usual[:3]:
        raise AdapterError(f"the outputs of its parts, {', '.join(map(str, outputs))}, do not stand together")
    return outputs


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]


def _swapped(layer: Layer, pair: LowRank) -> LowRank:
    """Return factors whose outputs are scale and shift, for shift and scale, and the other way round.

    A block of Stable Diffusion 3 has six such outputs, its last one two: only there they are swapped.
    """
    outs, ins = pair.sizes
    if not layer.swaps or outs != 2 * ins:
        return pair
    magnitude = None if pair.magnitude is None else pair.magnitude.roll(ins, 0)
    return replace(pair, lora_B=pair.lora_B.roll(ins, 0), magnitude=magnitude)
