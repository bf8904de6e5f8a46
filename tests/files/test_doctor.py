"""The doctor of adapter files: each code can be found, and `load_adapter` is the arbiter of errors."""

import json
import os
from pathlib import Path

import pytest
import torch

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, VeneerError
from veneer.files.doctor import examine
from veneer.files.doctor_codes import CODES, ERROR, codes_page
from veneer.files.peft import load_adapter, save_adapter
from veneer.files.peft_folder import CONFIG, PREFIX, TENSORS
from veneer.files.strict_json import dump_json
from veneer.files.tensors import dump_tensors

ADAPTERS = Path(__file__).parents[3] / "shared" / "data" / "adapters"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def config(**changes):
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    raw["base_model_name_or_path"] = "org/model"
    return {key: value for key, value in {**raw, **changes}.items() if value is not ...}


def tensors(rank=2, **changes):
    named = {f"{path}.lora_{side}.weight": shape for path in (Q, V) for side, shape in factors(rank).items()}
    made = {f"{PREFIX}{name}": torch.ones(shape) for name, shape in named.items()}
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def factors(rank):
    return {"A": (rank, 6), "B": (5, rank)}


def key(path, side):
    return f"{PREFIX}{path}.lora_{side}.weight"


def write(folder, raw=None, named=None):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(raw if isinstance(raw, bytes) else dump_json(config() if raw is None else raw))
    data = named if isinstance(named, bytes) else dump_tensors(tensors() if named is None else named)
    (folder / TENSORS).write_bytes(data)
    return folder


def codes(folder):
    """Return the codes that are found, having asked the arbiter."""
    found = examine(folder)
    try:
        load_adapter(folder)
        accepted = True
    except (VeneerError, OSError):
        accepted = False
    assert accepted == (not any(one.severity == ERROR for one in found.findings)), found.findings
    assert (found.adapter is not None) == accepted
    assert all(one.what and one.code in CODES for one in found.findings)
    return [one.code for one in found.findings]


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    assert codes(write(tmp_path / "a")) == []


CONFIGS = {
    "V201": [b'{"r": 1, "r": 2}', b"\xef\xbb\xbf{}", b'{"r": NaN}', b"[" * 9000, b"\xff"],
    "V202": [b"[]", b"3"],
    "V203": [{"r": "8"}, {"r": True}, {"r": 0}, {"lora_alpha": -1}, {"bias": "some"}, {"init_lora_weights": "magic"}],
    "V204": [{"secret_sauce": 3}],
    "V205": [{"lora_bias": True}, {"layer_replication": [[0, 1]]}],
    "V206": [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    "V207": [{"rank_pattern": {"(a+)+$": 4}}],
    "V208": [{"ensure_weight_tying": True}],
    "V110": [{"peft_type": "IA3"}, {"peft_type": ...}, {"peft_type": ["LORA"]}],
    "V210": [{"alpha_pattern": {"q_prj": 4}}],
    "V211": [{"target_modules": ["q_proj", "v_proj", "o_proj"]}],
    "V212": [{"lora_alpha": 64}, {"lora_alpha": 0.001}],
    "V213": [{"use_rslora": True}],
    "V214": [{"base_model_name_or_path": None}],
    "V215": [{"base_model_name_or_path": path} for path in ("/home/me/llama", "C:\\models\\x", "../x")],
    "V306": [{"r": 4}],
    "V314": [{"use_dora": True}],
    "V316": [{"modules_to_save": ["classifier"]}],
    "V317": [{"trainable_token_indices": [1, 2]}],
}


@pytest.mark.parametrize(("code", "raw"), [(code, raw) for code, all_of_it in CONFIGS.items() for raw in all_of_it])
def test_configurations(code, raw, tmp_path):
    folder = write(tmp_path / "a", raw if isinstance(raw, bytes) else config(**raw))
    assert set(codes(folder)) == {code}


BROKEN = {
    "V303": {f"layers.{count}.lora_A.weight": torch.ones(2, 6) for count in range(2)},
    "V304": tensors(**{key(Q, "B"): None}),
    "V307": tensors(**{key(Q, "A"): torch.full((2, 6), torch.nan)}),
    "V308": tensors(**{key(Q, "A"): torch.ones(2, 6, dtype=torch.float16)}),
    "V314": tensors(**{f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(5)}),
    "V316": tensors(**{f"{PREFIX}model.norm.weight": torch.ones(5)}),
    "V317": tensors(**{f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 6)}),
    "V300": tensors(**{key(Q, "A"): torch.ones(2, 6, 1)}),
    "V309": tensors(**{key(Q, side): torch.ones(shape).half() for side, shape in factors(2).items()}),
}


