"""kohya's and LyCORIS's files: what LyCORIS wrote, the rules of its numbers, what is refused, hostile files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.files import single_files
from tests.files.single_files import adapter_of

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.format import Hints
from veneer.files.formats import recognise
from veneer.files.kohya import FORMAT
from veneer.files.shards import read_checkpoint
from veneer.tools.compare import compare_deltas

GOLDEN = Path(__file__).parents[1] / "golden"
Q, CONV = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_resnets_0_conv1"
Q_PATH, CONV_PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "lycoris_expected.safetensors")


@pytest.fixture(scope="module")
def base(expected, tmp_path_factory):
    """The base of LyCORIS's golden files."""
    folder = tmp_path_factory.mktemp("base")
    tensors = {key.removeprefix("base/"): one for key, one in expected.items() if key.startswith("base/")}
    save_file(tensors, folder / "model.safetensors")
    return read_checkpoint(folder)


write, read, saved = (partial(one, FORMAT) for one in (single_files.write, single_files.read, single_files.saved))


def linear(rank=2, out=3, inputs=4, name=Q):
    return {f"{name}.lora_down.weight": torch.randn(rank, inputs), f"{name}.lora_up.weight": torch.randn(out, rank)}


@pytest.mark.parametrize("name", ["lora", "rslora", "tucker", "dora", "loha", "lokr"])
@pytest.mark.parametrize("with_base", [False, True])
def test_reads_what_lycoris_wrote(name, with_base, expected, base):
    path = GOLDEN / f"lycoris_{name}.safetensors"
    assert recognise(path) is FORMAT
    if name == "lokr" and not with_base:
        with pytest.raises(AdapterError, match=r"conv1: a convolution of LoKr .* give --base"):
            FORMAT.read(path, Hints())
        return
    adapter = FORMAT.read(path, Hints(base=base if with_base else None))
    assert sorted(adapter.modules) == ["layers.0.conv1", "layers.0.self_attn.o_proj", "layers.0.self_attn.q_proj"]
    for module, update in adapter.modules.items():
        before, after = (expected[f"{part}/{module}.weight"].double() for part in ("base", name))
        weight = before + update.delta().reshape(before.shape)
        if isinstance(adapter, Adapter) and update.magnitude is not None:
            axes = tuple(range(1, weight.ndim))
            norms = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
            weight = weight / norms * update.magnitude.double().reshape(norms.shape)
        assert torch.linalg.vector_norm(weight - after) <= 5e-7 * torch.linalg.vector_norm(after - before)


def test_a_magnitude_of_each_input_is_refused_by_name():
    with pytest.raises(AdapterError, match=r"dora_scale \(1, 6\) is per input") as error:
        FORMAT.read(GOLDEN / "lycoris_dora_inputs.safetensors", Hints())
    assert len(error.value.problems) == 3


def test_what_trained_whole_needs_the_base_and_comes_back(expected, base, tmp_path):
    path = GOLDEN / "lycoris_full.safetensors"
    with pytest.raises(AdapterError, match=r"norm1\.weight: trained whole.*give --base"):
        FORMAT.read(path, Hints())
    adapter = FORMAT.read(path, Hints(base=base))
    for name, value in adapter.trained.items():
        torch.testing.assert_close(value, expected[f"full/{name}"])
    again = load_file(saved(adapter, tmp_path, Hints(base=base)))
    theirs = load_file(path)
    assert again.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(again[key], theirs[key], atol=1e-6, rtol=0)


