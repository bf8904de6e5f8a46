"""Adapters that other people made, from ../shared/data: read exactly, or refused with the reason."""

from pathlib import Path

import pytest

from veneer.errors import AdapterError
from veneer.files.peft import load_adapter, save_adapter
from veneer.files.peft_folder import TENSORS
from veneer.files.tensors import parse_tensors

ADAPTERS = Path(__file__).parents[3] / "shared" / "data" / "adapters"

pytestmark = pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapters of ../shared/data are not here")

READ = {
    "age-whyiswmm": 24,
    "distilbert-imdb": 12,
    "gemma3-270m-zouhe0": 72,
    "gpt2-lazyy": 12,
    "justbautista-emotion": 44,
    "justbautista-keywords": 44,
    "justbautista-therapist": 44,
    "opencalm1b-r1-f16": 24,
    "sd15-unet-difusor-peft": 64,
    "smollm2-random-r4": 120,
}
REFUSED = {
    "gpt2-thesotti-bin": "a pickle can run any code",
    "mlx-smollm2-wikisql-6it": r"adapter_model\.safetensors: missing",
    "sam-lora": r"adapter_config\.json: missing",
}


@pytest.mark.parametrize("name", READ)
def test_read_whole_and_written_back_with_the_same_values(name, tmp_path):
    adapter = load_adapter(ADAPTERS / name)
    assert len(adapter.modules) == READ[name]
    save_adapter(adapter, tmp_path / "again")
    before, after = ((folder / TENSORS).read_bytes() for folder in (ADAPTERS / name, tmp_path / "again"))
    theirs, ours = parse_tensors(before, "theirs"), parse_tensors(after, "ours")
    assert theirs.keys() == ours.keys()
    assert all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert load_adapter(tmp_path / "again").digest == adapter.digest


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_with_the_reason(name):
    with pytest.raises(AdapterError, match=REFUSED[name]):
        load_adapter(ADAPTERS / name)
