"""The registry of formats: each is seen for what it is, and what is none is told."""

from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, LowRank
from veneer.errors import AdapterError
from veneer.files.foreign import SUFFIX, pair_from, settings_for
from veneer.files.format import Hints
from veneer.files.formats import FORMATS, find_format, recognise, see
from veneer.files.peft import save_adapter
from veneer.files.tensors import dump_tensors
from veneer.files.translate import at_scaling

ADAPTERS = Path(__file__).parents[3] / "shared" / "data" / "adapters"


def test_a_folder_of_ours_is_peft(tmp_path):
    pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    save_adapter(Adapter({"q": pair}, settings_for({"q": pair})), tmp_path / "a")
    sight = see(tmp_path / "a")
    assert sight.keys == ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    assert recognise(tmp_path / "a").name == "peft"


def test_a_file_is_seen_by_its_content_too(tmp_path):
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    data = dump_tensors({f"{name}.lora_down.weight": torch.ones(1, 2), f"{name}.lora_up.weight": torch.ones(2, 1)})
    for file in ("a.safetensors", "b"):
        (tmp_path / file).write_bytes(data)
        assert recognise(tmp_path / file).name == "kohya"
    assert FORMATS["kohya"].read(tmp_path, Hints()).modules.keys() == {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    }


def test_a_folder_with_several_files_needs_a_word(tmp_path):
    for file in ("a", "b"):
        (tmp_path / (file + SUFFIX)).write_bytes(dump_tensors({"x": torch.ones(1)}))
    with pytest.raises(AdapterError, match="of no format that is known"):
        recognise(tmp_path)
    with pytest.raises(AdapterError, match=r"it holds a\.safetensors, b\.safetensors; name the one"):
        FORMATS["kohya"].read(tmp_path, Hints())


def test_what_is_of_no_format_is_shown(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(dump_tensors({f"w_{index}": torch.ones(1) for index in range(9)}))
    with pytest.raises(AdapterError, match="its tensors are 'w_0', 'w_1', 'w_2', 'w_3', …") as error:
        recognise(tmp_path / "a.safetensors")
    assert len(error.value.problems) == len(FORMATS)
    with pytest.raises(AdapterError, match=r"found nothing; nearest: 'a\.safetensors'"):
        recognise(tmp_path / "b.safetensors")


def test_what_could_be_several_needs_a_word(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(dump_tensors({"unet.q.lora_A.weight": torch.ones(1, 1)}))
    twice = {"one": FORMATS["diffusers"], "two": FORMATS["diffusers"]}
    with pytest.raises(AdapterError, match=r"could be of the format .* say which with --from"):
        recognise(tmp_path / "a.safetensors", twice)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(AdapterError, match="nearest: 'kohya'"):
        find_format("koya")


def test_names_are_the_keys_and_each_row_says_what_it_is():
    for name, one in FORMATS.items():
        assert one.name == name
        assert one.title
    assert FORMATS["peft"].write is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [("[]", "expected a JSON object"), ("{", "not JSON"), ('{"a": 1, "a": 2}', "'a'")],
)
def test_a_bad_configuration_is_told(config, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=message):
        see(tmp_path)


@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapters of ../shared/data are not here")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("sd-pokemon-wellCh4n", "diffusers"), ("sd-timohavdk", "kohya"), ("sd15-unet-difusor-peft", "peft")],
)
def test_three_ways_of_naming_the_same_model(name, expected):
    assert recognise(ADAPTERS / name).name == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", [4.0, 1 / 3, 0.0, -2.0])
def test_a_scaling_folded_in_changes_no_delta(dtype, scaling):
    pair = LowRank(torch.randn(2, 3, dtype=dtype), torch.randn(4, 2, dtype=dtype), scaling)
    folded = at_scaling(pair, 1.0)
    assert folded.scaling == 1.0
    apart = torch.linalg.vector_norm(folded.delta() - pair.delta())
    assert apart <= 1e-7 * torch.linalg.vector_norm(pair.delta())
    if scaling == 4.0:
        assert folded.lora_B.dtype == dtype


def test_settings_give_what_the_factors_have():
    modules = {
        "a.q": pair_from(torch.ones(2, 3), torch.ones(4, 2), 1.5),
        "b.q": pair_from(torch.ones(2, 3), torch.ones(4, 2), 1.5),
        "b.c": pair_from(torch.ones(3, 3, 1, 1), torch.ones(4, 3, 1, 1), 0.1),
    }
    config = settings_for(modules)
    assert {path: (config.rank_for(path), config.scaling_for(path)) for path in modules} == {
        "a.q": (2, 1.5),
        "b.q": (2, 1.5),
        "b.c": (3, pytest.approx(0.1)),
    }
