"""Underscored names to paths: by grammar, by the base; and the parts of a pipeline."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import AdapterError
from veneer.files.components import COMPONENTS, component_of, diffusers_unet_path
from veneer.files.kohya_names import Names, flat, grammar_path, prefix_for, split_prefix

PATHS = [
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
    "mid_block.resnets.1.time_emb_proj",
    "mid_block.resnets.0.conv_shortcut",
    "down_blocks.1.downsamplers.0.conv",
    "time_embedding.linear_1",
    "text_model.encoder.layers.11.self_attn.out_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "text_model.embeddings.token_embedding",
    "text_projection",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.0.layer.0.SelfAttention.q",
    "transformer_blocks.3.norm1_context.linear",
    "single_transformer_blocks.37.proj_mlp",
    "double_blocks.18.img_attn.qkv",
    "single_blocks.37.linear1",
    "double_blocks.0.txt_mod.lin",
    "model.layers.31.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.block_sparse_moe.experts.7.w1",
    "transformer.h.0.attn.c_attn",
    "gpt_neox.layers.3.attention.query_key_value",
    "lm_head",
    "bert.encoder.layer.0.attention.self.query",
    "layers.5.feed_forward.w2",
]


@pytest.mark.parametrize("path", PATHS)
def test_the_grammar_finds_the_paths_of_common_models(path):
    assert grammar_path(flat(path)) == path


def test_what_the_grammar_cannot_split_says_where_and_what_to_do():
    with pytest.raises(AdapterError, match=r"from 'strange_thing_q_proj' on.*give --base"):
        grammar_path("model_layers_0_strange_thing_q_proj")


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.8.1.transformer_blocks.9.ff.net.2", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"),
        ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks.0.1.transformer_blocks.0.ff.net.2", "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.0.skip_connection", "up_blocks.1.resnets.2.conv_shortcut"),
        ("input_blocks.0.0", "conv_in"),
        ("out.2", "conv_out"),
        ("label_emb.0.2", "add_embedding.linear_2"),
    ],
)  # fmt: skip
def test_original_names_of_a_u_net_become_those_of_diffusers(original, expected):
    assert diffusers_unet_path(original) == expected
    assert grammar_path(flat(original)) == expected


def test_the_base_tells_what_the_grammar_does_not():
    names = Names(["a.strange_thing.weight", "a.strange_thing.bias", "b.c_d.weight", "b_c.d.weight"])
    assert names.path("a_strange_thing", None) == "a.strange_thing"
    with pytest.raises(AdapterError, match=r"b\.c_d or b_c\.d"):
        names.path("b_c_d", None)
    with pytest.raises(AdapterError, match="nearest: 'a_strange_thing'"):
        names.path("a_strange_thin", None)


def test_the_base_of_a_whole_pipeline_and_of_one_part_give_the_same():
    for tensors in (["conv_in.weight"], ["unet.conv_in.weight"]):
        assert Names(tensors).path("conv_in", "unet") == "conv_in"


@given(st.sampled_from([None, *(one for one in COMPONENTS if one not in ("controlnet", "transformer_2"))]))
def test_a_prefix_stands_for_its_component(component):
    path = "odd.path" if component is None else f"{component}.odd.path"
    prefix, rest = prefix_for(path, [component] if component else [])
    assert rest == "odd.path"
    assert split_prefix(f"{prefix}_{flat(rest)}") == (prefix, component, "odd_path")


def test_a_component_without_a_prefix_is_refused():
    with pytest.raises(AdapterError, match="no prefix for 'controlnet'"):
        prefix_for("controlnet.x", ["controlnet"])


def test_a_language_model_that_calls_itself_transformer_is_no_part_of_a_pipeline():
    assert component_of("transformer.h.0.attn.c_attn") is None
    assert component_of("transformer.single_transformer_blocks.0.proj_mlp") == "transformer"