def test_a_bias_beside_factors_is_its_layers(base, tmp_path):
    name = "lycoris_layers_0_self_attn_q_proj"
    tensors = linear(2, 8, 6, name) | {f"{name}.diff_b": torch.ones(8)}
    adapter = read(tmp_path, tensors, Hints(base=base))
    assert adapter.config.bias == "lora_only"
    assert list(adapter.trained) == ["layers.0.self_attn.q_proj.bias"]
    assert f"{name}.diff_b" in load_file(saved(adapter, tmp_path, Hints(base=base)))


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (3.0, 1.5), (-2.0, -1.0)])
def test_the_scaling_is_alpha_by_rank_and_one_without(alpha, scaling, tmp_path):
    tensors = linear() | ({} if alpha is None else {f"{Q}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)})
    assert read(tmp_path, tensors).modules[Q_PATH].scaling == scaling


def test_a_tucker_form_is_folded_exactly(tmp_path):
    down, mid, up = torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(5, 2, 1, 1)
    tensors = {f"{CONV}.lora_{which}.weight": one for which, one in (("down", down), ("mid", mid), ("up", up))}
    pair = read(tmp_path, tensors).modules[CONV_PATH]
    naive = torch.einsum("op,pqkl,qi->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double())
    torch.testing.assert_close(pair.delta(), naive, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_of_two_dtypes_the_wider_is_taken(dtype, tmp_path):
    tensors = linear()
    tensors[f"{Q}.lora_up.weight"] = tensors[f"{Q}.lora_up.weight"].to(dtype)
    pair = read(tmp_path, tensors).modules[Q_PATH]
    assert pair.lora_A.dtype == pair.lora_B.dtype == torch.promote_types(dtype, torch.float32)


FLUX_V = "transformer.transformer_blocks.0.attn.to_v"


def fused(alpha=4.0):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.block_diag(*(torch.randn(5, 2) for _ in range(3)))
    return name, {
        f"{name}.lora_down.weight": torch.randn(6, 4),
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(alpha),
    }


def test_layers_that_trained_apart_and_are_stored_as_one_are_told(tmp_path):
    name, tensors = fused()
    with pytest.raises(AdapterError, match=rf"{name}.*3 blocks.*scaling 2,.*scaling 0\.666667,.*--fused part"):
        read(tmp_path, tensors)
    assert read(tmp_path, tensors, Hints(fused="part")).modules[FLUX_V].scaling == 2.0
    assert read(tmp_path, tensors, Hints(fused="whole")).modules[FLUX_V].scaling == 4 / 6
    with pytest.raises(AdapterError, match="expected 'part' or 'whole'"):
        read(tmp_path, tensors, Hints(fused="parts"))


def test_our_own_block_by_block_file_needs_no_word(tmp_path):
    _, tensors = fused()
    adapter = read(tmp_path, tensors, Hints(fused="part"))
    again = FORMAT.read(saved(adapter, tmp_path), Hints())
    assert again.modules[FLUX_V].scaling == 2.0


def test_names_say_the_component_and_a_hint_picks_one(tmp_path):
    tensors = linear() | linear(name="lora_te1_text_model_encoder_layers_0_mlp_fc1")
    adapter = read(tmp_path, tensors | linear(name="lora_te2_text_projection"))
    assert sorted(path.partition(".")[0] for path in adapter.modules) == ["text_encoder", "text_encoder_2", "unet"]
    unet = read(tmp_path, tensors, Hints(component="unet"))
    assert list(unet.modules) == [Q_PATH.removeprefix("unet.")]
    assert unet.config.target_modules == (Q_PATH.removeprefix("unet."),)
    with pytest.raises(AdapterError, match=r"holds nothing of the component 'vae', but of text_encoder, unet"):
        read(tmp_path, tensors, Hints(component="vae"))


def test_a_prefix_that_says_the_part_twice_and_leaves_with_an_underscore(tmp_path):
    name = Q.replace("lora_unet_", "lora_unet_unet_")
    tensors = {key.replace(f"{name}.lora", f"{name}_lora"): one for key, one in linear(name=name).items()}
    assert list(read(tmp_path, tensors).modules) == [Q_PATH]


def test_dotted_names_are_paths(tmp_path):
    tensors = linear(name="model.layers.0.self_attn.q_proj")
    assert list(read(tmp_path, tensors).modules) == ["model.layers.0.self_attn.q_proj"]


def test_what_is_written_is_what_kohya_and_lycoris_read(tmp_path):
    pair = LowRank(torch.randn(4, 6), torch.randn(8, 4), 1.5, magnitude=torch.rand(8))
    conv = LowRank(torch.randn(4, 3, 3, 3), torch.randn(5, 4, 1, 1), 1.5, "conv", torch.rand(5))
    path = saved(adapter_of({Q_PATH: pair, CONV_PATH: conv}), tmp_path)
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert shapes[f"{Q}.dora_scale"] == (8, 1)
    assert shapes[f"{CONV}.dora_scale"] == (5, 1, 1, 1)
    assert shapes[f"{CONV}.lora_down.weight"] == (4, 3, 3, 3)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6")
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["dora_wd"] == "True"


def test_the_file_has_one_alpha_whatever_the_scalings(tmp_path):
    scalings = {"a": 1.0, "b": 1.0, "c": 1 / 3, "d": 0.0, "e": -2.0}
    modules = {
        f"unet.conv_in.{path}": LowRank(torch.randn(2, 3), torch.randn(4, 2), one) for path, one in scalings.items()
    }
    modules["unet.conv_in.f"] = LowRank(torch.randn(3, 3).half(), torch.randn(4, 3).half(), 0.5)
    adapter = adapter_of(modules)
    path = saved(adapter, tmp_path)
    assert {float(one) for key, one in load_file(path).items() if key.endswith("alpha")} == {2.0}
    assert compare_deltas(adapter, FORMAT.read(path, Hints())).worst < 1e-7


def test_names_that_no_grammar_finds_stand_in_the_header(tmp_path):
    pair = LowRank(torch.randn(1, 2), torch.randn(3, 1), 1.0)
    paths = ["my_odd.thing_0.q", "unet.strange_block.q", "0"]
    path = saved(adapter_of(dict.fromkeys(paths, pair)), tmp_path)
    assert sorted(FORMAT.read(path, Hints()).modules) == sorted(paths)
    with pytest.raises(AdapterError, match="give --base"):
        read(tmp_path, load_file(path))
    lie = {"veneer": json.dumps({"paths": {"lycoris_0": "q"}})}
    with pytest.raises(AdapterError, match="'lycoris_0' does not stand for 'q'"):
        read(tmp_path, load_file(path), metadata=lie)


def test_the_header_s_base_and_dropout_come_back(tmp_path):
    pair = LowRank(torch.randn(1, 2), torch.randn(3, 1), 1.0)
    adapter = adapter_of({"q": pair}, metadata=AdapterMetadata(base="sd15"))
    adapter = replace(adapter, config=adapter.config.model_copy(update={"dropout": 0.25}))
    again = FORMAT.read(saved(adapter, tmp_path), Hints())
    assert (again.metadata.base, again.config.dropout) == ("sd15", 0.25)
    for bad in ("None", "nan", "2", "-1"):
        assert read(tmp_path, linear(), metadata={"ss_network_dropout": bad}).config.dropout == 0.0


def test_two_paths_of_one_name_are_refused():
    pair = LowRank(torch.randn(1, 2), torch.randn(3, 1), 1.0)
    with pytest.raises(AdapterError, match=r"'lycoris_a_b_c', as a\.b_c has"):
        FORMAT.write(adapter_of({"a.b_c": pair, "a_b.c": pair}), Hints())


def test_all_that_the_format_cannot_carry_is_listed():
    modules = {
        "embed": LowRank(torch.randn(1, 4), torch.randn(3, 1), 1.0, "embedding"),
        "experts.down_proj": LowRank(torch.randn(2, 1, 4), torch.randn(2, 3, 1), 1.0, "experts"),
        "grouped": LowRank(torch.randn(2, 2, 3), torch.randn(4, 1, 1), 1.0, "conv"),
        "layers.0.q": LowRank(torch.randn(1, 4), torch.randn(3, 1), 1.0),
    }
    whole = Adapter(
        modules,
        LoRAConfig(invocation_tokens=(1,)),
        {"layers.0.q.bias": torch.ones(3)},
        tokens={"table": TokenRows((1,), torch.ones(1, 2))},
    )
    with pytest.raises(AdapterError) as error:
        FORMAT.write(whole, Hints())
    told = "\n".join(error.value.problems)
    for word in ("embed:", "experts.down_proj:", "grouped: a convolution in 2 groups", "q.bias", "tokens", "activated"):
        assert word in told


BAD = {
    "no prefix": (linear(name="q"), "begins with lora_unet"),
    "no up": ({f"{Q}.lora_down.weight": torch.ones(1, 2)}, "lora_up.weight missing"),
    "only alpha": (linear() | {f"{CONV}.alpha": torch.ones(())}, "alpha without factors"),
    "ranks": (linear() | {f"{Q}.lora_up.weight": torch.ones(3, 5)}, "ranks differ: 2 of"),
    "alpha": (linear() | {f"{Q}.alpha": torch.ones(2)}, "alpha: expected one finite number"),
    "magnitude": (linear() | {f"{Q}.dora_scale": torch.ones(7, 1)}, "dora_scale: expected shape"),
    "empty": (linear() | {f"{Q}.lora_up.weight": torch.ones(3, 0)}, "expected matrices or kernels"),
    "integers": (linear() | {f"{Q}.lora_up.weight": torch.ones(3, 2, dtype=torch.int8)}, "floating numbers"),
    "oft": (linear() | {f"{CONV}.oft_blocks": torch.ones(2, 2)}, "OFT, which multiplies the weight is not read"),
    "ia3": (linear() | {f"{CONV}.on_input": torch.ones(1)}, r"\(IA\)³"),
    "bundle": (linear() | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 2)}, "textual inversion"),
    "unknown": (linear() | {f"{Q}.lora_dwn.weigh": torch.ones(1)}, "not a tensor of this format"),
    "tucker": (linear() | {f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "no Tucker form"),
    "mixed": (linear() | {f"{CONV}.lokr_w1": torch.ones(1, 1), f"{CONV}.lokr_w2": torch.ones(1, 1)}, "two kinds"),
    "both": (linear() | {f"{Q}.diff": torch.ones(3, 4)}, "cannot stand beside"),
    "same": (linear() | {key.replace(f"{Q}.", f"{Q}_"): one for key, one in linear().items()}, "as another key"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told(name, tmp_path):
    tensors, message = BAD[name]
    with pytest.raises(AdapterError, match=message):
        read(tmp_path, tensors)


@pytest.mark.parametrize(
    "name", ["lora_unet_strange_{}.lora_up.weight", "lora_unet_{}.alpha", "strange_{}", "{}.alpha"]
)
def test_thousands_of_bad_names_are_told_by_the_first(name, base, tmp_path):
    tensors = {name.format(f"thing_{index:04}"): torch.ones(1, 1) for index in range(1500)}
    for hints in (Hints(), Hints(base=base)):
        with pytest.raises(AdapterError) as error:
            read(tmp_path, tensors, hints)
        assert error.value.problems[-1] == "... and many more"


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    torch.manual_seed(0)
    modules = {
        Q_PATH: LowRank(torch.randn(2, 4), torch.randn(3, 2), 0.5),
        CONV_PATH: LowRank(torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), 0.5, "conv"),
    }
    return saved(adapter_of(modules), tmp_path_factory.mktemp("whole")).read_bytes()


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data, whole_file, tmp_path_factory):
    damaged = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(damaged))))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(damaged[:cut]))
    try:
        adapter = FORMAT.read(path, Hints())
    except AdapterError:
        return
    assert adapter.modules
