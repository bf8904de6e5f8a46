"""Signals: the first stops a run where it is, unless that is held; the second does what it did before."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from veneer.base.batching import Way
from veneer.config import LoRAConfig, TrainConfig
from veneer.data.encode import EncodedRow
from veneer.errors import InterruptedRunError
from veneer.nn.attach import attach
from veneer.train import ways
from veneer.train.interrupt import StopFlag, StopRequested, stop_behind, stop_flag
from veneer.train.step import step_gradient
from veneer.train.ways import computing


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.001)  # Python runs a handler between two instructions


def send_and_fail() -> None:
    send(signal.SIGTERM)
    raise ZeroDivisionError


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Whoever started the tests in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_flag() as flag:
        send(signal.SIGINT)
        flag.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_where_it_comes(number):
    before = signal.getsignal(number)
    with stop_flag() as flag, pytest.raises(StopRequested) as stopped:
        send(number)
    assert (stopped.value.number, stopped.value.exit_code) == (number, 128 + number)
    assert flag.request is not None
    assert signal.getsignal(number) is before


def test_what_is_held_is_finished_first():
    done = []

    def work(flag: StopFlag) -> None:
        with flag.held():
            with flag.held():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("afterwards")

    with stop_flag() as flag:
        with pytest.raises(StopRequested):
            work(flag)
        assert done == ["inner", "outer"]
        with pytest.raises(StopRequested):
            flag.check()


def test_an_error_within_what_is_held_stays_that_error():
    with stop_flag() as flag:
        with pytest.raises(ZeroDivisionError), flag.held():
            send_and_fail()
        with pytest.raises(StopRequested):
            flag.check()


def test_the_second_signal_does_what_it_did_before():
    with stop_flag() as flag, flag.held():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        flag._signal = None


def test_other_threads_are_left_alone():
    found = []

    def inside() -> None:
        with stop_flag():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]


def test_an_error_that_hides_the_request_counts_as_the_request():
    with stop_flag() as flag:
        error = RuntimeError("cannot load")
        assert stop_behind(error, flag) is None
        with pytest.raises(StopRequested):
            send(signal.SIGTERM)
        assert stop_behind(error, flag).number == signal.SIGTERM
        assert stop_behind(KeyboardInterrupt(), flag) is None


def test_the_error_crosses_process_borders_with_its_code():
    error = InterruptedRunError("stopped", ["a"], exit_code=143)
    kind, parts = error.__reduce__()
    again = kind(*parts)
    assert (str(again), again.exit_code) == (str(error), 143)


@pytest.mark.parametrize("settings", [{}, {"fast": False}, {"checkpoint_activations": True}])
def test_a_long_micro_batch_is_left_within_it(tiny, settings):
    """The signal comes somewhere in forward and backward; whoever asked does not wait for the end of them."""
    model = tiny(num_hidden_layers=8, hidden_size=128, intermediate_size=256)
    attach(model, LoRAConfig(rank=4))
    model.train()
    ids, marks = torch.randint(3, 200, (500,), dtype=torch.int32), torch.ones(500, dtype=torch.bool)
    marks[0] = False
    rows, times = [EncodedRow("a:1", ids, marks)] * 4, []

    def work_for_ever(flag: StopFlag) -> None:
        while True:
            flag.check()  # as a run does between steps: a signal that comes in a finaliser is swallowed by Python
            times.append(time.perf_counter())
            step_gradient(model, rows, [list(range(4))], lambda _: None, way=way)

    def ask() -> None:
        times.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGTERM)

    with computing(model, TrainConfig(**settings)) as way:
        step_gradient(model, rows, [list(range(4))], lambda _: None, way=way)
        waits = []
        for _ in range(2):
            start = time.perf_counter()
            step_gradient(model, rows, [list(range(4))], lambda _: None, way=way)
            whole = time.perf_counter() - start
            for share in (0.2, 0.5, 0.8):
                with stop_flag() as flag:
                    threading.Timer(share * whole, ask).start()
                    with pytest.raises(StopRequested):
                        work_for_ever(flag)
                waits.append((time.perf_counter() - times[-1]) / whole)
    assert sorted(waits)[2] < 1 / 4, waits  # one that is not left within it takes 0.8, 0.5 and 0.2 of the whole


def test_layers_are_heard_in_a_backward_of_torch_alone(tiny, monkeypatch):
    heard = []
    monkeypatch.setattr(ways, "_pass_on", lambda gradient: heard.append(gradient.shape))
    model = tiny()
    attach(model, LoRAConfig(rank=2))
    ids, marks = torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([False, True, True])
    with computing(model, TrainConfig(fast=False)) as way:
        assert way == Way(fast=False)
        step_gradient(model, [EncodedRow("a:1", ids, marks)], [[0]], lambda _: None, way=way)
    assert len(heard) == 2
