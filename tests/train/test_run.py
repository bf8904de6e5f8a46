"""Whole runs: what they leave, that they learn, that they repeat, stop and go on exactly."""

import json
import re
from pathlib import Path

import pytest
import torch

import veneer
from veneer.errors import (
    AdapterError,
    AttachError,
    BaseModelError,
    ConfigError,
    DataError,
    InterruptedRunError,
    NonFiniteError,
    OutputError,
    TargetError,
)
from veneer.files.commit import verify_folder
from veneer.train import loop, step
from veneer.train.interrupt import StopFlag
from veneer.train.run import finetune, run
from veneer.train.runfile import read_run_file


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_rss_bytes")} for line in metrics]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_leaves_all_that_is_promised_and_learns(make_run):
    config = make_run()
    result = run(config)
    folder = Path(config.out)
    assert {path.name for path in folder.iterdir()} == {
        *("run.yaml", "plan.json", "metrics.jsonl", "loss.png", "checkpoints", "adapter", ".lock")
    }
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "MANIFEST.json")
    }
    assert verify_folder(folder / "adapter") is not None
    assert read_run_file(str(folder / "run.yaml")) == config
    assert len(json.loads((folder / "plan.json").read_text())["modules"]) == 14
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[0].keys() == {
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens"),
        *("tokens_per_second", "peak_rss_bytes"),
    }
    assert sum(line["tokens"] for line in steps) == result.tokens
    assert result.eval_loss < result.eval_loss_before
    assert [line["step"] for line in lines(folder) if "eval_loss" in line] == [0, len(steps) // 2, len(steps)]
    loaded = veneer.load_adapter(folder / "adapter")
    assert loaded.digest == result.adapter.digest
    assert loaded.metadata.row_format == "completion"
    assert loaded.metadata.base_fingerprint == result.adapter.metadata.base_fingerprint
    card = (folder / "adapter" / "README.md").read_text()
    assert result.adapter.digest in card
    assert f"{result.eval_loss:.4f}" in card


def test_the_same_seed_gives_the_same_bytes(make_run):
    one, two = make_run("one", {"dropout": 0.1}), make_run("two", {"dropout": 0.1})
    run(one), run(two)
    assert files_of(Path(one.out, "adapter")) == files_of(Path(two.out, "adapter"))
    assert without_times(lines(Path(one.out))) == without_times(lines(Path(two.out)))
    other = one.model_copy(update={"seed": 1, "out": one.out + "-other"})
    assert run(other).adapter.digest != veneer.load_adapter(Path(one.out, "adapter")).digest


def test_how_a_step_is_cut_changes_nothing_but_rounding(make_run):
    results = [run(make_run(f"cut{budget}", tokens_per_micro_batch=budget)) for budget in (12, 30, 1000)]
    first = results[0].adapter.tensors()
    for other in results[1:]:
        for name, tensor in other.adapter.tensors().items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("instant", [0, 1, 4, 5, 9, 13])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stopped_anywhere_and_resumed_a_run_ends_with_the_same_bytes(make_run, monkeypatch, instant, dropout):
    whole = make_run("whole", {"dropout": dropout})
    run(whole)
    config = make_run("stopped", {"dropout": dropout})
    asked = []

    def check(self) -> None:
        asked.extend([None] * self.began)
        if len(asked) == instant + 1:
            self.ask(2, None)
        original(self)

    original = StopFlag.check
    monkeypatch.setattr(StopFlag, "check", check)
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGINT .* go on with --resume"):
        run(config)
    assert not (Path(config.out) / "adapter").exists()
    monkeypatch.undo()
    run(config, existing="resume")
    assert files_of(Path(config.out, "adapter")) == files_of(Path(whole.out, "adapter"))
    assert without_times(lines(Path(config.out))) == without_times(lines(Path(whole.out)))


def test_a_finished_run_can_be_resumed_without_harm(make_run):
    config = make_run()
    digest = run(config).adapter.digest
    before = without_times(lines(Path(config.out)))
    assert run(config, existing="resume").adapter.digest == digest
    assert without_times(lines(Path(config.out))) == before


def test_resume_refuses_what_has_changed_and_names_it(make_run, tmp_path):
    config = make_run()
    run(config)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(OutputError, match=r"settings.train.learning_rate: was 0.01, is 0.5"):
        run(changed, existing="resume")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(OutputError, match=r"data\.train: was"):
        run(config, existing="resume")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make_run, caplog):
    config = make_run()
    digest = run(config).adapter.digest
    newest = sorted(Path(config.out, "checkpoints").iterdir())[-1]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] + bytes(100))
    assert run(config, existing="resume").adapter.digest == digest
    assert "damaged checkpoint is passed over" in caplog.text


