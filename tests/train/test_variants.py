"""Every way to adapt, on every way to store a base: it learns, goes on exactly, and is read back the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import veneer
from veneer.errors import AdapterError, DataError, OutputError
from veneer.nn.attach import attachment_of
from veneer.train import loop
from veneer.train.checkpoint import load_checkpoint
from veneer.train.loop import _optimizer
from veneer.train.run import finetune, run
from veneer.train.runfile import read_run_file

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "freeze_A": {"freeze_A": True},
    "parts": {"target_modules": ["q_proj"], "parts": {"q_proj": [(0, 8), (16, 32)]}},
    "pissa": {"init": "pissa", "rank": 2},
    "eva": {"init": "eva", "init_options": {"batches": 3, "rho": 2.0}},
    "lora_ga": {"init": "lora_ga", "init_options": {"batches": 2}},
    "dora, eva": {"use_dora": True, "init": "eva", "dropout": 0.1},
    "dora, olora, freeze_A": {"use_dora": True, "init": "olora", "freeze_A": True},
    "whole and rows": {"modules_to_save": ["norm"], "token_rows": {"embed_tokens": [20, 30]}},
    "loftq": {"init": "loftq", "rank": 2},
}
CASES = [
    *(("plain", variant) for variant in VARIANTS if variant != "loftq"),
    *((storage, variant) for storage in ("int8", "nf4") for variant in ("lora", "dora", "freeze_A", "parts", "pissa")),
    *(("nf4", variant) for variant in ("eva", "lora_ga", "loftq")),
    ("int8", "loftq"),
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_losses", lambda *_: None)


def without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_rss_bytes")} for line in lines]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("storage", "variant"), CASES)
def test_it_learns_goes_on_exactly_and_is_read_back(make_run, storage, variant):
    config = make_run("run", VARIANTS[variant], max_steps=4, checkpoint_every=2, lora_plus_ratio=2.0)
    config = config.model_copy(update={"storage": storage})
    result = run(config)
    assert result.eval_loss < result.eval_loss_before
    assert result.untrained == ()
    folder = Path(config.out)
    adapter, lines = files_of(folder / "adapter"), without_times(folder)
    assert veneer.load_adapter(folder / "adapter").digest == result.adapter.digest
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    run(config, existing="resume")
    assert files_of(folder / "adapter") == adapter
    assert without_times(folder) == lines


@pytest.mark.parametrize("changes", [{"freeze_A": True}, {"freeze_A": True, "init": "pissa", "rank": 2}])
def test_a_frozen_down_projection_stays_and_is_no_part_of_optimiser_or_norm_but_of_the_file(make_run, changes):
    config = make_run("run", changes, max_steps=2)
    tensors = run(config).adapter.tensors()
    model, _ = veneer.load_base(config.base)
    attachment = veneer.attach(model, config.adapter, seed=config.seed)
    start = veneer.current_adapter(model).tensors()
    for name in start:
        assert torch.equal(tensors[name], start[name]) == name.endswith("lora_A"), name
    assert all(name.endswith("lora_B") for name in _optimizer(attachment, config.train)._parameters)
    state = _optimizer(attachment, config.train)
    load_checkpoint(Path(config.out, "checkpoints", "step-000002"), attachment, state)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in state.state()} == {"lora_B"}
    assert veneer.current_adapter(model).digest == veneer.load_adapter(Path(config.out, "adapter")).digest


@pytest.mark.parametrize("changes", [{"init": "pissa", "rank": 2}, {"parts": {"q_proj": [(0, 8), (8, 32)]}}])
def test_a_checkpoint_brings_back_what_is_frozen_and_where_parts_lie(make_run, changes):
    """Bit for bit, though the start that it meets may be another."""
    config = make_run("run", {"target_modules": ["q_proj"], **changes}, max_steps=2)
    trained = run(config).adapter
    model, _ = veneer.load_base(config.base)
    attachment = veneer.attach(model, config.adapter, seed=7)
    slot = attachment.slot(attachment.targets[0])
    for tensor in (*slot.parameters(), *slot.buffers()):
        tensor.data.add_(1)
    load_checkpoint(Path(config.out, "checkpoints", "step-000002"), attachment, _optimizer(attachment, config.train))
    assert veneer.current_adapter(model).digest == trained.digest
    pair = veneer.current_adapter(model).modules["model.layers.0.self_attn.q_proj"]
    assert pair.frozen_rank == (2 if "init" in changes else 0)
    assert slot.lora_B.shape == ((32, 2) if "init" in changes else (32, 4))


def test_a_checkpoint_of_another_shape_is_refused(make_run):
    config = make_run(max_steps=1)
    run(config)
    model, _ = veneer.load_base(config.base)
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=1, target_modules=["q_proj"]))
    with pytest.raises(OutputError, match="other parameters than the attached adapter") as error:
        load_checkpoint(
            Path(config.out, "checkpoints", "step-000001"), attachment, _optimizer(attachment, config.train)
        )
    assert "model.layers.0.mlp.down_proj.lora_A: attached None, saved (4, 48)" in error.value.problems
    assert "model.layers.0.self_attn.q_proj.lora_A: attached (1, 32), saved (4, 32)" in error.value.problems


def test_magnitudes_train_and_do_not_decay(make_run):
    """Neither does what trains whole: decay would pull the base's own values to zero."""
    config = make_run("run", {"use_dora": True, "modules_to_save": ["norm"]}, weight_decay=0.1, lora_plus_ratio=4.0)
    model, _ = veneer.load_base(config.base)
    attachment = veneer.attach(model, config.adapter)
    groups = _optimizer(attachment, config.train)._inner.param_groups
    names = [run.names for run in _optimizer(attachment, config.train)._runs]
    kinds = [{name.rpartition(".")[2] for name in of_run} for of_run in names]
    assert kinds == [{"lora_A"}, {"lora_B"}, {"magnitude", "weight"}]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_the_rate_of_lora_b_is_raised_but_not_of_embeddings(make_run):
    config = make_run("run", {"target_modules": ["q_proj", "embed_tokens"]}, lora_plus_ratio=4.0)
    model, _ = veneer.load_base(config.base)
    runs = _optimizer(veneer.attach(model, config.adapter), config.train)._runs
    raised = {name for one in runs if one.rate == 4.0 for name in one.names}
    assert raised == {f"model.layers.{number}.self_attn.q_proj.lora_B" for number in (0, 1)}
    plain = _optimizer(attachment_of(model), config.train.model_copy(update={"lora_plus_ratio": 1.0}))
    assert len(plain._runs) == 1, "a ratio of 1 costs nothing"


