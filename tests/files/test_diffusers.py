"""diffusers' files: what diffusers wrote, its three styles, its scale, what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tests.files import single_files
from tests.files.single_files import adapter_of

from veneer.adapter import Adapter, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.diffusers import FORMAT, METADATA
from veneer.files.diffusers_keys import parse_key
from veneer.files.format import Hints
from veneer.files.formats import recognise
from veneer.tools.compare import compare_deltas

GOLDEN = Path(__file__).parents[1] / "golden"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


read, saved = partial(single_files.read, FORMAT), partial(single_files.saved, FORMAT)


def pair(rank=2, scaling=1.0, dtype=torch.float32, **more):
    return LowRank(torch.randn(rank, 4, dtype=dtype), torch.randn(3, rank, dtype=dtype), scaling, **more)


@pytest.mark.parametrize("name", ["new", "old"])
def test_reads_what_diffusers_wrote(name):
    path = GOLDEN / f"diffusers_{name}.safetensors"
    assert recognise(path) is FORMAT
    adapter = FORMAT.read(path, Hints(component="unet"))
    deltas = load_file(GOLDEN / "diffusers_expected.safetensors")
    expected = {key.removeprefix(f"{name}/"): one for key, one in deltas.items() if key.startswith(f"{name}/")}
    assert adapter.modules.keys() == expected.keys()
    for path, one in adapter.modules.items():
        torch.testing.assert_close(one.delta(), expected[path].double(), atol=2e-6, rtol=1e-6)


def test_without_metadata_the_scaling_is_one_whatever_the_ranks(tmp_path):
    tensors = {}
    for rank, path in ((2, "unet.a.to_q"), (4, "unet.b.to_q")):
        tensors |= {f"{path}.lora_A.weight": torch.ones(rank, 3), f"{path}.lora_B.weight": torch.ones(5, rank)}
    adapter = read(tmp_path, tensors)
    assert {one.scaling for one in adapter.modules.values()} == {1.0}
    assert {path: adapter.config.scaling_for(path) for path in adapter.modules} == dict.fromkeys(adapter.modules, 1.0)
    alphas = {f"{path}.alpha": torch.tensor(1.0) for path in adapter.modules}
    assert [one.scaling for one in read(tmp_path, tensors | alphas).modules.values()] == [0.5, 0.25]


def test_with_metadata_it_is_what_the_settings_say(tmp_path):
    tensors = {"unet.q.lora_A.weight": torch.ones(4, 3), "unet.q.lora_B.weight": torch.ones(5, 4)}
    settings_ = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.target_modules": ["q"]}
    adapter = read(tmp_path, tensors, metadata={METADATA: json.dumps(settings_)})
    assert adapter.modules["unet.q"].scaling == 3.0
    with pytest.raises(AdapterError, match=r"both beside the tensors and in lora_adapter_metadata"):
        read(tmp_path, tensors | {"unet.q.alpha": torch.ones(())}, metadata={METADATA: json.dumps(settings_)})
    with pytest.raises(AdapterError, match=r"'unet\.q\.lora_A\.weight': expected rank 8"):
        read(tmp_path, tensors, metadata={METADATA: json.dumps(settings_ | {"unet.r": 8})})
    with pytest.raises(AdapterError, match=r"'vae\.r': of no component that has tensors"):
        read(tmp_path, tensors, metadata={METADATA: json.dumps(settings_ | {"vae.r": 8})})
    with pytest.raises(AdapterError, match="nothing is said of 'unet'"):
        read(tmp_path, tensors, metadata={METADATA: "{}"})


@pytest.mark.parametrize("scaling", [2.0, 1 / 3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_scaling_is_in_the_factors_and_metadata_says_one(scaling, dtype, tmp_path):
    adapter = adapter_of({f"unet.{Q}": pair(4, scaling, dtype)})
    path = saved(adapter, tmp_path)
    assert compare_deltas(adapter, FORMAT.read(path, Hints())).worst <= 1e-7
    tensors = load_file(path)
    bare = read(tmp_path, tensors)  # as a loader that does not know the metadata
    assert compare_deltas(adapter, bare).worst <= 1e-7
    with safe_open(saved(adapter, tmp_path), "pt") as file:
        said = json.loads(file.metadata()[METADATA])
    assert said["unet.r"] == said["unet.lora_alpha"] == 4


@pytest.mark.parametrize("style", ["new", "old", "oldest"])
def test_each_style_reads_back(style, tmp_path):
    adapter = adapter_of({f"unet.{Q}": pair(scaling=0.5), f"unet.{OUT}": pair()})
    path = saved(adapter, tmp_path, Hints(style=style))
    assert recognise(path) is FORMAT
    again = FORMAT.read(path, Hints())
    assert compare_deltas(adapter, again).worst <= 1e-15


def test_the_oldest_style_without_its_component_reads_too(tmp_path):
    adapter = adapter_of({f"unet.{Q}": pair()})
    tensors = load_file(saved(adapter, tmp_path, Hints(style="oldest")))
    again = read(tmp_path, {key.removeprefix("unet."): one for key, one in tensors.items()})
    assert list(again.modules) == [Q]


def test_the_styles_have_their_names(tmp_path):
    text = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": pair()}
    keys = load_file(saved(adapter_of(text | {f"unet.{Q}": pair()}), tmp_path, Hints(style="old")))
    assert sorted(keys) == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
        f"unet.{Q}.lora.down.weight",
        f"unet.{Q}.lora.up.weight",
    ]
    keys = load_file(saved(adapter_of({f"unet.{OUT}": pair()}), tmp_path, Hints(style="oldest")))
    assert min(keys) == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight"
    with pytest.raises(AdapterError, match="attentions of a U-Net alone"):
        FORMAT.write(adapter_of(text), Hints(style="oldest"))
    with pytest.raises(AdapterError, match=r"expected one of new, old, oldest.*nearest: 'old'"):
        FORMAT.write(adapter_of(text), Hints(style="olde"))


def test_magnitudes_by_diffusers_name_of_kohyas(tmp_path):
    tensors = {
        f"unet.{OUT}.lora_A.weight": torch.ones(2, 4),
        f"unet.{OUT}.lora_B.weight": torch.ones(3, 2),
        f"unet.{OUT.removesuffix('.0')}.lora_magnitude_vector": torch.ones(3, 1),
    }
    magnitude = read(tmp_path, tensors).modules[f"unet.{OUT}"].magnitude
    assert magnitude is not None
    assert magnitude.shape == (3,)


def test_paths_that_begin_with_no_component_are_refused_once():
    modules = {f"model.layers.{index}.q": pair() for index in range(30)}
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.q and 29 more: begin with no component") as error:
        FORMAT.write(adapter_of(modules), Hints())
    assert len(error.value.problems) == 1


def test_all_that_the_format_cannot_carry_is_listed():
    modules = {
        "unet.table": LowRank(torch.randn(1, 4), torch.randn(3, 1), 1.0, "embedding"),
        "unet.experts.down_proj": LowRank(torch.randn(2, 1, 4), torch.randn(2, 3, 1), 1.0, "experts"),
        "unet.q": pair(magnitude=torch.ones(3)),
    }
    rows = {"unet.table": TokenRows((1,), torch.ones(1, 2))}
    whole = Adapter(modules, LoRAConfig(), {"unet.q.bias": torch.ones(3)}, tokens=rows)
    with pytest.raises(AdapterError) as error:
        FORMAT.write(whole, Hints(style="old"))
    told = "\n".join(error.value.problems)
    for word in (
        "'embedding'",
        "'experts'",
        "q: diffusers has no magnitudes",
        "q.bias: diffusers has no place",
        "rows of tokens",
    ):
        assert word in told


BAD = {
    "unknown": ({"unet.q.lora_C.weight": torch.ones(1, 1)}, "not a tensor of this format"),
    "bias": ({"unet.q.lora_B.bias": torch.ones(1)}, "not a tensor of this format"),
    "alone": ({"unet.q.lora_A.weight": torch.ones(1, 2)}, r"unet\.q: lora_B missing"),
    "twice": (
        {"unet.q.lora_A.weight": torch.ones(1, 2), "unet.q.lora.down.weight": torch.ones(1, 2)},
        "as another key",
    ),
    "ranks": (
        {"unet.q.lora_A.weight": torch.ones(1, 2), "unet.q.lora_B.weight": torch.ones(3, 2)},
        r"unet\.q: ranks differ",
    ),
    "mixed": (
        {
            f"{part}q.lora_{side}.weight": torch.ones(1, 1)
            for part in ("unet.", "")
            for side in "AB"
        },
        "does not begin with a component",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told(name, tmp_path):
    tensors, message = BAD[name]
    with pytest.raises(AdapterError, match=message):
        read(tmp_path, tensors)


def test_a_key_of_another_format_is_none_of_ours():
    assert parse_key("unet.q.hada_w1_a") is None


@pytest.fixture(scope="module")
def whole_file():
    return (GOLDEN / "diffusers_new.safetensors").read_bytes()


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data, whole_file, tmp_path_factory):
    damaged = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(damaged))
    try:
        adapter = FORMAT.read(path, Hints())
    except AdapterError:
        return
    assert adapter.modules
