"""Every field of a checkpoint is needed: without it a run is not gone on with, or what it ends with is noticed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

from veneer.config import RunConfig
from veneer.errors import VeneerError
from veneer.files.filesystem import REAL
from veneer.files.manifest import MANIFEST
from veneer.train.checkpoint import TrainState
from veneer.train.run import run
from veneer.train.trend import Trend

NAME = "dora, cosine, patience"


@pytest.fixture
def resumed(settings_of, tmp_path, caplog) -> Callable[[Callable[[Path], None]], str]:
    """Damages the middle checkpoint of a finished run, with a manifest that agrees, and tells what came of going on."""
    settings = settings_of(NAME, max_steps=6, checkpoint_every=2)
    adapter = {**settings["adapter"], "target_modules": ["q_proj"], "layers_to_transform": [1]}
    config = RunConfig(**{**settings, "adapter": adapter, "out": str(tmp_path / "whole")})
    run(config)
    whole = tmp_path / "whole"

    def resume(change: Callable[[Path], None]) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "adapter")
        before, newest = sorted((copy / "checkpoints").glob("step-*"))
        shutil.rmtree(newest)
        change(before)
        reseal(before)
        caplog.clear()
        try:
            run(config.model_copy(update={"out": str(copy)}), existing="resume")
        except VeneerError as error:
            return f"refused: {error}"
        if "passed over" in caplog.text:
            return "passed over"
        same = all(
            (copy / "adapter" / one.name).read_bytes() == one.read_bytes() for one in (whole / "adapter").iterdir()
        )
        return "same" if same and metrics(copy) == metrics(whole) else "other"

    return resume


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_rss_bytes")} for line in lines]


def reseal(checkpoint: Path) -> None:
    """Let the manifest vouch for what is there: hashes alone must not be what finds the damage."""
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        if (checkpoint / name).exists():
            size, sha = REAL.measure(checkpoint / name)
            manifest["files"][name] = {"bytes": size, "sha256": sha}
        else:
            del manifest["files"][name]
    path.write_text(json.dumps(manifest))


def test_nothing_damaged_ends_with_the_same_bytes(resumed):
    assert resumed(lambda _: None) == "same"


def test_every_counter_is_needed(resumed):
    def without(path: tuple[str, ...]) -> Callable[[Path], None]:
        def change(checkpoint: Path) -> None:
            file = checkpoint / "state.json"
            state = json.loads(file.read_text())
            inner = state
            for name in path[:-1]:
                inner = inner[name]
            del inner[path[-1]]
            file.write_text(json.dumps(state))

        return change

    paths = [(one.name,) for one in fields(TrainState)] + [("trend", one.name) for one in fields(Trend)]
    for path in paths:
        outcome = resumed(without(path))
        assert outcome.startswith("refused"), path
        assert f"{path[-1]}: missing" in outcome
    print(f"{len(paths)} counters")


def test_every_tensor_and_file_is_needed(resumed):
    """One that is missing, or changed by one bit: refused, passed over for the one before, or the result is another."""
    counted = 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        held: dict[str, torch.Tensor] = {}

        def keep(checkpoint: Path, name=name, held=held) -> None:
            held.update(safetensors.torch.load_file(checkpoint / name))

        assert resumed(keep) == "same"
        for key in held:

            def drop(checkpoint: Path, name=name, key=key, held=held) -> None:
                rest = {other: one for other, one in held.items() if other != key}
                safetensors.torch.save_file(rest, checkpoint / name, {"format": "pt"})

            def change(checkpoint: Path, name=name, key=key, held=held) -> None:
                one = held[key].clone()
                one.view(torch.int32).view(-1)[0] ^= 1 << 20
                safetensors.torch.save_file({**held, key: one}, checkpoint / name, {"format": "pt"})

            assert resumed(drop).partition(":")[0] in ("refused", "passed over"), key
            assert resumed(change) != "same", key
            counted += 1
        assert resumed(lambda checkpoint, name=name: (checkpoint / name).unlink()) != "same"
    assert resumed(lambda checkpoint: (checkpoint / "state.json").unlink()) != "same"
    print(f"{counted} tensors")