def test_another_storage_is_another_run_and_another_base(make_run):
    config = make_run(max_steps=1).model_copy(update={"storage": "int8"})
    result = run(config)
    with pytest.raises(OutputError, match=r"settings\.storage: was 'int8', is 'nf4'"):
        run(config.model_copy(update={"storage": "nf4"}), existing="resume")
    card = Path(config.out, "adapter", "README.md").read_text()
    assert "stored\nint8" in card
    assert "--adapter FOLDER --storage int8" in card
    with pytest.raises(AdapterError, match="fingerprint"):
        veneer.attach(veneer.load_base(config.base)[0], result.adapter)
    veneer.attach(veneer.load_base(config.base, storage="int8")[0], result.adapter)


def test_a_base_in_another_dtype_is_another_base(make_run):
    """Sixteen bits round the weights: the run, its card and the commands that it prints say so."""
    config = make_run(max_steps=4).model_copy(update={"dtype": "bfloat16"})
    result = run(config)
    assert result.adapter.tensors()[next(iter(result.adapter.tensors()))].dtype == torch.float32
    card = Path(result.folder, "adapter", "README.md").read_text()
    assert "--adapter FOLDER --dtype bfloat16" in card
    with pytest.raises(OutputError, match=r"settings\.dtype: was 'bfloat16', is 'auto'"):
        run(config.model_copy(update={"dtype": "auto"}), existing="resume")
    with pytest.raises(AdapterError, match="made for"):
        veneer.attach(veneer.load_base(config.base)[0], result.adapter)
    model, _ = veneer.load_base(config.base, dtype="bfloat16")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    veneer.attach(model, result.adapter)


def test_finetune_notes_the_storage_of_its_model(make_run):
    config = make_run(max_steps=1)
    model, tokenizer = veneer.load_base(config.base, storage="nf4")
    veneer.attach(model, config.adapter)
    result = finetune(model, tokenizer, data=config.data, out=config.out, config=config.train)
    noted = read_run_file(str(Path(config.out, "run.yaml")))
    assert (noted.storage, noted.dtype) == ("nf4", "float32")
    again = noted.model_copy(update={"out": config.out + "-again"})
    assert run(again).adapter.digest == result.adapter.digest


@pytest.mark.parametrize("changes", [{}, {"init": "pissa", "rank": 2}, {"use_dora": True}])
def test_a_run_that_changed_nothing_says_so(make_run, caplog, changes):
    result = run(make_run("run", changes, max_steps=2, learning_rate=1e-60))
    assert result.never_trained
    assert len(result.untrained) == len(result.adapter.modules) == 14
    assert "never trained: every layer's update is still zero" in caplog.text


def test_rows_that_never_call_on_an_activated_adapter_train_nothing(make_run, caplog, monkeypatch):
    """Some do: those train it. None does, and nobody asked before: that is said after a step, and at the end."""
    some = run(make_run("some", {"invocation_tokens": [20]}, max_steps=4, tokens_per_micro_batch=8))
    assert some.untrained == ()
    assert "never trained" not in caplog.text
    monkeypatch.setattr("veneer.train.run.check_invocation", lambda *_: None)
    none = run(make_run("none", {"invocation_tokens": [1, 1]}, max_steps=2))
    assert none.never_trained
    assert "step 1: no gradient reaches the adapter" in caplog.text


def test_layers_that_got_no_gradient_are_named(make_run, caplog, monkeypatch):
    """A layer whose output nobody uses, as of an expert that no token is sent to."""

    def deaf(model, *rest):
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        layer.slot(0).lora_B.requires_grad_(False)
        return original(model, *rest)

    original = loop.step_gradient.__globals__["summed_loss"]
    monkeypatch.setitem(loop.step_gradient.__globals__, "summed_loss", deaf)
    result = run(make_run(max_steps=2))
    assert result.untrained == ("model.layers.0.self_attn.q_proj",)
    assert not result.never_trained
    assert "1 of 14 layers never trained: model.layers.0.self_attn.q_proj" in caplog.text


def test_an_invocation_that_no_row_holds_is_said_before_the_weights_load(make_run, monkeypatch):
    config = make_run(adapter={"target_modules": ["q_proj"], "invocation_tokens": [250, 251]})
    monkeypatch.setattr("veneer.train.run.load_model", None)
    with pytest.raises(DataError, match=r"invocation_tokens=\[250, 251\] stands before an answer in none of 24"):
        run(config)
    assert not Path(config.out).exists()
