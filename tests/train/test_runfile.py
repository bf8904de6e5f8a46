"""Run files: numbers as people write them, every mistake named."""

from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.train.initialise import check_initialisation
from veneer.train.runfile import dump_run, read_run_file

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

GOOD = "base: smollm2\ndata: {train: a.jsonl}\nout: runs/a\n"


def write(tmp_path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return str(path)


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", "2E-4", "+2e-4", ".2e-3"])
def test_numbers_are_numbers(tmp_path, number):
    path = write(tmp_path, GOOD + f"train: {{learning_rate: {number}}}\n")
    assert read_run_file(path).train.learning_rate == pytest.approx(2e-4)


def test_what_is_written_is_read_back(tmp_path):
    run = read_run_file(write(tmp_path, GOOD + "adapter: {target_modules: [q_proj], rank_pattern: {q_proj: 2}}\n"))
    assert read_run_file(write(tmp_path, dump_run(run))) == run


def test_set_changes_settings_and_makes_sections(tmp_path):
    run = read_run_file(write(tmp_path, GOOD), ["train.epochs=3", "adapter.target_modules=[q_proj, v_proj]", "seed=7"])
    assert (run.train.epochs, run.adapter.target_modules, run.seed) == (3, ("q_proj", "v_proj"), 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "traim: {}\n", ["traim: unknown key; nearest: 'train'"]),
        (
            GOOD + "train: {learning_rat: 1, epochs: 0}\n",
            ["learning_rat: unknown key; nearest: 'learning_rate'", "epochs"],
        ),
        ("base: smollm2\n", ["data: Field required", "out: Field required"]),
        ("base: [\n", ["not YAML: line 2"]),
        (GOOD + "out: again\n", ["key 'out' stands twice", "line 4"]),
        ("- a\n", ["expected keys and values"]),
        ("base: {{ name }}\n", ["is no word"]),
        (GOOD + "1: x\n", ["key 1 is no word"]),
        (GOOD + "adapter: {layers_pattern: '('}\n", ["not a regular expression"]),
        (GOOD + "adapter: {layers_pattern: h}\n", ["layers_to_transform"]),
        ("", ["expected keys and values"]),
        (GOOD.encode() + b"seed: \xff\n", ["not UTF-8 at byte"]),
        (GOOD + "adapter: {rank: true}\n", ["adapter.rank"]),
        (GOOD + "adapter: {target_modules: '('}\n", ["not a regular expression"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, expected):
    with pytest.raises(ConfigError) as error:
        read_run_file(write(tmp_path, text))
    for part in expected:
        assert part in str(error.value)
    assert "run.yaml" in str(error.value)


@pytest.mark.parametrize("override", ["epochs", "=3", "out.x=3", "train.epochs={", "train.epoch=3"])
def test_overrides_that_cannot_be_used(tmp_path, override):
    with pytest.raises(ConfigError):
        read_run_file(write(tmp_path, GOOD), [override])


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_run_file(str(tmp_path / "rum.yaml"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_sound(path):
    run = read_run_file(str(path))
    check_initialisation(run.adapter, run.storage)
    assert Path(EXAMPLES.parent, run.data.train).parent.parent == EXAMPLES