@pytest.mark.parametrize("code", BROKEN)
def test_tensors(code, tmp_path):
    assert set(codes(write(tmp_path / "a", None, BROKEN[code]))) == {code}


def test_what_was_not_gathered(tmp_path):
    empty = tensors(**{key(Q, "A"): torch.ones(0), key(Q, "B"): torch.ones(0)})
    assert set(codes(write(tmp_path / "a", None, empty))) == {"V305"}
    flat = tensors(**{key(Q, "A"): torch.ones(12)})  # its partner then stands alone
    assert set(codes(write(tmp_path / "b", None, flat))) == {"V304", "V305"}
    (tmp_path / "b" / CONFIG).unlink()
    write(tmp_path / "c", None, empty)
    (tmp_path / "c" / CONFIG).unlink()
    assert set(codes(tmp_path / "c")) == {"V102", "V305"}


def test_headers(tmp_path):
    data = dump_tensors(tensors())
    assert set(codes(write(tmp_path / "a", None, data[:-4]))) == {"V301"}
    assert set(codes(write(tmp_path / "a", None, data + b"x"))) == {"V301"}
    assert set(codes(write(tmp_path / "a", None, b""))) == {"V301"}
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    assert set(codes(write(tmp_path / "a", None, len(text).to_bytes(8, "little") + text + bytes(4)))) == {"V302"}
    text = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    assert set(codes(write(tmp_path / "a", None, len(text).to_bytes(8, "little") + text + bytes(4)))) == {"V308"}


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    named = tensors(**{key(Q, "A"): torch.full((2, 6), torch.inf), key(V, "B"): None})
    named[f"{PREFIX}stray"] = torch.ones(1)
    folder = write(tmp_path / "a", config(secret=1, lora_bias=True, lora_alpha="x"), named)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    found = set(codes(folder))
    assert {"V203", "V204", "V205", "V304", "V307", "V105"} <= found


def test_a_bad_key_does_not_make_false_findings_of_what_depends_on_it(tmp_path):
    assert set(codes(write(tmp_path / "a", config(r="2"), tensors(rank=2)))) == {"V203"}
    assert set(codes(write(tmp_path / "b", config(r="3"), tensors(rank=3)))) == {"V203"}


def test_lists_are_cut(tmp_path):
    named = tensors() | {f"{PREFIX}stray.{count}.lora_A.weight": torch.ones(1, 1) for count in range(99)}
    found = examine(write(tmp_path / "a", None, named)).findings
    assert len(found) == 21
    assert found[-1].what == "... and 79 more"


def test_missing_irregular_and_foreign_files(tmp_path):
    assert codes(tmp_path / "none") == ["V101"]
    (tmp_path / "empty").mkdir()
    assert codes(tmp_path / "empty") == ["V102", "V102"]
    folder = write(tmp_path / "a")
    (folder / CONFIG).unlink()
    assert codes(folder) == ["V102"]
    (folder / CONFIG).mkdir()
    assert codes(folder) == ["V103"]
    folder = write(tmp_path / "b")
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)
    assert codes(folder) == ["V103"]
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(folder / "nowhere")
    assert codes(folder) == ["V103"]
    (tmp_path / "lone.txt").write_text("x")
    assert codes(tmp_path / "lone.txt") == ["V102"]


def test_pickles_by_name_and_by_their_first_bytes(tmp_path):
    folder = write(tmp_path / "my adapter")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    found = examine(folder).findings
    assert [one.code for one in found] == ["V104"]
    assert found[0].command == f"veneer convert '{folder}' --to peft --out '{folder}-peft' --allow-pickle"
    for first in (b"\x80\x04\x95", b"PK\x03\x04"):
        assert set(codes(write(tmp_path / "b", None, first + bytes(64)))) == {"V104"}


