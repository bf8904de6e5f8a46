"""The command line: what people see, what machines read, how it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import veneer
from veneer.cli import main as cli

VERBS = ("train", "eval", "generate", "show", "combine", "resize", "merge", "extract", "convert", "check", "demo")
HEAVY = ("torch", "transformers", "matplotlib", "numpy", "yaml", "veneer.config")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    return path


@pytest.fixture
def run_file(tmp_path: Path, tiny_base: Path, rows: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: {tiny_base}\nadapter: {{rank: 2}}\ndata: {{train: {rows}, eval: {rows}}}\n"
        f"train: {{epochs: 2, tokens_per_step: 60, learning_rate: 1e-2}}\nout: {tmp_path / 'run'}\n"
    )
    return path


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_help_imports_nothing_heavy_and_has_an_example(verb):
    code = (
        "import sys; sys.argv = ['veneer', *sys.argv[1:], '--help']\n"
        "from veneer.cli.main import main\n"
        "try:\n    main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "veneer demo" in done.stdout if not verb else "Example: veneer" in done.stdout


def test_train_show_eval_generate_work_together(call, run_file, rows, tiny_base, tmp_path):
    code, out, _ = call("train", run_file)
    assert code == 0
    assert "evaluation loss" in out
    adapter = tmp_path / "run" / "adapter"

    code, out, _ = call("show", adapter, "--json")
    shown = json.loads(out)
    assert (code, shown["digest"], shown["num_modules"]) == (0, veneer.load_adapter(adapter).digest, 14)
    code, out, _ = call("show", adapter)
    assert shown["digest"] in out
    assert "gate_proj" in out

    arguments = ("eval", tiny_base, rows, "--adapter", adapter, "--score", "exact_match", "--set", "max_new_tokens=3")
    code, out, _ = call(*arguments, "--json", "--examples", 2)
    found = json.loads(out)
    assert (code, found["num_rows"], len(found["answers"])) == (0, 4, 2)
    assert 0 <= found["scores"]["exact_match"] <= 1
    code, out, _ = call(*arguments, "--examples", 1)
    assert "perplexity" in out
    assert "1 + 1?" in out

    asked = ("generate", tiny_base, "--adapter", adapter, "--set", "max_new_tokens=3")
    code, out, _ = call(*asked, "--prompt", "1 + 1?", "--json")
    assert len(json.loads(out)["answers"]) == 1
    raw = json.loads(call(*asked, "--prompt", "1 + 1?", "--raw", "--json")[1])["answers"]
    assert raw != json.loads(out)["answers"] or raw == [""]
    code, out, _ = call(*asked, "--file", rows, "--json")
    answers = json.loads(out)["answers"]
    assert len(answers) == 4
    assert len(set(answers)) == 1
    lines = tmp_path / "prompts.txt"
    lines.write_text("1 + 1?\n1 + 1?\n")
    assert json.loads(call(*asked, "--file", lines, "--json")[1])["answers"] == answers[:2]


def test_train_prints_one_object_and_lists_rows_left_out(call, run_file, rows):
    rows.write_text(rows.read_text() + "{broken\n")
    code, out, err = call("train", run_file)
    assert (code, out) == (2, "")
    assert "rows.jsonl:5" in err
    assert "Traceback" not in err
    code, out, err = call("train", run_file, "--skip-bad-rows", "--json")
    printed = json.loads(out)
    assert (code, printed["num_bad_rows"], len(printed["bad_rows"])) == (0, 2, 2)
    assert "rows.jsonl:5" in err


def test_overwrite_resume_and_out(call, run_file, tmp_path):
    assert call("train", run_file)[0] == 0
    code, _, err = call("train", run_file)
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    assert call("train", run_file, "--resume")[0] == 0
    assert call("train", run_file, "--overwrite", "--set", "train.epochs=1")[0] == 0
    assert call("train", run_file, "--out", tmp_path / "other")[0] == 0
    assert (tmp_path / "other" / "adapter").is_dir()
    assert call("train", run_file, "--resume", "--overwrite")[0] == 2


def test_chat_keeps_the_dialogue_until_an_empty_line(call, tiny_base, monkeypatch):
    said = iter(["hello\n", "again\n", "\n"])
    monkeypatch.setattr(sys, "stdin", type("In", (), {"readline": lambda _: next(said)})())
    asked = []
    original = veneer.generate

    def spy(model, tokenizer, prompts, **options):
        asked.append([dict(turn) for turn in prompts[0]])
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(veneer, "generate", spy)
    assert call("generate", tiny_base, "--system", "be brief", "--set", "max_new_tokens=2")[0] == 0
    assert [len(turns) for turns in asked] == [2, 4]
    assert [turn["role"] for turn in asked[1]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "missing.yaml"), "run file 'missing.yaml' does not exist"),
        (("show", "missing"), "missing"),
        (("generate", "no/such/base/anywhere", "--prompt", "x"), "no such file or directory"),
        (("generate", "smollm2", "--prompt", "x", "--file", "y"), "--prompt and --file exclude each other"),
        (("generate", "smollm2", "--prompt", "x", "--raw", "--system", "y"), "--system needs the chat template"),
        (("generate", "smollm2", "--file", "y.jsonl", "--system", "y"), "--system goes with --prompt or a .txt file"),
        (("generate", "smollm2", "--json"), "--json needs --prompt or --file"),
        (("generate", "smollm2", "--prompt", "x", "--set", "temprature=1"), "nearest: 'temperature'"),
        (("generate", "smollm2", "--prompt", "x", "--set", "top_p=2"), "top_p"),
        (("generate", "smollm2", "--prompt", "x", "--set", "top_p=a"), "is not a number"),
        (("eval", "smollm2", "missing.jsonl"), "missing.jsonl"),
        (("nonsense",), "No such command"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(call, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_ctrl_c_leaves_a_run_to_go_on_with(run_file, tmp_path):
    """A real SIGINT to a real process; then --resume ends with the bytes of a run never stopped."""
    command = [sys.executable, "-c", "from veneer.cli.main import main; main()", "train", str(run_file)]
    long = ["--set", "train.epochs=400", "--set", "train.checkpoint_every=1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Whoever started the tests in the background ignores SIGINT, and a run that inherits that ignores it too.
    process = subprocess.Popen(
        [*command, *long],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count('"loss"') > 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step within a minute"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in err
    assert "Traceback" not in err
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    short = ["--set", "train.epochs=400", "--set", f"train.max_steps={done + 3}"]
    refused = subprocess.run([*command, *short, "--resume"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "settings.train.max_steps: was None" in refused.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert (tmp_path / "run" / "loss.png").exists()


@pytest.fixture
def trained(call, run_file, tmp_path) -> Path:
    assert call("train", run_file)[0] == 0
    return tmp_path / "run" / "adapter"


def test_an_adapter_for_other_weights_needs_any_base(call, trained, rows, tiny, tokenizer, tmp_path):
    other = tmp_path / "other"
    tiny(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for arguments in (("eval", other, rows), ("generate", other, "--prompt", "1 + 1?", "--set", "max_new_tokens=2")):
        code, _, err = call(*arguments, "--adapter", trained)
        assert code == 2
        assert "fingerprint" in err
        assert "--any-base" in err
        assert call(*arguments, "--adapter", trained, "--any-base")[0] == 0


def test_an_adapter_for_another_template_is_refused_before_the_weights_load(
    call, trained, rows, tiny_base, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    template = other / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    with monkeypatch.context() as patch:
        patch.setattr("veneer.base.load.AutoModelForCausalLM", None)
        code, _, err = call("eval", other, rows, "--adapter", trained)
    assert code == 2
    assert "another chat template" in err
    code, _, err = call("eval", other, rows, "--adapter", trained, "--any-base")
    assert code == 0, err


def test_rows_that_only_the_template_rejects_show_before_the_weights_load(call, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.base.load.AutoModelForCausalLM", None)
    rows = tmp_path / "tool.jsonl"
    turns = [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    code, _, err = call("eval", tiny_base, rows)
    assert code == 2
    assert "tool.jsonl:1: the chat template rejects the dialogue: no tools here" in err


def test_rows_longer_than_the_models_positions_are_named(call, tiny, tokenizer, tmp_path):
    base, rows = tmp_path / "short", tmp_path / "long.jsonl"
    tiny(max_position_embeddings=40).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows.write_text(json.dumps({"prompt": "p" * 50, "completion": "c"}) + "\n")
    run = tmp_path / "run.yaml"
    run.write_text(f"base: {base}\ndata: {{train: {rows}}}\nout: {tmp_path / 'run'}\n")
    for arguments in (("eval", base, rows), ("train", run)):
        code, _, err = call(*arguments)
        assert code == 2
        assert "long.jsonl:1: 52 tokens, at most 40 fit" in err


def test_a_damaged_plan_is_one_message(call, trained, run_file):
    plan = trained.parent / "plan.json"
    plan.write_text(plan.read_text()[:100])
    code, out, err = call("train", run_file, "--resume")
    assert code == 2
    assert "plan.json is damaged" in err
    assert "Traceback" not in out + err


def test_an_adapter_of_a_quantised_run_is_used_on_the_base_as_it_was_stored(call, run_file, rows, tiny_base, tmp_path):
    code, _, err = call("train", run_file, "--set", "storage=nf4")
    assert code == 0
    assert "--storage nf4" in err
    adapter = tmp_path / "run" / "adapter"
    asked = ("eval", tiny_base, rows, "--adapter", adapter, "--json")
    assert call(*asked)[0] == 2
    code, out, _ = call(*asked, "--storage", "nf4")
    assert code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    after = [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert json.loads(out)["loss"] == pytest.approx(after, rel=1e-5)
    code, _, err = call(*asked, "--storage", "nf5")
    assert code == 2
    assert "nearest: 'nf4'" in err


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("veneer.load_adapter", interrupted)
    monkeypatch.setattr("sys.argv", ["veneer", "show", "adapter"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"
