"""Going on: exactly, or not at all, or by force and said so; and what a run says at its end that a loss does not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.test_run import lines, without_times

import veneer
from veneer.errors import ConfigError, InterruptedRunError, OutputError
from veneer.files.manifest import MANIFEST
from veneer.train import loop, step
from veneer.train.interrupt import StopFlag
from veneer.train.randomness import draw_from, own_generators
from veneer.train.run import run


def drawn() -> tuple[float, float, float]:
    """A number of each generator that a model may draw from."""
    return random.random(), float(np.random.random()), float(torch.rand(1))  # noqa: NPY002


def stop_at(monkeypatch, number: int) -> None:
    """Ask the run to stop at its n-th look after it began."""
    seen = []

    def check(self) -> None:
        seen.extend([None] * self.began)
        if len(seen) == number:
            self.ask(15, None)
        original(self)

    original = StopFlag.check
    monkeypatch.setattr(StopFlag, "check", check)


def test_a_stop_within_an_evaluation_evaluates_again_and_ends_the_same(make_run, monkeypatch):
    whole = make_run("whole", patience=8, eval_every=2)
    run(whole)
    config, calls = make_run("stopped", patience=8, eval_every=2), []

    def evaluate(*arguments, **options):
        calls.append(None)
        if len(calls) == 3:
            drawn()
            options["check"].__self__.ask(15, None)
        return original(*arguments, **options)

    original = loop.evaluate_loss
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_loss", evaluate)
        with pytest.raises(InterruptedRunError, match="stopped by SIGTERM after step 4") as stopped:
            run(config)
    assert stopped.value.exit_code == 143
    run(config, existing="resume")
    for name in ("adapter_model.safetensors", MANIFEST):
        assert Path(config.out, "adapter", name).read_bytes() == Path(whole.out, "adapter", name).read_bytes()
    assert without_times(lines(Path(config.out))) == without_times(lines(Path(whole.out)))


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        ("torch.__version__", "0.0.1", r"versions\.torch: was .*, is '0\.0\.1'"),
        ("transformers.__version__", "0.0.1", r"versions\.transformers"),
        ("veneer.train.made_with.__version__", "0.0.1", r"versions\.veneer"),
        ("platform.python_version", lambda: "2.7", r"versions\.python"),
        ("torch.get_num_threads", lambda: 99, r"num_threads: was 1, is 99"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "NONE", "device: was"),
        ("veneer.ops.native.source", lambda: "0123", "kernels: was .*, is '0123'"),
        ("veneer.ops.tiles.has_tiles", lambda: "of wood", "tiles: was .*, is 'of wood'"),
    ],
)
def test_another_version_or_machine_is_named(make_run, monkeypatch, where, value, named):
    config = make_run(max_steps=1)
    run(config)
    monkeypatch.setattr(where, value)
    with pytest.raises(OutputError, match=named):
        run(config, existing="resume")


def test_another_base_and_another_tokenizer_are_named(make_run, tiny, tokenizer, tmp_path):
    config = make_run(max_steps=1)
    run(config)
    other = tmp_path / "other"
    tiny(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(OutputError, match=r"settings\.base: was") as error:
        run(config.model_copy(update={"base": str(other)}), existing="resume")
    assert any(problem.startswith("base_fingerprint") for problem in error.value.problems)
    mine = make_run("mine", max_steps=1).model_copy(update={"base": str(other)})
    run(mine)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(OutputError, match="tokens: was"):
        run(mine, existing="resume")


def test_force_goes_on_and_says_so_everywhere(make_run, caplog):
    config = make_run()
    run(config)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})})
    with pytest.raises(OutputError, match="epochs: was 2, is 3"):
        run(changed, existing="resume")
    result = run(changed, existing="resume", force=True)
    [line] = result.inexact
    assert line == f"gone on with by force from step {result.steps * 2 // 3}: settings.train.epochs: was 2, is 3"
    folder = Path(config.out)
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["exact"], plan["inexact"]) == (False, [line])
    newest = max((folder / "checkpoints").glob("step-*"))
    assert json.loads((newest / MANIFEST).read_text())["notes"]["exact"] is False
    assert json.loads((newest / "state.json").read_text())["inexact"] == [line]
    assert "exact: false" in (folder / "adapter" / "README.md").read_text()
    assert "this run is not the one that was begun" in caplog.text
    again = run(changed, existing="resume")
    assert again.inexact == (line,), "what is forced once is not forgotten"
    assert "exact: false" not in Path(run(make_run("other")).folder, "adapter", "README.md").read_text()
    with pytest.raises(ConfigError, match="force goes with resume"):
        run(make_run("third"), force=True)


def test_a_run_killed_before_it_began_can_be_begun(make_run, monkeypatch):
    config = make_run()
    out = Path(config.out)
    out.mkdir()
    (out / ".plan.json.tmp-0-0").write_text("{")
    run(config)
    (out / "run.yaml").unlink()
    run(config, existing="resume")
    assert (out / "run.yaml").exists()


def test_every_generator_is_drawn_from_the_place_in_the_run():
    def at(*place: int) -> tuple[float, float, float]:
        draw_from(*place)
        return drawn()

    with own_generators():
        first = at(0, 1, 0)
        assert at(0, 1, 0) == first
        others = [at(1, 1, 0), at(0, 2, 0), at(0, 1, 1)]
    assert all(a != b for other in others for a, b in zip(first, other, strict=True))


def test_the_callers_generators_are_as_they_were(make_run):
    draw_from(3, 3, 3)
    expected = drawn()
    draw_from(3, 3, 3)
    run(make_run(adapter={"dropout": 0.1}, max_steps=1))
    assert drawn() == expected


def test_a_spike_is_recorded_with_its_rows_and_told_at_the_end(make_run, monkeypatch, caplog):
    config, now, rows_of_step = make_run(epochs=8), [0], []

    def summed_loss(*arguments):
        return original(*arguments) * (20 if now[0] == 26 else 1)

    def gradient(model, rows, planned, begin, **options):
        now[0] = begin.args[1]
        if now[0] == 26:
            rows_of_step.extend(rows[index].source for micro in planned for index in micro)
        return steps(model, rows, planned, begin, **options)

    original, steps = step.summed_loss, loop.step_gradient
    monkeypatch.setattr(step, "summed_loss", summed_loss)
    monkeypatch.setattr(loop, "step_gradient", gradient)
    result = run(config)
    assert result.spikes == (26,)
    [line] = [line for line in lines(Path(config.out)) if "spike" in line]
    assert line["step"] == 26
    assert line["spike"]["rows"] == rows_of_step
    assert line["spike"]["deviations"] > 6
    assert "the loss spiked in 1 steps: 26" in caplog.text


@pytest.mark.parametrize("eval_rows", [True, False])
def test_a_loss_that_is_the_bases_still_is_told(make_run, caplog, eval_rows):
    data = {} if eval_rows else {"eval": None}
    still = run(make_run("still", max_steps=2, learning_rate=1e-9, data=data))
    assert still.unmoved
    assert not still.never_trained
    assert "the loss is still the base's" in caplog.text
    assert not run(make_run("moved", data=data)).unmoved


def test_a_run_goes_on_without_its_metrics(make_run, monkeypatch):
    """They are for people; what the run needs stands in its checkpoints."""
    config = make_run()
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(InterruptedRunError):
            run(config)
    Path(config.out, "metrics.jsonl").unlink()
    digest = run(config, existing="resume").adapter.digest
    assert digest == run(make_run("whole")).adapter.digest
    assert veneer.load_adapter(Path(config.out, "adapter")).digest == digest
