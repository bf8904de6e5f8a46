"""The commands that `check` names do what they are named for, run as they are printed."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig
from safetensors.torch import load_file, save_file
from tests.peft_methods import saved

import veneer
from veneer.files.tensors import dump_tensors

REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters"
Q, TENSORS = "model.layers.0.self_attn.q_proj", "adapter_model.safetensors"
FILLED = {"ALPHA": "4", "FORMAT": "loralib-pt --alpha 4"}
"""What only the user knows, for which a command has capitals."""


def peft(place: Path, rank: int = 2, true_rank: int = 2) -> Path:
    """An adapter of which some ranks may add nothing new."""
    A, B = torch.randn(true_rank, 8), torch.randn(8, true_rank)
    twice = rank - true_rank
    pair = veneer.LowRank(torch.cat([A, A[:twice]]), torch.cat([B, B[:, :twice]], 1), 1.0)
    veneer.save_adapter(veneer.Adapter({Q: pair}, veneer.LoRAConfig(rank=rank, alpha=rank)), place)
    return place


def rank_to_spare(place: Path) -> Path:
    return peft(place, 3)


def peft_pickle(place: Path) -> Path:
    torch.save(load_file(peft(place) / TENSORS), place / "adapter_model.bin")
    for name in (TENSORS, "MANIFEST.json"):
        (place / name).unlink()
    return place


def lone_tensors(place: Path) -> Path:
    return peft(place) / TENSORS


def carried_weights(place: Path) -> Path:
    path = peft(place) / TENSORS
    save_file({**load_file(path), f"base_model.model.{Q}.base_layer.weight": torch.ones(8, 8)}, path)
    (place / "MANIFEST.json").unlink()
    return place


def loralib(place: Path) -> Path:
    path = place.with_suffix(".safetensors")
    save_file({f"{Q}.lora_A": torch.randn(2, 8), f"{Q}.lora_B": torch.randn(8, 2)}, path)
    return path


def loralib_pickle(place: Path) -> Path:
    path = place.with_suffix(".pt")
    torch.save({f"{Q}.lora_A": torch.randn(2, 8), f"{Q}.lora_B": torch.randn(8, 2)}, path)
    return path


def kohya(place: Path) -> Path:
    name, path = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", place.with_suffix(".safetensors")
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    path.write_bytes(dump_tensors(tensors))
    return path


def loha(place: Path) -> Path:
    saved(LoHaConfig(r=2, target_modules=["q"]), place)
    return place


CASES = {
    "V102": lone_tensors,
    "V104": peft_pickle,
    "V104 of a file": loralib_pickle,
    "V106": kohya,
    "V106 without alpha": loralib,
    "V109": loha,
    "V310": carried_weights,
    "V404": rank_to_spare,
}


def commands(call, path: Path) -> dict[str, str]:
    """The command of each code that has one."""
    found = json.loads(call("check", path, "--json")[1])["findings"]
    return {one["code"]: one["command"] for one in found if one["command"]}


def run(call, command: str) -> None:
    for word, value in FILLED.items():
        command = command.replace(f" {word}", f" {value}")
    program, *arguments = shlex.split(command)
    assert program == "veneer"
    code, _, err = call(*arguments)
    assert code == 0, (command, err)


@pytest.mark.parametrize("name", CASES)
def test_what_mends_a_finding_runs_as_it_is_printed(call, tmp_path, name):
    path = CASES[name](tmp_path / "my adapter")
    told = commands(call, path)
    code = name.split()[0]
    assert code in told
    run(call, told[code])
    made = [one for one in tmp_path.iterdir() if one.is_dir() and one != tmp_path / "my adapter"]
    assert code == "V102" or not veneer.check(*made).errors
    assert code == "V102" or code not in commands(call, *made)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs shared/data/adapters")
@pytest.mark.parametrize(
    "name", ["gpt2-thesotti-bin", "mlx-smollm2-wikisql-6it", "sd-timohavdk", "sd-pokemon-wellCh4n"]
)
def test_real_files_too(call, tmp_path, name):
    (tmp_path / name).symlink_to(REAL / name)
    for command in commands(call, tmp_path / name).values():
        run(call, command)


def test_what_only_the_base_tells_is_asked_for_in_capitals(call, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 8),
            "layers.0.attn.q_proj.lora_b.weight": torch.ones(8, 2),
        },
        path,
    )
    (command,) = commands(call, path).values()
    assert command.endswith("lora-peft --alpha ALPHA --base BASE")


def test_files_that_tell_too_little_are_told_what_to_say(call, tmp_path):
    out = ("--to", "peft", "--out", tmp_path / "out")
    part = peft_pickle(tmp_path / "a") / "adapter_model.bin"
    code, _, err = call("convert", part, *out, "--allow-pickle")
    assert (code, f"is a part of the folder {tmp_path / 'a'}" in err) == (2, True)
    code, _, err = call("convert", loralib_pickle(tmp_path / "b"), *out, "--allow-pickle")
    assert (code, "--from peft-bin, loralib-pt, torchtune-pt" in err) == (2, True)


def test_parts_of_a_fused_layer_are_named_on_the_command_line(call, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "loralib"
    start = ("convert", golden / "lora.pt", "--from", "loralib-pt", "--allow-pickle", "--alpha", 8, "--to", "peft")
    start = (*start, "--base", golden / "base", "--out", tmp_path / "out")
    code, _, err = call(*start)
    assert (code, "--enabled yes,no,yes" in err) == (2, True)
    assert call(*start, "--enabled", "yes,no,yes")[0] == 0
    pair = veneer.load_adapter(tmp_path / "out").modules["qv"]
    expected = load_file(golden / "expected.safetensors")["qv.weight"]
    torch.testing.assert_close(pair.delta().float(), expected, rtol=1e-5, atol=1e-5)
    code, _, err = call(*start[:-1], tmp_path / "again", "--enabled", "yes,maybe")
    assert (code, "expected yes or no for each part" in err) == (2, True)
