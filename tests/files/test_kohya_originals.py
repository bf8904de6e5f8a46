"""Flux's and Stable Diffusion 3's own names: layers in one, both ways, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.files.single_files import adapter_of
from tests.files.test_kohya import linear, read, saved

from veneer.adapter import LowRank
from veneer.errors import AdapterError
from veneer.files.format import Hints
from veneer.files.kohya import FORMAT
from veneer.files.kohya_originals import FAMILIES, Layer, join, layers_named, split

D = 4
QKV = Layer("double_blocks.0.img_attn.qkv", tuple(f"transformer_blocks.0.attn.to_{one}" for one in "qkv"))
SINGLE = layers_named(["single_blocks_3_linear1"])["single_blocks_3_linear1"]
START = "transformer."


def sizes_of(path: str) -> tuple[int, int]:
    """The (out, in) of diffusers' layers in a small model of width D."""
    for end, size in (
        ("proj_mlp", (4 * D, D)), ("net.0.proj", (4 * D, D)), ("net.2", (D, 4 * D)), ("norm_out.linear", (2 * D, D)),
        ("norm1.linear", (6 * D, D)), ("norm1_context.linear", (6 * D, D)), ("norm.linear", (3 * D, D)),
        ("proj_out", (D, 5 * D) if "single" in path else (D, D)),
    ):  # fmt: skip
        if path.endswith(end):
            return size
    return D, D


def modules_of(family: str, ranks: dict[str, int] | None = None) -> dict[str, LowRank]:
    """Factors of every layer of a model with two blocks."""
    paths = dict.fromkeys(path for layer in FAMILIES[family] for block in "01" for path in layer.at(block).ours)
    modules = {}
    for path in paths:
        rank, (outs, ins) = (ranks or {}).get(path, 2), sizes_of(path)
        modules[f"{START}{path}"] = LowRank(torch.randn(rank, ins), torch.randn(outs, rank), 1.5)
    return modules


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_there_and_back(family, tmp_path):
    modules = modules_of(family)
    file = saved(adapter_of(modules), tmp_path, Hints(style=family))
    again = FORMAT.read(file, Hints())
    assert again.modules.keys() == modules.keys()
    for path, pair in modules.items():
        torch.testing.assert_close(again.modules[path].delta(), pair.delta(), rtol=1e-6, atol=1e-6)


def test_names_are_the_original_ones(tmp_path):
    with safe_open(saved(adapter_of(modules_of("flux")), tmp_path, Hints(style="flux")), "pt") as file:
        names = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118 - no dictionary
    expected = {
        f"lora_unet_{layer.at(block).original.replace('.', '_')}" for layer in FAMILIES["flux"] for block in "01"
    }
    assert names == expected


def test_parts_of_one_share_factors_and_come_back_as_they_were():
    whole = LowRank(torch.randn(2, D), torch.randn(3 * D, 2), 0.5)
    parts = split(QKV, whole)
    assert list(parts) == list(QKV.ours)
    assert all(part.lora_A.equal(whole.lora_A) and part.scaling == 0.5 for part in parts.values())
    assert torch.cat([part.delta() for part in parts.values()]).equal(whole.delta())
    again = join(parts, "flux")[QKV.original]
    assert again.lora_A.equal(whole.lora_A)
    assert again.lora_B.equal(whole.lora_B)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=4, max_size=4), st.integers(0, 99))
def test_any_parts_of_any_ranks_stand_side_by_side(drawn, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = {
        path: LowRank(
            torch.randn(rank, D, generator=generator),
            torch.randn(sizes_of(path)[0], rank, generator=generator),
            0.5 * rank,
        )
        for path, (held, rank) in zip(SINGLE.ours, drawn, strict=True)
        if held
    }
    if not parts:
        return
    whole = join(parts, "flux")[SINGLE.original]
    assert whole.rank == sum(part.rank for part in parts.values()) or len(parts) == 1
    found = split(SINGLE, whole)
    for path in SINGLE.ours:
        expected = parts[path].delta() if path in parts else torch.zeros(*sizes_of(path), dtype=torch.float64)
        torch.testing.assert_close(found[path].delta(), expected, rtol=1e-5, atol=1e-5)
    if len(parts) == 4 and len({rank for _, rank in drawn}) == 1:
        assert {path: part.rank for path, part in found.items()} == {path: part.rank for path, part in parts.items()}


def test_magnitudes_go_along_where_all_have_one():
    magnitude = torch.arange(1.0, 3 * D + 1)
    whole = LowRank(torch.randn(2, D), torch.randn(3 * D, 2), 0.5, magnitude=magnitude)
    parts = split(QKV, whole)
    assert parts[QKV.ours[1]].magnitude.tolist() == magnitude[D : 2 * D].tolist()
    assert join(parts, "flux")[QKV.original].magnitude.equal(magnitude)
    with pytest.raises(AdapterError, match="magnitude") as error:
        join({path: parts[path] for path in QKV.ours[:2]}, "flux")
    assert "some of its parts have no magnitude" in str(error.value)


def test_shift_and_scale_are_swapped_where_there_are_two():
    last = layers_named(["joint_blocks_23_context_block_adaLN_modulation_1"]).popitem()[1]
    for outs, swapped in ((2 * D, True), (6 * D, False)):
        whole = LowRank(torch.randn(1, D), torch.randn(outs, 1), 1.0)
        (part,) = split(last, whole).values()
        assert part.lora_B.equal(torch.cat(whole.lora_B.chunk(2)[::-1])) == swapped
        assert join({last.ours[0]: part}, "sd3")[last.original].lora_B.equal(whole.lora_B)


def test_a_name_of_no_family_leaves_all_as_they_are():
    assert layers_named(["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mod_linear"]) == {}  # HunyuanVideo
    assert layers_named([]) == {}


def test_what_does_not_fit_is_told_all_at_once(tmp_path):
    pair = LowRank(torch.ones(1, D), torch.ones(D, 1), 1.0)
    bad = LowRank(torch.ones(1, D + 1), torch.ones(D, 1), 1.0)
    modules = {
        "transformer.transformer_blocks.0.attn.to_q": pair,
        "transformer.transformer_blocks.0.attn.to_k": bad,
        "transformer.transformer_blocks.1.attn.to_qq": pair,
    }
    with pytest.raises(AdapterError) as error:
        saved(adapter_of(modules), tmp_path, Hints(style="flux"))
    told = str(error.value)
    assert "double_blocks.0.img_attn.qkv: its parts have other inputs" in told
    assert "transformer_blocks.1.attn.to_qq: flux has no such layer; nearest: 'transformer_blocks.1.attn.to_q'" in told
    with pytest.raises(AdapterError, match=r"nothing is of the transformer"):
        saved(adapter_of({"unet.conv_in": pair}), tmp_path, Hints(style="flux"))
    with pytest.raises(AdapterError, match=r"style: expected one of flux, sd3, got 'new'"):
        saved(adapter_of({"unet.conv_in": pair}), tmp_path, Hints(style="new"))
    with pytest.raises(AdapterError, match=r"its 13 outputs, of 4 inputs, are not those of") as error:
        read(tmp_path, linear(1, 13, D, "lora_unet_double_blocks_0_img_attn_qkv"))


def test_paths_that_are_original_themselves_stay_what_they_are(tmp_path):
    pair = LowRank(torch.ones(1, D), torch.ones(3 * D, 1), 1.0)
    for path in ("transformer.double_blocks.0.img_attn.qkv", "unet.double_blocks.0.img_attn.qkv"):
        file = saved(adapter_of({path: pair}), tmp_path)
        assert list(FORMAT.read(file, Hints()).modules) == [path]