def test_other_methods_and_other_programs(tmp_path):
    values = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1), "lora_E": torch.ones(1, 1)}
    raw = {"peft_type": "ADALORA", "target_modules": ["q"], "init_r": 1, "lora_alpha": 2}
    named = {f"{PREFIX}q.{name}": one for name, one in values.items()}
    folder = write(tmp_path / "ada", raw, named)
    assert codes(folder) == ["V109"]
    assert examine(folder).findings[0].command == f"veneer convert {folder} --to lora --out {folder}-lora"
    assert set(codes(write(tmp_path / "ada", raw | {"secret": 1}, named))) == {"V109", "V204"}
    kohya = {f"lora_unet_mid_block_{part}": one for part, one in (("lora_down.weight", torch.ones(1, 3)),)}
    kohya["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(3, 1)
    (tmp_path / "kohya").mkdir()
    (tmp_path / "kohya" / "x.safetensors").write_bytes(dump_tensors(kohya))
    found = examine(tmp_path / "kohya").findings
    assert {one.code for one in found} <= {"V106", "V102"}
    assert any(one.severity == ERROR for one in found)


def test_manifests(tmp_path):
    pair = LowRank(torch.ones(1, 3), torch.ones(4, 1), 2.0)
    adapter = Adapter({"a.q": pair}, LoRAConfig(rank=1, alpha=2.0), metadata=AdapterMetadata(base="org/model"))
    folder = tmp_path / "a"
    save_adapter(adapter, folder, card="hello")
    assert codes(folder) == []
    (folder / "README.md").write_text("changed")
    (folder / "more.txt").write_text("new")
    assert codes(folder) == ["V108", "V108"]
    raw = json.loads((folder / CONFIG).read_bytes())
    (folder / CONFIG).write_bytes(dump_json(raw | {"lora_alpha": 4}))
    assert set(codes(folder)) == {"V107", "V108"}
    (folder / "MANIFEST.json").write_text("{}")
    assert set(codes(folder)) == {"V107"}
    (folder / "MANIFEST.json").unlink()
    os.mkfifo(folder / "MANIFEST.json")
    assert "V107" in codes(folder)


def test_tables_heads_and_carried_weights(tmp_path):
    table = "model.embed_tokens"
    named = tensors() | {
        f"{PREFIX}{table}.lora_embedding_A": torch.ones(2, 9),
        f"{PREFIX}{table}.lora_embedding_B": torch.ones(6, 2),
        f"{PREFIX}{table}.base_layer.weight": torch.ones(9, 6),
    }
    folder = write(tmp_path / "a", config(target_modules=["q_proj", "v_proj", "embed_tokens"]), named)
    assert codes(folder) == ["V312", "V310"]
    named = tensors() | {f"{PREFIX}lm_head.weight": torch.ones(9, 6)}
    assert codes(write(tmp_path / "b", config(modules_to_save=["lm_head"]), named)) == ["V312"]


def test_old_experts(tmp_path):
    place = f"{PREFIX}model.layers.0.mlp.experts"
    named = {f"{place}.lora_A.weight": torch.ones(6, 4), f"{place}.lora_B.weight": torch.ones(5, 6)}
    raw = config(target_modules=None, target_parameters=["mlp.experts.down_proj"], peft_version="0.18.0")
    assert codes(write(tmp_path / "a", raw, named)) == ["V315"]


@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapters of ../shared/data are not here")
def test_real_adapters_have_errors_where_they_are_refused():
    for folder in sorted(ADAPTERS.iterdir()):
        codes(folder)


def test_every_code_is_described_and_the_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "findings.md"
    assert page.read_text(encoding="utf-8") == codes_page()
    assert list(CODES) == sorted(CODES)
    assert all(row.title and row.meaning.endswith((".", "!")) for row in CODES.values())


def test_a_refusal_that_no_stage_explains_is_an_error_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AdapterError("for a reason of its own", ["a: one", "b: two"])

    monkeypatch.setattr("veneer.files.doctor.load_adapter", refuse)
    found = examine(write(tmp_path / "a")).findings
    assert [(one.code, one.what) for one in found] == [("V100", "a: one"), ("V100", "b: two")]
