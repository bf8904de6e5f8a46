"""Names of kohya's files: a module's path with `_` for `.`, behind a prefix that says the part of the pipeline.

The way back is not in the name: `self_attn_q_proj` could be four modules in one another. Three things tell, in this
order: the base's own names, what we wrote into the header, and a grammar of the words that models use.
"""

from collections.abc import Iterable, Mapping
from functools import cache

from veneer.errors import AdapterError
from veneer.files.components import COMPONENTS, component_of, diffusers_unet_path
from veneer.files.patterns import MAX_PATH
from veneer.names import did_you_mean

PREFIXES: Mapping[str, str | None] = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
    "lora_transformer": "transformer",
    "lora_prior": "prior",
    "lycoris": None,
}
"""What a name begins with, to the part of the pipeline; LyCORIS's own says none. Longer ones stand first."""

_WORDS = frozenset(
    """
    self_attn cross_attn encoder_attn linear_attn q_proj k_proj v_proj o_proj out_proj qkv_proj in_proj c_attn
    c_proj c_fc query_key_value gate_proj up_proj down_proj gate_up_proj fc_in fc_out lm_head embed_tokens embed_in
    embed_out text_model vision_model language_model text_projection visual_projection multi_modal_projector
    token_embedding position_embedding layer_norm1 layer_norm2 final_layer_norm self_attention dense_h_to_4h
    dense_4h_to_h q_lin k_lin v_lin out_lin block_sparse_moe shared_expert q_a_proj q_b_proj kv_a_proj_with_mqa
    kv_b_proj in_proj_qkv in_proj_z query_proj key_proj value_proj pre_classifier down_blocks up_blocks mid_block
    transformer_blocks single_transformer_blocks to_q to_k to_v to_out to_qkv add_q_proj add_k_proj add_v_proj
    to_add_out proj_in proj_out proj_mlp conv_in conv_out conv_shortcut conv_norm_out time_emb_proj time_embedding
    add_embedding linear_1 linear_2 linear_3 context_embedder x_embedder time_text_embed timestep_embedder
    guidance_embedder text_embedder pos_embed patch_embed norm_out norm1_context norm2_context ff_context
    caption_projection adaln_single input_blocks middle_block output_blocks in_layers out_layers emb_layers
    skip_connection time_embed label_emb double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod
    txt_mod img_in txt_in time_in vector_in guidance_in final_layer in_layer out_layer joint_blocks context_block
    x_block adaLN_modulation feed_forward wi_0 wi_1 gpt_neox
    """.split()  # noqa: SIM905 - a list of words is read as one
)
"""Names of modules that hold an underscore."""

_PLAIN = frozenset(
    """
    model models module base transformer encoder decoder layers layer blocks block h attn attn1 attn2 attention self
    output intermediate dense query key value proj qkv mlp ffn ff fc fc1 fc2 fc3 net w1 w2 w3 w4 wq wk wv wo wqkv q
    k v o lin lin1 lin2 linear linear1 linear2 linear3 out norm norm1 norm2 norm3 norm_q norm_k ln conv conv1 conv2
    conv3 resnets attentions downsamplers upsamplers op modulation embeddings embedding embed experts expert gate up
    down router bert roberta distilbert deberta vit xlm albert electra opt bart t5 SelfAttention EncDecAttention
    DenseReluDense wi pooler head heads classifier score shared backbone features stem adapter projector projection
    visual vision text mixer temporal spatial patchify final time main body tail
    """.split()  # noqa: SIM905
)
"""Names of modules that hold none."""

_MOST_PARTS = max(word.count("_") for word in _WORDS) + 1


def flat(path: str) -> str:
    """Return a path as it stands in names.

    Example:
        >>> flat("layers.0.self_attn.q_proj")
        'layers_0_self_attn_q_proj'
    """
    return path.replace(".", "_")


def split_prefix(name: str) -> tuple[str, str | None, str] | None:
    """Return a name's prefix, the part of the pipeline that it says, and the rest; None where it has no known prefix.

    A file may say the part twice (`lora_unet_unet_…`, from converters of diffusers' keys); that is once too often. But
    the blocks of a transformer are called `transformer_blocks` themselves.

    Example:
        >>> split_prefix("lora_te2_text_model_encoder"), split_prefix("q_proj")
        (('lora_te2', 'text_encoder_2', 'text_model_encoder'), None)
        >>> split_prefix("lora_transformer_transformer_blocks_0_norm1_linear")[2]
        'transformer_blocks_0_norm1_linear'
    """
    for prefix, component in PREFIXES.items():
        if name.startswith(f"{prefix}_"):
            rest = name.removeprefix(f"{prefix}_")
            if (
                component is not None
                and rest.startswith(f"{component}_")
                and not rest.startswith("transformer_blocks_")
            ):
                rest = rest.removeprefix(f"{component}_")
            return prefix, component, rest
    return None