def test_an_existing_folder_is_refused_resumed_or_replaced(make_run, tmp_path):
    config = make_run()
    with pytest.raises(OutputError, match="no run in"):
        run(config, existing="resume")
    run(config)
    with pytest.raises(OutputError, match="go on with --resume, or replace it with --overwrite"):
        run(config)
    Path(config.out, "left-over").write_text("x")
    run(config, existing="overwrite")
    assert Path(config.out, "left-over").exists(), "only what a run writes is ever removed"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="it is not a run folder and is left as it is"):
        run(config.model_copy(update={"out": str(precious)}), existing="overwrite")
    assert (precious / "thesis.txt").read_text() == "x"
    with pytest.raises(OutputError, match="is a file"):
        run(config.model_copy(update={"out": str(precious / "thesis.txt")}))


def test_a_project_folder_is_never_overwritten(make_run, tmp_path):
    """A user's own run.yaml does not make a folder a run folder."""
    config = make_run().model_copy(update={"out": str(tmp_path)})
    (tmp_path / "run.yaml").write_text("base: mine\n")
    with pytest.raises(OutputError, match="is left as it is"):
        run(config, existing="overwrite")
    assert (tmp_path / "run.yaml").read_text() == "base: mine\n"
    assert (tmp_path / "train.jsonl").exists()


def test_an_old_run_stays_until_the_new_one_is_known_to_be_trainable(make_run, monkeypatch):
    config = make_run()
    run(config)
    before = files_of(Path(config.out, "adapter"))
    monkeypatch.setattr(loop, "find_way", lambda _: (_ for _ in ()).throw(BaseModelError("cannot")))
    with pytest.raises(BaseModelError):
        run(config, existing="overwrite")
    assert files_of(Path(config.out, "adapter")) == before


def test_resume_before_the_first_checkpoint_refuses_what_has_changed(make_run, monkeypatch):
    config = make_run(checkpoint_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step_gradient", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("crash")))
        with pytest.raises(RuntimeError, match="crash"):
            run(config)
    changed = config.model_copy(update={"adapter": config.adapter.model_copy(update={"rank": 2})})
    with pytest.raises(OutputError, match=r"settings\.adapter\.rank: was 4, is 2"):
        run(changed, existing="resume")
    run(config, existing="resume")


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(make_run, monkeypatch):
    config = make_run(checkpoint_every=2, keep_checkpoints=2)
    steps = run(config).steps
    newest = Path(config.out, "checkpoints", f"step-{steps:06d}")
    (newest / "state.json").write_text("{}")
    run(config, existing="resume")
    assert json.loads((newest / "state.json").read_text())["step"] == steps


def test_what_cannot_be_saved_is_refused_before_the_first_step(make_run):
    config = make_run(adapter={"target_modules": ["lm_head"], "modules_to_save": ["norm", "lm_head"]})
    with pytest.raises((AdapterError, TargetError)):
        run(config)
    assert not Path(config.out).exists()


def test_only_the_newest_checkpoints_stay(make_run):
    config = make_run(checkpoint_every=1, keep_checkpoints=3)
    result = run(config)
    names = sorted(path.name for path in Path(config.out, "checkpoints").iterdir())
    assert names == [f"step-{number:06d}" for number in range(result.steps - 2, result.steps + 1)]


def test_infinite_loss_stops_before_the_update_with_step_and_rows(make_run, monkeypatch):
    config = make_run()
    calls = []

    def broken(model, *rest):
        calls.append(rest[0])
        return original(model, *rest) * (float("inf") if len(calls) == 4 else 1.0)

    original = step.summed_loss
    monkeypatch.setattr(step, "summed_loss", broken)
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is inf; the update was not applied") as error:
        run(config)
    assert all(re.match(r".*train\.jsonl:\d+$", source) for source in error.value.problems)
    assert len(error.value.problems) == len(calls[3].lengths)
    assert all(line["step"] < 3 for line in lines(Path(config.out)))


def test_an_infinite_gradient_stops_before_the_update(make_run, monkeypatch):
    config = make_run()
    seen = {}

    def poisoned(model, *rest):
        layer = next(iter(veneer.nn.attach.attachment_of(model).layers.values()))
        seen["B"] = layer.slot(0).lora_B
        loss = original(model, *rest)
        layer.slot(0).lora_B.register_hook(lambda grad: grad * float("nan"))
        return loss

    original = step.summed_loss
    monkeypatch.setattr(step, "summed_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 1: the gradient is not finite") as error:
        run(config)
    assert any("lora_B" in problem for problem in error.value.problems)
    assert not seen["B"].any(), "the update was applied"


def test_patience_stops_early_and_keeps_the_best(make_run, monkeypatch):
    losses = iter([2.0, 4.0, 3.0, 3.5, 3.6, 1.0])  # the first is the start's, and better than all that follow
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_, **__: type("L", (), {"mean": next(losses)}))
    adapters = []
    original = loop.save_adapter

    def spy(adapter, folder, **options):
        if Path(folder).name == "best":
            adapters.append(adapter)
        original(adapter, folder, **options)

    monkeypatch.setattr(loop, "save_adapter", spy)
    config = make_run(eval_every=1, patience=2, epochs=4)
    result = run(config)
    assert result.steps == 4
    assert run(config, existing="resume").steps == 4, "a run that stopped early is finished"
    assert result.eval_loss == 3.0
    assert result.adapter.digest == adapters[-1].digest
    assert len(adapters) == 2


