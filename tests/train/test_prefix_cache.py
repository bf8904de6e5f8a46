"""The frozen-prefix cache in whole runs: the same results, each layer below run once a row, and when there is none."""

import logging
import os
from pathlib import Path

import pytest
import torch
from tests.train.test_run import files_of, lines, without_times

import veneer
from veneer.base.ragged import ragged_attention
from veneer.data.encode import EncodedRow
from veneer.errors import BaseModelError, InterruptedRunError, OutputError
from veneer.files.filesystem import FileSystem
from veneer.nn.attach import attach
from veneer.train import prefix_cache
from veneer.train.interrupt import StopFlag
from veneer.train.prefix_cache import PrefixCache, _first_meetings
from veneer.train.prepare import prepare_data, read_data
from veneer.train.run import finetune, run

TOP = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}


def log_of(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "veneer")


@pytest.fixture(autouse=True)
def _information(caplog):
    caplog.set_level(logging.INFO, logger="veneer")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_results_are_those_without_a_cache(make_run, dropout):
    results = {
        place: run(make_run(place, {**TOP, "dropout": dropout}, epochs=3, cache_prefix=place))
        for place in ("off", "auto", "memory", "disk")
    }
    for place, result in results.items():
        folder = Path(result.folder)
        # States are computed in forwards of other sizes than the layers above them: last bits may differ.
        ours, theirs = without_times(lines(folder)), without_times(lines(results["off"].folder))
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-4), place
        assert {path.name for path in folder.iterdir()} == {
            *("run.yaml", "plan.json", "metrics.jsonl", "loss.png", "checkpoints", "adapter", ".lock")
        }
        for name, tensor in results["off"].adapter.tensors().items():
            torch.testing.assert_close(result.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("instant", [1, 5, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stopped_anywhere_and_resumed_a_run_ends_with_the_same_bytes(make_run, monkeypatch, instant, dropout):
    adapter = {**TOP, "dropout": dropout}
    whole = make_run("whole", adapter, cache_prefix="disk", tokens_per_micro_batch=12)  # few rows: last bits may differ
    run(whole)
    config = make_run("stopped", adapter, cache_prefix="disk", tokens_per_micro_batch=12)
    asked = []

    def check(self) -> None:
        asked.extend([None] * self.began)
        if len(asked) == instant * 3:
            self.ask(2, None)
        original(self)

    original = StopFlag.check
    monkeypatch.setattr(StopFlag, "check", check)
    with pytest.raises(InterruptedRunError):
        run(config)
    monkeypatch.undo()
    run(config, existing="resume")
    assert files_of(Path(config.out, "adapter")) == files_of(Path(whole.out, "adapter"))
    assert without_times(lines(Path(config.out))) == without_times(lines(Path(whole.out)))


@pytest.mark.parametrize(("place", "epochs", "evaluations"), [("auto", 1, 1), ("off", 3, 4)])
def test_layers_below_run_once_a_row(make_run, tiny_base, tmp_path, monkeypatch, place, epochs, evaluations):
    monkeypatch.setattr("veneer.train.ways.FILL", 1)
    config = make_run(epochs=3, cache_prefix=place)
    model, tokenizer = veneer.load_base(str(tiny_base))
    attach(model, veneer.LoRAConfig(rank=2, **TOP))
    tokens = []
    model.model.layers[0].mlp.register_forward_hook(lambda _layer, args, _out: tokens.append(args[0].shape[1]))
    result = finetune(model, tokenizer, data=config.data, out=str(tmp_path / "tuned"), config=config.train)
    data = prepare_data(config.data, read_data(config.data), tokenizer, 512)
    assert result.tokens == 3 * data.train.num_tokens
    assert len([line for line in lines(result.folder) if "eval_loss" in line]) == 4
    probes = [one for one in tokens if one in (5, 8, 13)]
    assert sum(tokens) - sum(probes) == epochs * data.train.num_tokens + evaluations * data.eval.num_tokens


def test_a_file_is_used_where_memory_is_short(make_run, monkeypatch, caplog):
    made = []
    original = FileSystem.scratch
    monkeypatch.setattr(FileSystem, "scratch", lambda *asked: made.append(asked[1:]) or original(*asked))
    monkeypatch.setattr(prefix_cache, "free_memory_bytes", lambda: 1000)
    config = make_run(adapter=TOP)
    run(config)
    [(folder, size)] = made
    assert folder == Path(config.out)
    assert size % (32 * 4) == 0
    assert (
        f"lowest 1 of 2 decoder layers are frozen: what they give is computed once and kept ({size / 1e6:.1f} MB)"
        in (log_of(caplog))
    )
    assert "saves about 33 % of the layers' work in later epochs" in log_of(caplog)


def test_a_full_disk_is_an_error_only_where_a_file_was_asked_for(make_run, monkeypatch, caplog):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(prefix_cache, "free_memory_bytes", lambda: 0)
    run(make_run("auto", TOP))
    assert "No space left on device; all layers are run in every epoch" in log_of(caplog)
    with pytest.raises(OutputError, match=r"No space left .*set train.cache_prefix: off"):
        run(make_run("disk", TOP, cache_prefix="disk"))


@pytest.mark.parametrize(
    ("adapter", "train", "said"),
    [
        ({}, {"cache_prefix": "memory"}, "memory is of no use: the lowest decoder layer is adapted"),
        (TOP, {"cache_prefix": "disk", "epochs": 1}, "disk is of no use: no row is met twice"),
        ({**TOP, "token_rows": {"embed_tokens": [5]}}, {}, "every epoch: something below layer 1"),
    ],
)
def test_why_there_is_none_is_said(make_run, caplog, adapter, train, said):
    run(make_run(adapter=adapter, data={"eval": None}, **train))
    assert said in log_of(caplog)


def test_nothing_is_said_of_a_cache_that_nobody_asked_for(make_run, caplog):
    run(make_run("all"))
    run(make_run("once", TOP, data={"eval": None}, epochs=1))
    run(make_run("off", TOP, cache_prefix="off"))
    assert "the lowest" not in log_of(caplog)


def test_evaluation_rows_are_kept_in_a_single_epoch_too(make_run, caplog):
    run(make_run(adapter=TOP, epochs=1))
    assert "saves about 50 % of the layers' work in later evaluations" in log_of(caplog)


def test_groups_are_the_micro_batches_before_a_row_comes_again():
    assert _first_meetings([[0, 2], [1], [2, 1], [0]]) == [[0, 2], [1]]
    assert _first_meetings([[0, 2], [1]]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_file_holds_what_is_written_and_has_no_name(tmp_path, dtype):
    flat = prefix_cache._room("disk", (5, 3), dtype, tmp_path)
    values = torch.randn(5, 3, dtype=dtype)
    flat.copy_(values)
    assert torch.equal(flat, values)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_computed_in_their_groups_in_whatever_order_they_are_asked_for(tiny):
    model = tiny()
    lengths = (3, 9, 4, 12, 5)
    marks = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    rows = [EncodedRow("a:1", torch.randint(3, 200, (len(one),), dtype=torch.int32), one) for one in marks]
    groups = [[3, 0], [1, 2, 4]]
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda _layer, args, _out: ran.append(args[0].shape[1]))
    stored = []
    with ragged_attention(model):
        for asked in ([[3, 0], [1, 2, 4]], [[4], [0, 4], [2, 3], [1]]):
            cache = PrefixCache(model, rows, groups, 1, torch.full((33, 32), float("nan")))
            for numbers in asked:
                assert cache.recall(numbers).states_TD.shape == (sum(lengths[number] for number in numbers), 32)
            stored.append(cache.recall(range(5)).states_TD)
    assert ran == [15, 18, 18, 15]
    assert torch.equal(*stored)


def test_a_group_that_could_not_be_computed_is_computed_again(tiny):
    model = tiny()
    rows = [EncodedRow("a:1", torch.tensor([5, 6, 7], dtype=torch.int32), torch.zeros(3, dtype=torch.bool))]
    cache = PrefixCache(model, rows, [[0]], 1, torch.full((3, 32), float("nan")))
    with pytest.raises(BaseModelError, match="outside of ragged_attention"):
        cache.recall([0])
    with ragged_attention(model):
        assert cache.recall([0]).states_TD.isfinite().all()