def prefix_for(path: str, components: Iterable[str]) -> tuple[str, str]:
    """Return the prefix for a path, and the path without the part that it begins with.

    Args:
        path: Begins with a part of a pipeline, or with none.
        components: All parts that are written: with two text encoders the first has another prefix.

    Example:
        >>> prefix_for("text_encoder.text_model", ["text_encoder"]), prefix_for("model.layers", [])
        (('lora_te', 'text_model'), ('lycoris', 'model.layers'))
    """
    component = component_of(path)
    if component is None:
        return "lycoris", path
    rest = path.removeprefix(f"{component}.")
    if component == "text_encoder":
        several = any(other.startswith("text_encoder_") for other in components)
        return ("lora_te1" if several else "lora_te"), rest
    prefix = next((prefix for prefix, one in PREFIXES.items() if one == component), None)
    if prefix is None:
        raise AdapterError(
            f"{path}: kohya's names have no prefix for {component!r}{did_you_mean(component, COMPONENTS)}"
        )
    return prefix, rest


def grammar_path(name: str) -> str:
    """Return the path that an underscored name stands for, by the words that models use.

    Of several ways to cut it, the one with the fewest parts is meant: `to_out` is one name before it is two.

    Raises:
        AdapterError: If it holds a word that is not known, or the fewest parts can be had in two ways.

    Example:
        >>> grammar_path("down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0")
        'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0'
        >>> grammar_path("model_layers_11_self_attn_q_proj")
        'model.layers.11.self_attn.q_proj'
    """
    pieces = tuple(name.split("_"))
    if len(name) > MAX_PATH:
        raise AdapterError(f"longer than {MAX_PATH} characters")
    ways = _ways(pieces)
    if not ways:
        at = _stuck_at(pieces)
        word = "_".join(pieces[at:])
        near = did_you_mean(word, [*_WORDS, *_PLAIN])
        raise AdapterError(f"cannot be told where the parts of a path end, from {word!r} on{near}; give --base")
    if len(ways) > 1:
        raise AdapterError(f"stands for {' or '.join(ways)}; give --base")
    path = ways[0]
    return diffusers_unet_path(path) or path


def _ways(pieces: tuple[str, ...]) -> list[str]:
    """Return the cuts into known words that have the fewest parts, at most two of them."""
    best: list[list[str] | None] = [None] * len(pieces) + [[""]]
    fewest = [0] * (len(pieces) + 1)
    for start in range(len(pieces) - 1, -1, -1):
        for stop in range(start + 1, min(start + _MOST_PARTS, len(pieces)) + 1):
            rest = best[stop]
            if rest is None or not _is_word("_".join(pieces[start:stop])):
                continue
            word, parts = "_".join(pieces[start:stop]), fewest[stop] + 1
            found = [f"{word}.{one}" if one else word for one in rest]
            known = best[start]
            if known is None or parts < fewest[start]:
                best[start], fewest[start] = found[:2], parts
            elif parts == fewest[start]:
                best[start] = [*known, *found][:2]
    return best[0] or []


def _stuck_at(pieces: tuple[str, ...]) -> int:
    """Return how many pieces from the front can be cut into known words."""
    reached = {0}
    for start in range(len(pieces)):
        if start in reached:
            reached |= {
                stop
                for stop in range(start + 1, min(start + _MOST_PARTS, len(pieces)) + 1)
                if _is_word("_".join(pieces[start:stop]))
            }
    return max(one for one in reached if one < len(pieces))


@cache
def _is_word(word: str) -> bool:
    return word in _WORDS or word in _PLAIN or (word.isascii() and word.isdigit() and len(word) <= 4)


class Names:
    """The modules of a base by their flat names.

    Args:
        base: The base's parameter names.

    Example:
        >>> Names(["model.odd_one.weight"]).path("model_odd_one", None)
        'model.odd_one'
    """

    def __init__(self, base: Iterable[str]) -> None:
        self._by_flat: dict[str, list[str]] = {}
        for path in sorted({name.rpartition(".")[0] for name in base} - {""}):
            self._by_flat.setdefault(flat(path), []).append(path)

    def has(self, rest: str, component: str | None) -> bool:
        """Tell whether a name without its prefix stands for a module of the base.

        Example:
            >>> Names(["double_blocks.0.img_mod.lin.weight"]).has("double_blocks_0_img_mod_lin", "unet")
            True
        """
        try:
            self.path(rest, component)
        except AdapterError:
            return False
        return True

    def path(self, rest: str, component: str | None) -> str:
        """Return the base's module of a name without its prefix; of an original U-Net name, diffusers' one for it.

        Raises:
            AdapterError: If it stands for none, or for several.
        """
        known = self._by_flat
        tries = [flat(rest), *([flat(f"{component}.{rest}")] if component else [])]
        found = next((known[one] for one in tries if one in known), None) or self._by_grammar(rest)
        if found is None:
            raise AdapterError(f"the base has no such module{did_you_mean(flat(rest), known)}")
        if len(found) > 1:
            raise AdapterError(f"stands for {' or '.join(found)} of the base, and the name does not tell which")
        return found[0].removeprefix(f"{component}.") if component else found[0]

    def _by_grammar(self, rest: str) -> list[str] | None:
        try:
            return self._by_flat.get(flat(grammar_path(flat(rest))))
        except AdapterError:
            return None
