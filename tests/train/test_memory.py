"""Memory that does not suffice: steps are cut, nothing else changes, and a run that is gone on with cuts alike."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.test_run import files_of, lines, without_times

from veneer.data.batches import pack
from veneer.errors import InterruptedRunError, NotEnoughMemoryError
from veneer.scoring import loss as scoring
from veneer.train import step as train_step
from veneer.train.interrupt import StopFlag
from veneer.train.memory import cut, halves, is_out_of_memory, smaller_limit
from veneer.train.run import run

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = {"torch": RuntimeError(SAID), "python": MemoryError(), "cuda": torch.OutOfMemoryError("CUDA out of memory.")}


@pytest.fixture
def starve(monkeypatch):
    """Lets every micro-batch above a limit fail from its n-th on, in its forward or its backward."""

    def begin(limit: int, *, after: int = 0, error: str = "torch", backward: bool = False) -> list:
        failed, count = [], [0]

        def summed_loss(model, batch, *rest):
            count[0] += 1
            loss = original(model, batch, *rest)
            if count[0] > after and sum(batch.lengths) > limit:
                failed.append(weakref.ref(batch))
                if not backward:
                    raise type(ERRORS[error])(*ERRORS[error].args)

                def refuse(_gradient):
                    raise type(ERRORS[error])(*ERRORS[error].args)

                loss.register_hook(refuse)
            elif failed and failed[-1] is not None:  # a retry: nothing of the attempt before is left
                assert failed[-1]() is None
                failed.append(None)
            return loss

        original = scoring.summed_loss
        monkeypatch.setattr(train_step, "summed_loss", summed_loss)
        return failed

    return begin


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_does_not_fit_is_cut_and_nothing_else_changes(make_run, starve, error, backward):
    whole = run(make_run("whole"))
    failed = starve(20, error=error, backward=backward)
    cut_up = run(make_run("cut"))
    assert failed
    assert cut_up.token_limit <= 20
    ours, theirs = (without_times(lines(Path(result.folder))) for result in (cut_up, whole))
    assert any("cut_to_tokens" in line for line in ours)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("cut_to_tokens", 0) <= 20 or error
        assert one.keys() == other.keys()
        for name in one:
            exact = name not in ("loss", "grad_norm", "eval_loss")
            assert one[name] == (other[name] if exact else pytest.approx(other[name], rel=1e-4)), name
    for name, tensor in whole.adapter.tensors().items():
        torch.testing.assert_close(cut_up.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("after", [0, 3, 11])
@pytest.mark.parametrize("instant", [1, 3, 8])
def test_gone_on_with_where_memory_suffices_a_run_cuts_where_it_would_have(
    make_run, starve, monkeypatch, after, instant
):
    starve(20, after=after)
    whole = run(make_run("whole", {"dropout": 0.1}, checkpoint_every=100))
    config, seen = make_run("stopped", {"dropout": 0.1}, checkpoint_every=100), []

    def check(self) -> None:
        limit = list(Path(config.out, "checkpoints").glob("step-*/state.json"))
        if any(json.loads(path.read_text())["token_limit"] for path in limit):
            seen.append(None)
            if len(seen) == instant:
                self.ask(2, None)
        original(self)

    original = StopFlag.check
    starve(20, after=after)
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "check", check)
        with pytest.raises(InterruptedRunError):
            run(config)
    monkeypatch.setattr(train_step, "summed_loss", scoring.summed_loss)  # there is memory again
    run(config, existing="resume")
    assert files_of(Path(config.out, "adapter")) == files_of(Path(whole.folder, "adapter"))
    assert without_times(lines(Path(config.out))) == without_times(lines(Path(whole.folder)))


def test_a_single_row_that_does_not_fit_is_a_clear_error(make_run, starve):
    starve(2)
    with pytest.raises(NotEnoughMemoryError, match=r"step 1: memory .* 1 rows, .*checkpoint_activations") as error:
        run(make_run())
    assert error.value.exit_code == 1
    assert len(error.value.problems) == 1


def test_an_evaluation_that_does_not_fit_is_cut_too(make_run, monkeypatch):
    whole = run(make_run("whole"))

    def summed_loss(model, batch, *rest):
        if sum(batch.lengths) > 20 and not torch.is_grad_enabled():
            raise MemoryError
        return original(model, batch, *rest)

    original = scoring.summed_loss
    monkeypatch.setattr(scoring, "summed_loss", summed_loss)
    cut_up = run(make_run("cut"))
    assert cut_up.token_limit == 15
    assert cut_up.eval_loss == pytest.approx(whole.eval_loss, rel=1e-4)


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(SAID))
    assert all(is_out_of_memory(error) for error in ERRORS.values())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 100))
def test_cutting_keeps_every_row_in_its_order_and_the_limit(lengths, limit):
    step = pack(range(len(lengths)), lengths, 60)
    parts = cut(step, lengths, limit)
    assert [row for micro in parts for row in micro] == [row for micro in step for row in micro]
    assert all(len(micro) == 1 or sum(lengths[row] for row in micro) <= limit for micro in parts)
    assert cut(parts, lengths, limit) == parts
    assert cut(step, lengths, None) == step


@given(st.lists(st.integers(1, 50), min_size=2, max_size=12))
def test_a_limit_from_a_failure_cuts_what_failed(lengths):
    micro = list(range(len(lengths)))
    first, second = halves(micro, lengths)
    assert first + second == micro
    assert len(cut([micro], lengths, smaller_limit(micro, lengths))) >= 2
    assert smaller_limit([0], lengths) is None