def test_max_steps_ends_a_run_and_epochs_count_what_was_seen(make_run):
    config = make_run(max_steps=3)
    assert run(config).steps == 3
    epochs = [line["epoch"] for line in lines(Path(config.out)) if "loss" in line]
    whole = make_run("whole")
    run(whole)
    all_epochs = [line["epoch"] for line in lines(Path(whole.out)) if "loss" in line]
    assert epochs == all_epochs[:3]
    assert all_epochs[len(all_epochs) // 2 - 1] == 1.0
    assert all_epochs[-1] == 2.0


def test_patience_without_rows_to_evaluate_is_refused(make_run):
    with pytest.raises(ConfigError, match=r"set data\.eval"):
        make_run(data={"eval": None}, patience=2)


def test_biases_and_whole_modules_train_too(make_run):
    config = make_run(adapter={"modules_to_save": ["norm"], "bias": "none"})
    result = run(config)
    assert set(result.adapter.trained) == {"model.norm.weight"}
    assert not torch.equal(result.adapter.trained["model.norm.weight"], torch.ones(32))
    assert veneer.load_adapter(Path(config.out, "adapter")).digest == result.adapter.digest


def test_bad_rows_are_refused_before_the_model_is_loaded_or_skipped_and_listed(make_run, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    bad.write_text(good * 3 + "{broken\n" + good + '{"prompt": "a", "completion": ""}\n')
    config = make_run(data={"train": str(bad)})
    with monkeypatch.context() as patch:
        patch.setattr("veneer.train.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        with pytest.raises(DataError) as error:
            run(config)
    assert "bad.jsonl:4" in str(error.value)
    assert "bad.jsonl:6" in str(error.value)
    assert not Path(config.out).exists()
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad_rows": True})})
    result = run(skipping)
    assert [line.split(": ")[0].rpartition("/")[2] for line in result.bad_rows] == ["bad.jsonl:4", "bad.jsonl:6"]


def test_finetune_trains_what_is_attached(tiny_base, make_run):
    config = make_run()
    model, tokenizer = veneer.load_base(str(tiny_base))
    with pytest.raises(AttachError):
        finetune(model, tokenizer, data=config.data.train, out=config.out)
    before = veneer.fingerprint(model)
    veneer.attach(model, veneer.LoRAConfig(rank=4))
    result = finetune(model, tokenizer, data=config.data, out=config.out, config=config.train)
    assert veneer.current_adapter(model).digest == result.adapter.digest
    assert veneer.detach(model).metadata.base == str(tiny_base)
    assert veneer.fingerprint(model) == before
    assert run(make_run("again")).adapter.digest == result.adapter.digest


def test_the_callers_random_state_is_left_alone(make_run):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(make_run(adapter={"dropout": 0.1}))
    assert torch.equal(torch.get_rng_state(), state)
